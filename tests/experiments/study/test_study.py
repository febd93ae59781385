"""Each run of a study is trained once, as the protocol says, whatever happens to the workers."""

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from fake_cars import FAKE, SMALL
from runs import wait_for

from experiments.study import __main__ as study
from experiments.study import worker
from experiments.study.cores import own_cores
from experiments.study.ledger import Ledger
from experiments.study.protocol import read_protocol

PROTOCOLS = Path(study.__file__).parent.parent / "protocols"
ONE_CORE = SMALL.replace("[settings]", "cores = 1\n[settings]")


@pytest.fixture
def protocol(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Replaces trainings with fakes, and keeps cores apart from other tests; returns the file with a line per epoch."""
    log = tmp_path / "log.txt"
    monkeypatch.setattr(worker, "CARS", (sys.executable, str(FAKE)))
    monkeypatch.setattr(worker, "WAIT_SECONDS", 0.05)
    monkeypatch.setenv("FAKE_CARS_LOG", str(log))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return log


def epochs(trials):
    """Two contestants train two epochs in a trial, three in each of two final runs."""
    return 2 * (trials * 2 + 2 * 3)


def run(protocol, out, *more):
    return study.main([str(protocol), "--out", str(out), *more])


def trials(out, contestant=None, stage=None):
    with open(out / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [r for r in rows if contestant in (None, r["contestant"]) and stage in (None, r["stage"])]


def values(rows, column):
    return {row[column] for row in rows}


def change_last_row(run_folder, **changes):
    """Changes the row of the last epoch in a run's metrics."""
    path = run_folder / "metrics.jsonl"
    *lines, last = path.read_text().splitlines()
    path.write_text("\n".join([*lines, json.dumps(json.loads(last) | changes)]) + "\n")


def test_runs_a_protocol_to_its_end(protocol, fake, out, tmp_path, capsys):
    """A study tunes, runs the best setting on every seed, fills trials.csv and removes large files."""
    assert run(protocol, out) == 0
    rows = trials(out)
    assert len(rows) == 2 * (3 + 2)
    assert values(rows, "state") == {"done"}
    rates = []
    for name in ("Adam", "AdaBound"):
        tuned, final = (trials(out, name, stage) for stage in ("tuning", "final"))
        rates.append([row["learning_rate"] for row in tuned])
        best = max(tuned, key=lambda row: float(row["top1"]))
        assert values(final, "learning_rate") == {best["learning_rate"]}
        assert [row["seed"] for row in final] == ["4", "5"]
        assert values(final, "epochs") == {"3"}
        assert values(tuned + final, "block") == {name}
        assert all("--holdout" in row["command"] for row in tuned)
        assert not any("--holdout" in row["command"] for row in final)
    assert rates[0] == rates[1]  # both draw the same rates
    assert len(set(rates[0])) == 3
    assert (out / "protocol.toml").read_text() == SMALL
    assert not list(out.glob("*/*/*.safetensors"))
    assert not list(out.glob("*/*/checkpoints"))
    assert not [path for path in out.glob("**/*") if path.is_file() and str(tmp_path) in path.read_text()]
    assert "10 of 10 runs" in capsys.readouterr().out
    # A worker that is killed between a run's end and the removal of large files leaves them. An old journal is
    # ignored.
    folder = out / "adam" / "seed-4"
    (folder / "checkpoints").mkdir()
    (folder / "weights.safetensors").write_text("large")
    (out / "journal.log").write_text('{"op_code": 4, "wor')
    assert run(protocol, out) == 0
    assert not (folder / "checkpoints").exists()
    assert not (folder / "weights.safetensors").exists()
    check_trained_once(fake)


def test_settings_and_places_reach_the_runs(protocol, fake, out):
    """A run gets another's second-best setting, untested epochs, and gamma from the number of updates."""
    text = SMALL.replace("[settings]", "[settings]\ntest_every = 2\ngamma_times_steps = 6.0", 1)
    second = '[[contestants]]\nname = "second"\nseeds = [9]\nsettings = { opt = "adam" }\n'
    protocol.write_text(text.replace("[report]", second + 'tuned_as = { contestant = "Adam", place = 2 }\n[report]'))
    assert run(protocol, out) == 0
    ranked = sorted(trials(out, "Adam", "tuning"), key=lambda row: -float(row["top1"]))
    (row,) = trials(out, "second")
    assert (row["learning_rate"], row["momentum"]) == (ranked[1]["learning_rate"], ranked[1]["momentum"])
    assert (row["seed"], row["state"], row["best_epoch"]) == ("9", "done", "3.0")
    folder = out / row["folder"]
    tested = ["test_top1" in json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert tested == [False, True, True]
    assert json.loads((folder / "config.json").read_text())["settings"]["gamma"] == 6.0 / 3
    assert run(protocol, out) == 0  # and no setting differs from the protocol's


def test_tuning_may_choose_by_the_loss(protocol, fake, out, capsys):
    """The trial with the lowest top-1 is chosen once it has the lowest loss."""
    by_loss = SMALL.replace("holdout = 0.1", 'holdout = 0.1\nchoose_by = "loss"')
    protocol.write_text(by_loss)
    assert run(protocol, out, "--runs", "6") == 0
    worst = min(trials(out, "Adam", "tuning"), key=lambda row: float(row["top1"]))
    change_last_row(out / worst["folder"], test_loss=0.1)
    protocol.write_text(SMALL)
    assert run(protocol, out) == 2  # no other way to choose once trials have been seen
    assert "choose_by" in capsys.readouterr().err
    protocol.write_text(by_loss)
    assert run(protocol, out) == 0
    assert values(trials(out, "Adam", "final"), "learning_rate") == {worst["learning_rate"]}


def test_a_test_loss_that_is_no_number_is_a_result(protocol, fake, out):
    """The last update may spoil the test after it: the run ends, and does not win by its loss."""
    assert run(protocol, out, "--runs", "6") == 0
    for number, loss in enumerate((None, 2.0, 1.0)):  # three that are equal but for their loss
        change_last_row(out / "adam" / f"tuning-{number:03}", test_top1=0.9, test_loss=loss)
    assert run(protocol, out) == 0
    tuned = trials(out, "Adam", "tuning")
    assert [row["loss"] for row in tuned] == ["nan", "2.0", "1.0"]
    assert values(trials(out, "Adam", "final"), "learning_rate") == {tuned[2]["learning_rate"]}


def test_in_pieces_it_is_the_same(protocol, fake, out, tmp_path):
    """Draws depend on the seed and the trial's number alone, and nothing is trained twice."""
    whole = tmp_path / "whole"
    assert run(protocol, whole) == 0
    for runs in (1, 3, 2, 100, 100):
        assert run(protocol, out, "--runs", str(runs)) == 0
    assert len(fake.read_text().splitlines()) == 2 * epochs(trials=3)
    assert trials(out) == trials(whole)


def start(protocol, out, seconds):
    """Starts a worker with the fake training in a process."""
    code = (
        "import sys; from experiments.study import worker, __main__ as study; "
        f"worker.CARS = (sys.executable, {str(FAKE)!r}); worker.WAIT_SECONDS = 0.05; sys.exit(study.main(sys.argv[1:]))"
    )
    environment = {**os.environ, "FAKE_CARS_SECONDS": str(seconds)}
    arguments = [sys.executable, "-c", code, str(protocol), "--out", str(out)]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)


def check_trained_once(fake, trials=3):
    lines = fake.read_text().splitlines()
    assert len(lines) == len(set(lines)) == epochs(trials)


@pytest.mark.parametrize("whole_group", [False, True], ids=["the worker alone", "its training too"])
def test_killed_in_the_middle_it_goes_on(protocol, fake, out, whole_group, capsys):
    """SIGKILL while a run trains: the next worker continues that run, and no epoch is trained twice."""
    protocol.write_text(SMALL.replace("trials = 3", "trials = 1"))
    process = start(protocol, out, seconds=2)
    wait_for(lambda: fake.exists() and fake.read_text())
    if whole_group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()  # its child trains on; the run is not begun a second time meanwhile
    process.wait()
    assert run(protocol, out) == 0
    assert ("waiting for other workers" in capsys.readouterr().out) != whole_group
    check_trained_once(fake, trials=1)
    assert values(trials(out), "state") == {"done"}


def test_two_workers_share_the_runs_and_have_cores_of_their_own(protocol, fake, out):
    bound = hasattr(os, "sched_setaffinity") and len(os.sched_getaffinity(0)) > 1
    protocol.write_text(ONE_CORE if bound else SMALL)
    workers = [start(protocol, out, seconds=0.2) for _ in range(2)]
    assert [process.wait(120) for process in workers] == [0, 0]
    check_trained_once(fake)
    assert values(trials(out), "state") == {"done"}
    if bound:
        used = [json.loads(path.read_text())["cores"] for path in out.glob("*/*/config.json")]
        assert {len(cores) for cores in used} == {1}
        assert len({core for cores in used for core in cores}) == 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_without_free_cores_it_says_so(protocol, fake, out, capsys):
    protocol.write_text(ONE_CORE)
    all_cores = os.sched_getaffinity(0)
    with own_cores(len(all_cores)):
        assert run(protocol, out) == 2
        assert f"each worker 1 of this machine's {len(all_cores)} cores, and none is free" in capsys.readouterr().err
        assert run(protocol, out, "--dry-run") == 0  # a dry run needs no cores
    assert run(protocol, out, "--runs", "1") == 0
    assert os.sched_getaffinity(0) == all_cores


def test_the_plan_is_printed_and_leaves_nothing_behind(protocol, fake, out, capsys):
    protocol.write_text(ONE_CORE)
    for runs, said in (
        (0, ["0 of 10 runs", "is not known before a run of each network has ended", "0.8 or 0.9"]),
        (1, ["1 of 10 runs", "left with"]),
        (9, ["10 of 10 runs", "nothing is left to run"]),
    ):
        assert not runs or run(protocol, out, "--runs", str(runs)) == 0
        before = sorted(out.rglob("*"))
        capsys.readouterr()
        assert run(protocol, out, "--dry-run") == 0
        plan = capsys.readouterr().out
        assert all(text in plan for text in [*said, "nothing was trained"])
        assert sorted(out.rglob("*")) == before
        if runs == 1:  # commands are known as soon as the settings are
            assert [row["command"] != "" for row in trials(out)] == [row["stage"] == "tuning" for row in trials(out)]


def test_sigterm_stops_the_training_and_the_worker(protocol, fake, out):
    process = start(protocol, out, seconds=0.5)
    wait_for(lambda: fake.exists() and fake.read_text())
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM


def test_a_training_that_diverges_is_a_result(protocol, fake, out):
    """It is listed with its reason; a contestant whose trials all fail has no final runs, and the rest goes on."""
    protocol.write_text(SMALL.replace("low = 1e-4, high = 1e-1", "low = 10.0, high = 100.0", 1))
    assert run(protocol, out) == 0
    tuned, final = (trials(out, "Adam", stage) for stage in ("tuning", "final"))
    assert [row["state"] for row in tuned] == ["failed"] * 3
    assert values(tuned, "error") == {"the loss is nan at step 3; the checkpoint is in checkpoints"}
    assert {(row["state"], row["command"]) for row in final} == {("open", "")}
    assert [row["state"] for row in trials(out, "AdaBound")] == ["done"] * 5


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("low = 1e-4, high = 1e-1", "low = 1e-7, high = 2e-7", "exit code 2"),
        ("epochs = 2\n", "epochs = 13\n", "ended without a test after epoch 13"),
    ],
)
def test_a_training_that_cannot_be_run_is_none(protocol, fake, out, capsys, old, new, said):
    """Lack of memory or of data says nothing about an optimizer: the study ends, and the next start tries again."""
    protocol.write_text(SMALL.replace(old, new, 1))
    for _ in range(2):
        assert run(protocol, out, "--runs", "1") == 1
        assert said in capsys.readouterr().err
    assert not any(of_study.ended for of_study in Ledger(read_protocol(protocol), out).runs())


def test_another_protocol_in_the_same_folder_is_refused(protocol, fake, out, capsys):
    """Seeds may be added, and trials before the final runs; other changes would mix two studies."""
    protocol.write_text(SMALL.replace("trials = 3", "trials = 2"))
    assert run(protocol, out, "--runs", "3") == 0
    protocol.write_text(SMALL)
    assert run(protocol, out) == 0
    more = SMALL.replace("seeds = [4, 5]", "seeds = [4, 5, 6]")
    protocol.write_text(more)
    assert run(protocol, out, "--runs", "1") == 0
    for old, new, said in (
        ("epochs = 3", "epochs = 4", "adam/seed-4 has epochs 3, this one 4"),
        ("epochs = 2", "epochs = 4", "adam/tuning-000 has epochs 2, this one 4"),
        ('"adam"', '"adamw"', "has opt 'adam', this one 'adamw'"),
        ("high = 1e-1", "high = 1.0", "has learning_rate"),
        ("holdout = 0.1", "holdout = 0.1\nseed = 1", "has learning_rate"),
        ("holdout = 0.1", 'holdout = 0.1\nsampler = "sobol"', "has learning_rate"),
        ("[4, 5, 6]", "[4, 5, 7]", "this one has no run adam/seed-6"),  # 6 came later, and has begun
        ("trials = 3", "trials = 2", "this one has no run adabound/tuning-002"),
        ("trials = 3", "trials = 4", "settings are not chosen again once test results may be known"),
    ):
        assert old in more
        protocol.write_text(more.replace(old, new, 1))
        assert run(protocol, out) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([str(PROTOCOLS / "origins.toml")], "pass --data DIR"),
        ([str(PROTOCOLS / "origins.toml"), "--data", "nosuch"], "--data nosuch is no folder"),
        ([str(PROTOCOLS / "origins.toml"), "--runs", "0"], "--runs must be at least 1"),
    ],
)
def test_bad_input_is_named(capsys, arguments, said):
    assert study.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_without_optuna_it_says_what_to_install():
    """The report only reads files and needs no Optuna."""
    blocked = (
        "import sys; sys.modules.update(optuna=None); import experiments.report.__main__, experiments.study.__main__"
    )
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, cwd=PROTOCOLS.parents[1])
    assert done.returncode == 1
    assert done.stderr.startswith("error: experiments.study needs Optuna")


@pytest.mark.slow
def test_a_real_study_on_drawn_cars(tmp_path, out, capfd):
    """A study of two real optimizers is stopped once by SIGTERM, then ends; a dry run counts 4 of 4."""
    path = tmp_path / "real.toml"
    text = SMALL.replace('image_size = "32"', 'image_size = "32"\nlimit = 64').replace("trials = 3", "trials = 1")
    path.write_text(text.replace("seeds = [4, 5]", "seeds = [4]").replace("epochs = 3", "epochs = 1"))
    process = subprocess.Popen([sys.executable, "-m", "experiments.study", str(path), "--out", str(out)])
    wait_for(lambda: list(out.glob("*/*/metrics.jsonl")), seconds=300)
    process.terminate()
    assert process.wait(120) == 128 + signal.SIGTERM
    assert run(path, out) == 0
    assert values(trials(out), "state") == {"done"}
    capfd.readouterr()
    assert run(path, out, "--dry-run") == 0
    assert "4 of 4 runs" in capfd.readouterr().out
