"""A study: what a protocol may say, and that its runs are each trained once, whatever happens to its workers."""

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from fake_cars import FAKE, SMALL

from experiments.study import __main__ as study
from experiments.study import worker
from experiments.study.cores import own_cores
from experiments.study.ledger import Ledger
from experiments.study.protocol import read_protocol

SEARCH = SMALL[SMALL.index("search.") : SMALL.index('[[contestants]]\nname = "AdaBound')]
PROTOCOLS = Path(study.__file__).parent.parent / "protocols"


@pytest.fixture
def protocol(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Trains nothing; returns the file with a line for each epoch that was trained."""
    log = tmp_path / "log.txt"
    monkeypatch.setattr(worker, "CARS", (sys.executable, str(FAKE)))
    monkeypatch.setattr(worker, "WAIT_SECONDS", 0.05)
    monkeypatch.setenv("FAKE_CARS_LOG", str(log))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    return log


def trials(out):
    with open(out / "trials.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("path", sorted(PROTOCOLS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_protocol_is_one(path):
    protocol = read_protocol(path)
    assert protocol.about
    assert protocol.contestants


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("about =", "abuot =", "'abuot'"),
        ('opt = "adam"', 'opt = "adom"', "Adam: experiments.cars does not take"),
        ('opt = "adam"', 'option = "adam"', "experiments.cars has no setting 'option'"),
        ('opt = "adam"', "seed = 3", "seed is set by the study itself"),
        ("low = 1e-4, high = 1e-1, log = true", "low = 1e-4", "search.learning_rate must be"),
        ("momentum = [0.8, 0.9]", "momentum = [0.8, 1.9]", "--momentum must be within 0 and 1"),
        ("seeds = [4, 5]", "seeds = 2", "final.seeds must be a list"),
        ("holdout = 0.1", "holdout = 1.0", "a holdout between 0 and 1"),
        ("holdout = 0.1", "", "tuning has no holdout"),
        ("trials = 3", 'trials = "3"', "tuning.trials must be a whole number from 1, got '3'"),
        ("epochs = 2\n", "epochs = 1.5\n", "tuning.epochs must be a whole number from 1, got 1.5"),
        ("holdout = 0.1", "holdout = 0.1\nseed = -1", "tuning.seed must be a whole number from 0, got -1"),
        ("holdout = 0.1", 'holdout = 0.1\nchoose_by = "luck"', "tuning.choose_by must be top1 or loss, got 'luck'"),
        ('name = "AdaBound"', 'name = "Adam"', "two contestants have the name 'Adam'"),
        ('name = "AdaBound"', 'name = "adam!"', "two contestants have the slug 'adam'"),
        ("[tuning]\ntrials = 3\nepochs = 2\nholdout = 0.1\n", "", "Adam has a search, and there is no table tuning"),
        ('compare = ["AdaBound", "Adam"]', 'compare = ["AdaBound", "SGD"]', "report.compare must be two of"),
        ('compare = ["AdaBound", "Adam"]', "beside = { other = 3 }", "report.beside must be lists of contestants"),
        ('compare = ["AdaBound", "Adam"]', 'beside = { other = ["Adam"] }', "the name of another: 'Adam'"),
        (
            'settings = { opt = "adam" }',
            "axes.final_lr = [0.1, 1.0]",
            "final_lr is an axis of one contestant and searched",
        ),
        (SEARCH, "search = 3\n", "Adam: search must be a table, got 3"),
        ('settings = { opt = "adam" }', 'group = "first"', "Adam: group must be a number, got 'first'"),
        ('settings = { opt = "adam" }', "axes.opt = 3", "Adam: axis opt must be a list of values or a table"),
        ("low = 1e-4, high", 'low = "x", high', "Adam: search.learning_rate"),
        ("trials = 3", 'trials = "x"', "small.toml"),
        ("[final]", "[final", "is not TOML"),
        ("[settings]", "cores = 0\n[settings]", "cores must be a whole number from 1, got 0"),
    ],
)
def test_a_bad_protocol_is_refused_by_name(protocol, capsys, old, new, said):
    assert SMALL.count(old) >= 1
    protocol.write_text(SMALL.replace(old, new, 1))
    assert study.main([str(protocol), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "small.toml" in error


def test_runs_a_protocol_to_its_end(protocol, fake, tmp_path, capsys):
    """Tuning, then the best setting on every seed; all of it in trials.csv, and the large files gone."""
    out = tmp_path / "out"
    assert study.main([str(protocol), "--out", str(out)]) == 0
    rows = trials(out)
    assert len(rows) == 2 * (3 + 2)
    assert {row["state"] for row in rows} == {"done"}
    for name in ("Adam", "AdaBound"):
        tuned = [row for row in rows if row["contestant"] == name and row["stage"] == "tuning"]
        best = max(tuned, key=lambda row: float(row["top1"]))
        final = [row for row in rows if row["contestant"] == name and row["stage"] == "final"]
        assert {row["learning_rate"] for row in final} == {best["learning_rate"]}
        assert [row["seed"] for row in final] == ["4", "5"]
        assert {row["epochs"] for row in final} == {"3"}
        assert all("--holdout" in row["command"] for row in tuned)
        assert not any("--holdout" in row["command"] for row in final)
    # The same point of the unit cube for each contestant.
    rates = [
        [row["learning_rate"] for row in rows if row["contestant"] == n and row["stage"] == "tuning"]
        for n in ("Adam", "AdaBound")
    ]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) == 3
    assert (out / "protocol.toml").read_text() == SMALL
    assert not list(out.glob("*/*/*.safetensors"))
    assert not list(out.glob("*/*/checkpoints"))
    assert not [path for path in out.glob("**/*") if path.is_file() and str(tmp_path) in path.read_text()]
    assert "10 of 10 runs" in capsys.readouterr().out


def test_tuning_may_choose_by_the_loss(protocol, fake, tmp_path, capsys):
    """Of three trials the one with the lowest top-1 is given the lowest loss, once all have been run."""
    by_loss = SMALL.replace("holdout = 0.1", 'holdout = 0.1\nchoose_by = "loss"')
    protocol.write_text(by_loss)
    out = tmp_path / "out"
    assert study.main([str(protocol), "--out", str(out), "--runs", "6"]) == 0
    tuned = [row for row in trials(out) if row["contestant"] == "Adam" and row["stage"] == "tuning"]
    worst = min(tuned, key=lambda row: float(row["top1"]))
    metrics = out / worst["folder"] / "metrics.jsonl"
    *lines, last = metrics.read_text().splitlines()
    metrics.write_text("\n".join([*lines, json.dumps(json.loads(last) | {"test_loss": 0.1})]) + "\n")
    protocol.write_text(SMALL)
    assert study.main([str(protocol), "--out", str(out)]) == 2  # not chosen in another way once trials have been seen
    assert "choose_by" in capsys.readouterr().err
    protocol.write_text(by_loss)
    assert study.main([str(protocol), "--out", str(out)]) == 0
    final = [row for row in trials(out) if row["contestant"] == "Adam" and row["stage"] == "final"]
    assert {row["learning_rate"] for row in final} == {worst["learning_rate"]}


def test_in_pieces_it_is_the_same(protocol, fake, tmp_path):
    """Draws depend on the seed and the trial's number alone, and nothing is trained twice."""
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert study.main([str(protocol), "--out", str(whole)]) == 0
    epochs = len(fake.read_text().splitlines())
    for runs in (1, 3, 2, 100):
        assert study.main([str(protocol), "--out", str(pieces), "--runs", str(runs)]) == 0
    assert len(fake.read_text().splitlines()) == 2 * epochs
    assert trials(pieces) == trials(whole)
    before = fake.read_text()
    assert study.main([str(protocol), "--out", str(pieces)]) == 0
    assert fake.read_text() == before


def start(protocol, out, seconds):
    """A worker in a process of its own, with the fake training."""
    code = (
        "import sys; from experiments.study import worker, __main__ as study; "
        f"worker.CARS = (sys.executable, {str(FAKE)!r}); worker.WAIT_SECONDS = 0.05; sys.exit(study.main(sys.argv[1:]))"
    )
    environment = {**os.environ, "FAKE_CARS_SECONDS": str(seconds)}
    arguments = [sys.executable, "-c", code, str(protocol), "--out", str(out)]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)


def wait_for(found, seconds=60):
    until = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.02)


@pytest.mark.parametrize("whole_group", [False, True], ids=["the worker alone", "its training too"])
def test_killed_in_the_middle_it_goes_on(protocol, fake, tmp_path, whole_group):
    """SIGKILL while a run trains: the next worker goes on with that very run, and no epoch is trained twice."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert study.main([str(protocol), "--out", str(whole)]) == 0
    fake.unlink()
    process = start(protocol, out, seconds=0.3)
    wait_for(lambda: fake.exists() and len(fake.read_text().splitlines()) >= 3)
    if whole_group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()  # its child trains on; the run is not begun a second time meanwhile
    process.wait()
    assert study.main([str(protocol), "--out", str(out)]) == 0
    lines = fake.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 2 * (3 * 2 + 2 * 3)
    assert trials(out) == trials(whole)


def test_what_a_killed_worker_left_is_tidied(protocol, fake, tmp_path):
    """SIGKILL between a run's end and the removal of its large files."""
    out = tmp_path / "out"
    assert study.main([str(protocol), "--out", str(out)]) == 0
    folder = out / "adam" / "seed-4"
    (folder / "checkpoints").mkdir()
    (folder / "weights.safetensors").write_text("large")
    before = fake.read_text()
    assert study.main([str(protocol), "--out", str(out)]) == 0
    assert not (folder / "checkpoints").exists()
    assert not (folder / "weights.safetensors").exists()
    assert fake.read_text() == before


def test_two_workers_share_the_runs(protocol, fake, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert study.main([str(protocol), "--out", str(whole)]) == 0
    fake.unlink()
    workers = [start(protocol, out, seconds=0.2) for _ in range(2)]
    assert [process.wait(120) for process in workers] == [0, 0]
    lines = fake.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 2 * (3 * 2 + 2 * 3)
    assert trials(out) == trials(whole)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_each_worker_has_cores_of_its_own(protocol, fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    protocol.write_text(SMALL.replace("[settings]", "cores = 1\n[settings]"))
    all_cores = os.sched_getaffinity(0)
    out = tmp_path / "out"
    workers = [start(protocol, out, seconds=0.2) for _ in sorted(all_cores)[:2]]
    assert [process.wait(120) for process in workers] == [0] * len(workers)
    used = [json.loads(path.read_text())["cores"] for path in out.glob("*/*/config.json")]
    assert {len(cores) for cores in used} == {1}
    assert len({core for cores in used for core in cores}) == len(workers)

    with own_cores(len(all_cores)):
        journal = (out / "journal.log").read_bytes()
        assert study.main([str(protocol), "--out", str(out), "--dry-run"]) == 0  # nothing is left to be timed
        assert (out / "journal.log").read_bytes() == journal
        assert study.main([str(protocol), "--out", str(tmp_path / "none")]) == 2
        error = f"each worker 1 of this machine's {len(all_cores)} cores, and none is free"
        assert error in capsys.readouterr().err
        assert study.main([str(protocol), "--out", str(tmp_path / "none"), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "10 runs, 0 of them ended" in plan
    assert error in plan.splitlines()[-1]
    assert study.main([str(protocol), "--out", str(tmp_path / "none"), "--runs", "1"]) == 0
    assert os.sched_getaffinity(0) == all_cores


def test_sigterm_stops_the_training_and_the_worker(protocol, fake, tmp_path):
    process = start(protocol, tmp_path / "out", seconds=0.5)
    wait_for(lambda: fake.exists() and fake.read_text())
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM


def test_a_training_that_diverges_is_a_result(protocol, fake, tmp_path, capsys):
    """It is listed with its reason; a contestant whose trials all fail has no final runs, and the rest goes on."""
    protocol.write_text(SMALL.replace("low = 1e-4, high = 1e-1", "low = 10.0, high = 100.0", 1))
    out = tmp_path / "out"
    assert study.main([str(protocol), "--out", str(out)]) == 0
    failed = [row for row in trials(out) if row["state"] == "failed"]
    assert [row["contestant"] for row in failed] == ["Adam"] * 3
    assert {row["error"] for row in failed} == {"the loss is nan at step 3; the checkpoint is in checkpoints"}
    assert {row["state"] for row in trials(out) if row["contestant"] == "Adam" and row["stage"] == "final"} == {"open"}
    assert [row["state"] for row in trials(out) if row["contestant"] == "AdaBound"] == ["done"] * 5


def test_a_training_that_cannot_be_run_is_none(protocol, fake, tmp_path, capsys):
    """Want of memory or of data says nothing of an optimizer: the study ends, and tries it again next time."""
    protocol.write_text(SMALL.replace("low = 1e-4, high = 1e-1", "low = 1e-7, high = 2e-7", 1))
    out = tmp_path / "out"
    assert study.main([str(protocol), "--out", str(out)]) == 1
    assert "exit code 2" in capsys.readouterr().err
    assert next(run.state for run in Ledger(read_protocol(protocol), out).runs()) == "begun"


def test_a_test_loss_that_is_no_number_is_a_result(protocol, fake, tmp_path):
    """The last update may spoil what is tested afterwards: the run ends, and does not win by its loss."""
    out = tmp_path / "out"
    assert study.main([str(protocol), "--out", str(out), "--runs", "6"]) == 0
    for number, loss in enumerate((None, 2.0, 1.0)):  # three that are equal but for their loss
        metrics = out / "adam" / f"tuning-{number:03}" / "metrics.jsonl"
        *rows, last = map(json.loads, metrics.read_text().splitlines())
        rows.append(last | {"test_top1": 0.9, "test_loss": loss})
        metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert study.main([str(protocol), "--out", str(out)]) == 0
    adam = [row for row in trials(out) if row["contestant"] == "Adam"]
    tuned, final = ([row for row in adam if row["stage"] == stage] for stage in ("tuning", "final"))
    assert [row["loss"] for row in tuned] == ["nan", "2.0", "1.0"]
    assert {row["learning_rate"] for row in final} == {tuned[2]["learning_rate"]}
    assert {row["state"] for row in adam} == {"done"}


def test_a_run_that_is_not_drawn_yet_has_no_command(protocol, fake, tmp_path):
    """It would train at the defaults."""
    out = tmp_path / "out"
    assert study.main([str(protocol), "--out", str(out), "--runs", "1"]) == 0
    rows = trials(out)
    assert [row["command"] != "" for row in rows] == [row["state"] == "done" for row in rows]


def test_another_protocol_in_the_same_folder_is_refused(protocol, fake, tmp_path, capsys):
    """More seeds may come, and before the final runs more trials; all else would mix two studies."""
    out = tmp_path / "out"
    protocol.write_text(SMALL.replace("trials = 3", "trials = 2"))
    assert study.main([str(protocol), "--out", str(out), "--runs", "3"]) == 0
    protocol.write_text(SMALL)
    assert study.main([str(protocol), "--out", str(out)]) == 0
    more = SMALL.replace("seeds = [4, 5]", "seeds = [4, 5, 6]")
    protocol.write_text(more)
    assert study.main([str(protocol), "--out", str(out), "--runs", "1"]) == 0
    for trials in (2, 4):
        protocol.write_text(more.replace("trials = 3", f"trials = {trials}"))
        assert study.main([str(protocol), "--out", str(out)]) == 2
        assert f"after 3 tuning trials, and the protocol has {trials}" in capsys.readouterr().err
    for old, new in (
        ("epochs = 3", "epochs = 4"),
        ('"adam"', '"adamw"'),
        ("high = 1e-1", "high = 1.0"),
        ("[4, 5, 6]", "[5, 4, 6]"),
        ("[4, 5, 6]", "[4, 5, 7]"),  # 6 came later, and has begun
        ("[4, 5, 6]", "[4, 5]"),
    ):
        assert old in more
        protocol.write_text(more.replace(old, new))
        assert study.main([str(protocol), "--out", str(out)]) == 2
        assert "was begun with another protocol" in capsys.readouterr().err


def test_half_a_line_in_the_journal_is_cut_off(protocol, fake, tmp_path):
    """As a full disk leaves it: Optuna alone could read no further once another line has come behind it."""
    out = tmp_path / "out"
    assert study.main([str(protocol), "--out", str(out), "--runs", "2"]) == 0
    with open(out / "journal.log", "a") as file:
        file.write('{"op_code": 4, "wor')
    assert study.main([str(protocol), "--out", str(out)]) == 0
    assert {row["state"] for row in trials(out)} == {"done"}


def test_a_database_keeps_a_study_too(protocol, fake, tmp_path, capsys):
    url = f"sqlite:///{tmp_path}/study.db"
    out = tmp_path / "out"
    for _ in range(2):
        assert study.main([str(protocol), "--out", str(out), "--storage", url]) == 0
    assert {row["state"] for row in trials(out)} == {"done"}
    assert not (out / "journal.log").exists()
    assert study.main([str(protocol), "--out", str(tmp_path / "no"), "--storage", "nosuch://x"]) == 2
    assert "--storage nosuch://x cannot be used" in capsys.readouterr().err


def test_groups_come_one_after_the_other(protocol, fake, tmp_path):
    protocol.write_text(SMALL.replace('name = "Adam"\n', 'name = "Adam"\ngroup = 1\n'))
    out = tmp_path / "out"
    assert study.main([str(protocol), "--out", str(out), "--runs", "5"]) == 0
    assert {row["contestant"] for row in trials(out) if row["state"] == "done"} == {"AdaBound"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nosuch.toml"], "nosuch.toml"),
        ([str(PROTOCOLS / "origins.toml")], "pass --data DIR"),
        ([str(PROTOCOLS / "origins.toml"), "--data", "nosuch"], "--data nosuch is no folder"),
        ([str(PROTOCOLS / "origins.toml"), "--runs", "0"], "--runs must be at least 1"),
    ],
)
def test_bad_input_is_named(capsys, arguments, said):
    assert study.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_without_optuna_it_says_what_to_install():
    """And the report, which reads files alone, does without."""
    blocked = (
        "import sys; sys.modules.update(optuna=None); import experiments.report.__main__, experiments.study.__main__"
    )
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, cwd=PROTOCOLS.parents[1])
    assert done.returncode == 1
    assert done.stderr.startswith("error: experiments.study needs Optuna")


@pytest.mark.slow
def test_a_real_study_on_drawn_cars(tmp_path, capfd):
    """Two optimizers, really trained, killed once by SIGTERM; the dry run names the time before and after."""
    path, out = tmp_path / "real.toml", tmp_path / "out"
    text = SMALL.replace('image_size = "32"', 'image_size = "32"\nlimit = 64').replace("trials = 3", "trials = 1")
    path.write_text(text.replace("seeds = [4, 5]", "seeds = [4]").replace("epochs = 3", "epochs = 1"))
    assert study.main([str(path), "--out", str(out), "--dry-run"]) == 0
    assert "5 steps of Adam" in capfd.readouterr().out
    assert not out.exists()
    process = subprocess.Popen([sys.executable, "-m", "experiments.study", str(path), "--out", str(out)])
    wait_for(lambda: list(out.glob("*/*/metrics.jsonl")), seconds=300)
    process.terminate()
    assert process.wait(120) == 128 + signal.SIGTERM
    assert study.main([str(path), "--out", str(out)]) == 0
    assert {row["state"] for row in trials(out)} == {"done"}
    capfd.readouterr()
    assert study.main([str(path), "--out", str(out), "--dry-run"]) == 0
    assert "4 runs, 4 of them ended" in capfd.readouterr().out
