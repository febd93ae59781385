"""What a protocol may say, what it draws, and which runs follow from it in which order."""

import csv
from pathlib import Path

import numpy as np
import pytest
from fake_cars import SMALL

from experiments.study import __main__ as study
from experiments.study.draws import draw
from experiments.study.ledger import Ledger
from experiments.study.protocol import read_protocol

SEARCH = SMALL[SMALL.index("search.") : SMALL.index('[[contestants]]\nname = "AdaBound')]
PROTOCOLS = Path(study.__file__).parent.parent / "protocols"
RESULTS = PROTOCOLS.parents[1] / "results"
OTHER = '[[contestants]]\nname = "other"\n'


@pytest.mark.parametrize("path", sorted(PROTOCOLS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_protocol_can_be_read_and_its_published_runs_are_its_own(path):
    """trials.csv has the state and the draws of each run; the settings are the protocol's."""
    protocol = read_protocol(path)
    ledger = Ledger(protocol, RESULTS / path.stem)
    ledger.check()
    assert protocol.about
    runs = {run.folder: run for run in ledger.runs()}
    if not (trials := RESULTS / path.stem / "trials.csv").exists():
        assert {run.state for run in runs.values()} == {"open"}
        return
    with open(trials, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(runs)
    for row in rows:
        run = runs[row["folder"]]
        assert run.state == row["state"] or {run.state, row["state"]} == {"open", "begun"}  # begun and not published
        assert {field: row[field] for field in run.drawn} == {field: str(value) for field, value in run.drawn.items()}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("about =", "abuot =", "'abuot'"),
        ('opt = "adam"', 'opt = "adom"', "Adam: opt must be one of adabound,"),
        ('opt = "adam"', "gamma = true", "Adam: gamma must be a number, got True"),
        ('opt = "adam"', 'option = "adam"', "experiments.cars has no setting 'option'"),
        ('opt = "adam"', "seed = 3", "seed is set by the study itself"),
        ("low = 1e-4, high = 1e-1, log = true", "low = 1e-4", "search.learning_rate must be"),
        ("momentum = [0.8, 0.9]", "momentum = [0.8, 1.9]", "--momentum must be between 0 and 1"),
        ("seeds = [4, 5]", "seeds = 2", "final: seeds must be a list, each a whole number, got 2"),
        ("seeds = [4, 5]", "seeds = []", "final: seeds must be one or more numbers from 0"),
        ("seeds = [4, 5]", "seeds = [4, 5]\nlater_seeds = [5]", "final.later_seeds has 5, which final.seeds has too"),
        ("holdout = 0.1", "holdout = 1.0", "tuning.holdout must be between 0 and 1"),
        ("holdout = 0.1", "", "tuning has no holdout"),
        ("trials = 3", 'trials = "3"', "tuning: trials must be a whole number, got '3'"),
        ("epochs = 2\n", "epochs = 1.5\n", "tuning: epochs must be a whole number, got 1.5"),
        ("holdout = 0.1", "holdout = 0.1\nseed = -1", "tuning.seed must be at least 0, got -1"),
        ("holdout = 0.1", 'holdout = 0.1\nchoose_by = "luck"', "choose_by must be one of top1, loss, got 'luck'"),
        ("holdout = 0.1", 'holdout = 0.1\nsampler = "luck"', "sampler must be one of random, sobol, got 'luck'"),
        ('name = "AdaBound"', 'name = "Adam"', "two contestants have the name 'Adam'"),
        ('name = "AdaBound"', 'name = "adam!"', "two contestants have the slug 'adam'"),
        ("[tuning]\ntrials = 3\nepochs = 2\nholdout = 0.1\n", "", "Adam has a search, and there is no table tuning"),
        ('compare = ["AdaBound", "Adam"]', 'compare = ["AdaBound", "SGD"]', "report.compare must be two of"),
        ('compare = ["AdaBound", "Adam"]', "beside = { other = 3 }", "report: beside must be a table, each a list"),
        ('compare = ["AdaBound", "Adam"]', 'beside = { other = ["Adam"] }', "the name of another: 'Adam'"),
        ("targets = [0.2, 0.99]", "targets = [2.0]", "report.targets must be between 0 and 1"),
        ('settings = { opt = "adam" }', "axes.final_lr = [0.1, 1.0]", "final_lr is an axis of one contestant and"),
        (SEARCH, "search = 3\n", "Adam: search must be a table, got 3"),
        ('settings = { opt = "adam" }', 'group = "first"', "Adam: group must be a whole number, got 'first'"),
        ('settings = { opt = "adam" }', "trials = 0", "Adam: trials must be at least 1 and needs a search; got 0"),
        ('settings = { opt = "adam" }', "seeds = [-1]", "Adam: seeds must be one or more numbers from 0"),
        ('settings = { opt = "adam" }', "axes.opt = 3", "Adam: axis opt must be a list of values or a table"),
        ("[report]", OTHER + "trials = 2\n[report]", "other: trials must be at least 1 and needs a search; got 2"),
        ("[report]", OTHER + "tuned_as = {}\n[report]", "other: tuned_as has no contestant"),
        ("[report]", OTHER + 'tuned_as = { contestant = "x" }\n[report]', "'x', which is no contestant with a search"),
        ("[report]", OTHER + 'tuned_as = { contestant = "Adam", place = 4 }\n[report]', "place 4, and Adam has 3"),
        (
            'settings = { opt = "adam" }',
            'tuned_as.contestant = "AdaBound"',
            "Adam has tuned_as and a search",
        ),
        ("low = 1e-4, high", 'low = "x", high', "Adam: search.learning_rate"),
        ("[final]", "[final", "is not TOML"),
        ("[settings]", "cores = 0\n[settings]", "cores must be at least 1, got 0"),
        ('preset = "demo"', 'preset = "cars"', "preset must be one of demo, cars96, cars224, got 'cars'"),
        ("[settings]", "[settings]\ntest_every = 0", "--test-every must be at least 1, got 0"),
        ("[settings]", "[settings]\ngamma_times_steps = 0.0", "--gamma-times-steps must be positive"),
    ],
)
def test_a_bad_protocol_is_refused_by_name(tmp_path, capsys, old, new, said):
    assert SMALL.count(old) >= 1
    (tmp_path / "small.toml").write_text(SMALL.replace(old, new, 1))
    assert study.main([str(tmp_path / "small.toml"), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "small.toml" in error


# A contestant in a later group, with Adam's tuning and its own seed; "s" marks the seed of a final run.
SECOND = OTHER + 'seeds = [7]\ngroup = 1\ntuned_as = { contestant = "Adam", place = 2 }\n'
LATER, LESS = ("seeds = [4, 5]", "seeds = [4]\nlater_seeds = [5]"), ('name = "Adam"\n', 'name = "Adam"\ntrials = 1\n')


@pytest.mark.parametrize(
    ("changes", "order"),
    [
        ([], "Adam 0, AdaBound 0, Adam 1, AdaBound 1, Adam 2, AdaBound 2, Adam s4, AdaBound s4, Adam s5, AdaBound s5"),
        ([LESS], "Adam 0, AdaBound 0, AdaBound 1, AdaBound 2, Adam s4, AdaBound s4, Adam s5, AdaBound s5"),
        (
            [("trials = 3", "trials = 2"), LATER, ("[report]", SECOND + "[report]")],
            "Adam 0, AdaBound 0, Adam 1, AdaBound 1, Adam s4, AdaBound s4, other s7, Adam s5, AdaBound s5",
        ),
        (
            [("trials = 3", "trials = 1"), LATER, ('name = "Adam"\n', 'name = "Adam"\ngroup = 1\nseeds = [5, 4]\n')],
            "AdaBound 0, AdaBound s4, Adam 0, Adam s5, Adam s4, AdaBound s5",
        ),
    ],
    ids=["number by number", "fewer trials", "later seeds and second settings", "groups and own seeds"],
)
def test_the_order_of_runs(tmp_path, changes, order):
    text = SMALL
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    (tmp_path / "small.toml").write_text(text)
    runs = Ledger(read_protocol(tmp_path / "small.toml"), tmp_path / "out").runs()
    found = [
        f"{run.contestant.name} {run.number if run.stage == 'tuning' else f's{run.seed}'}".replace("other,", "other")
        for run in runs
    ]
    assert ", ".join(found) == order
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sampler", ["random", "sobol"])
def test_draws_stay_within_what_is_searched_and_differ(tmp_path, sampler):
    """A Sobol sequence also puts one of eight draws into each eighth of a range, and draws choices equally often."""
    text = SMALL.replace("holdout = 0.1", f'holdout = 0.1\nsampler = "{sampler}"').replace("trials = 3", "trials = 8")
    (tmp_path / "small.toml").write_text(text)
    ours, other = read_protocol(tmp_path / "small.toml").contestants
    drawn = [draw(ours.search, 5, number, sampler) for number in range(8)]
    assert drawn == [draw(ours.search, 5, number, sampler) for number in range(8)]
    assert drawn != [draw(ours.search, 6, number, sampler) for number in range(8)]
    assert [d["learning_rate"] for d in drawn] == [draw(other.search, 5, n, sampler)["learning_rate"] for n in range(8)]
    places = (np.log10([d["learning_rate"] for d in drawn]) + 4) / 3
    assert 0 <= min(places) < max(places) <= 1
    choices = [d["momentum"] for d in drawn]
    assert set(choices) == {0.8, 0.9}
    if sampler == "sobol":
        assert sorted(int(8 * place) for place in places) == list(range(8))
        assert choices.count(0.8) == 4
