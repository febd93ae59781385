"""jax_resnet.checkpoint: checkpoints are bit-exact and asynchronous, and damage is noticed."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import same

from jax_resnet import resnet
from jax_resnet.adabound import amsbound
from jax_resnet.checkpoint import CheckpointError, Checkpoints, DamagedError, MismatchError
from jax_resnet.train import create_train_state, make_train_step

CONFIG = resnet.ResNetConfig("basic", (1, 1, 1, 1), num_classes=3, in_channels=1)


def state_of(optimizer, ema=True):
    return create_train_state(*resnet.init(CONFIG, jax.random.key(0)), optimizer, ema=ema)


@pytest.fixture(scope="module")
def small():
    """A state with all types that occur, and values that a copy may lose."""
    rng = np.random.default_rng(0)
    return {
        "params": {"fc": {"weight": rng.standard_normal((50, 40)).astype(np.float32)}},
        "moments": (jnp.asarray([1.5, jnp.nan, -0.0, jnp.inf], jnp.bfloat16), np.float64(1) / np.arange(1, 9)),
        "count": np.asarray(7, np.int32),
        "nothing": (optax.EmptyState(), None),
    }


@pytest.fixture(scope="module")
def written(small, tmp_path_factory):
    """Checkpoints 3 and 5."""
    folder = tmp_path_factory.mktemp("checkpoints") / "a b é [*"
    checkpoints = Checkpoints(folder)
    checkpoints.save(3, small, {"epoch": 1})
    checkpoints.save(5, small, {"epoch": 2, "loss": 0.1 + 0.2})
    checkpoints.close()
    return folder


def test_a_checkpoint_is_the_state_to_the_bit(small, written):
    restored = Checkpoints(written).restore(5, small)
    assert restored.step == 5
    assert restored.facts == {"epoch": 2, "loss": 0.1 + 0.2}
    same(restored.state, small)


def test_the_step_after_a_save_may_consume_the_state(tmp_path):
    """The write goes on while later steps overwrite the donated buffers; the checkpoint has the state from before."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), amsbound(1e-3))
    state, step = state_of(optimizer), make_train_step(CONFIG, optimizer, ema_decay=0.9)
    images, labels = jnp.ones((2, 32, 32, 1)), jnp.asarray([0, 1])
    state, _ = step(state, images, labels)
    template, expected = state_of(optimizer), jax.tree.map(np.array, state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    for _ in range(3):
        state, _ = step(state, images, labels)
    jax.block_until_ready(state)
    checkpoints.close()
    same(checkpoints.restore(1, template).state, expected)


def test_facts_may_change_after_a_save(small, tmp_path):
    """Facts are written while the training goes on: a list that grows meanwhile must not spoil the checkpoint."""
    checkpoints = Checkpoints(tmp_path)
    losses: list[int] = []
    for step in range(1, 6):
        losses.append(step)
        checkpoints.save(step, small, {"losses": losses})
        losses.extend([0] * 1000)
        checkpoints.wait()
        assert checkpoints.restore(step, small).facts == {"losses": losses[:-1000]}
    checkpoints.close()


KEPT = {  # steps with their scores, how many are kept, whether each is saved in a process of its own, what stays
    "the last and the best": ([(1, 0.2), (2, 0.9), (3, None), (4, 0.5), (5, None), (6, 0.3)], 2, False, [2, 5, 6]),
    "the best of another process": ([(1, 0.9), (2, None), (3, 0.3), (4, None)], 2, True, [1, 3, 4]),
    "a step that took its score later": ([(1, None), (1, 0.9), (2, 0.5), (3, None), (4, None)], 1, True, [1, 4]),
}


@pytest.mark.parametrize(("saves", "keep", "reopened", "kept"), KEPT.values(), ids=KEPT)
def test_which_steps_stay(saves, keep, reopened, kept, small, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=keep)
    for step, score in saves:
        if reopened:
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path, keep=keep)
        checkpoints.save(step, small, {}, score=score)
    checkpoints.close()
    assert checkpoints.steps() == kept


def test_a_step_that_is_there_stays_unless_it_is_damaged(small, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, small, {"epoch": 1})
    checkpoints.save(1, small, {"epoch": 2}, score=0.5)
    checkpoints.save(2, small, {})
    checkpoints.save(3, small, {})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3]
    assert checkpoints.restore(1, small).facts == {"epoch": 1}
    (tmp_path / "3" / "record.json").write_bytes(b"{")
    checkpoints.save(3, small, {"epoch": 4})
    checkpoints.close()
    assert checkpoints.restore(3, small).facts == {"epoch": 4}


def test_another_structure_shape_or_type_is_refused(small, written):
    checkpoints = Checkpoints(written)
    wide = small | {"params": {"fc": {"weight": np.zeros((50, 41), np.float32)}}}
    with pytest.raises(
        MismatchError, match=r"1 arrays differ, the first is params.fc.weight: \(50, 40\) float32 there"
    ):
        checkpoints.restore(5, wide)
    with pytest.raises(MismatchError, match=r"count: \(\) int32 there, \(\) int16 here"):
        checkpoints.restore(5, small | {"count": np.asarray(7, np.int16)})
    with pytest.raises(MismatchError, match=r"new: none there, \(\) int32 here"):
        checkpoints.restore(5, small | {"new": np.asarray(7, np.int32)})


def damage(path, how):
    data = path.read_bytes()
    if how == "flipped":
        path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_every_damaged_file_is_noticed_or_not_needed(how, small, written, tmp_path, capfd):
    """Whatever happens to a file, either the checkpoint is refused or everything that comes back is right."""
    files = [path.relative_to(written) for path in (written / "5").rglob("*") if path.is_file()]
    refused = 0
    for file in files:
        copy = tmp_path / "copy"
        shutil.copytree(written, copy)
        damage(copy / file, how)
        try:
            restored = Checkpoints(copy).restore(5, small)
        except DamagedError as error:
            assert str(error).startswith(f"{copy / '5'} is damaged: ")  # noqa: PT017 (or it is none)
            assert "\n" not in str(error)  # noqa: PT017
            refused += 1
        else:
            same(restored.state, small)
            assert restored.facts == {"epoch": 2, "loss": 0.1 + 0.2}
        shutil.rmtree(copy)
    assert refused == 2  # the record and the arrays
    assert "Traceback" not in capfd.readouterr().err


def test_facts_are_checked_too(small, written, tmp_path):
    shutil.copytree(written, tmp_path / "copy")
    record = tmp_path / "copy" / "5" / "record.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"facts": {"epoch": 3}}))
    with pytest.raises(DamagedError, match=r"record\.json differs from what was written"):
        Checkpoints(tmp_path / "copy").restore(5, small)


def test_what_a_kill_leaves_is_listed_and_removed_by_the_next_save(small, written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    (tmp_path / "run" / "7.unfinished").mkdir()
    (tmp_path / "run" / "1.removed").mkdir()
    checkpoints = Checkpoints(tmp_path / "run")
    assert [path.name for path in checkpoints.unfinished()] == ["7.unfinished"]
    assert checkpoints.steps() == [3, 5]
    checkpoints.save(7, small, {})
    checkpoints.close()
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["5", "7"]


def test_nothing_is_written_before_the_first_save(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.steps() == []
    checkpoints.wait()
    checkpoints.close()
    assert not (tmp_path / "run").exists()


FULL_DISK = """
import resource, sys
import numpy as np
from jax_resnet.checkpoint import CheckpointError, Checkpoints
small, large = {"a": np.ones(9)}, {"a": np.random.default_rng(0).random(10**6)}
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, small, {})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, resource.RLIM_INFINITY))  # as a full disk: writes fail half-way
for step in (2, 3):
    try:
        checkpoints.save(step, large, {})
        checkpoints.wait()
    except CheckpointError as error:
        print(error)
print(checkpoints.steps(), checkpoints.unfinished())
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoints.save(4, large, {})
checkpoints.close()
print(checkpoints.steps(), np.array_equal(checkpoints.restore(4, large).state["a"], large["a"]))
"""


def test_a_full_disk_keeps_the_last_good_one_and_the_next_may_succeed(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stderr
    assert not done.stderr
    for line in lines[:2]:
        assert f"could not be written ({os.strerror(errno.EFBIG)})" in line
        assert line.endswith(f"the latest complete one is {tmp_path / 'run' / '1'}")
    assert lines[2:] == ["[1] []", "[1, 4] True"]


def test_a_folder_that_cannot_be_made_is_a_checkpoint_error(small, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"the checkpoint of step 1 could not be written .*no earlier one"):
        Checkpoints(tmp_path / "file" / "run").save(1, small, {})


def test_keep_is_at_least_one(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1"):
        Checkpoints(tmp_path, keep=0)
