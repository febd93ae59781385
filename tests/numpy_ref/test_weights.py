"""numpy_ref.weights: the files of jax_resnet.weights and of torchvision, bit for bit."""

import os

import jax
import numpy as np
import pytest
import safetensors.numpy
from trees import same

from jax_resnet import resnet as jax_resnet
from jax_resnet import weights as jax_weights
from numpy_ref import resnet, weights

SETTINGS = {"num_classes": 5, "in_channels": 1}
CONFIG, JAX_CONFIG = resnet.resnet18(**SETTINGS), jax_resnet.resnet18(**SETTINGS)

every_suffix = pytest.mark.parametrize("suffix", weights.SUFFIXES)


@pytest.fixture(scope="module")
def tree():
    return resnet.init(CONFIG, np.random.default_rng(0))


def converted(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


# The same files as JAX's.


@every_suffix
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_files_are_those_of_jax(suffix, dtype, tree, tmp_path):
    """Files are equal byte for byte, and each side reads the other's."""
    tree = converted(tree, dtype)
    ours, theirs = tmp_path / f"ours{suffix}", tmp_path / f"theirs{suffix}"
    weights.save(ours, *tree)
    jax_weights.save(theirs, *tree)
    assert ours.read_bytes() == theirs.read_bytes()
    same(weights.load(theirs, CONFIG), tree)
    # JAX's reader widens what is narrower than float32.
    same(jax_weights.load(ours, JAX_CONFIG), converted(tree, np.promote_types(dtype, np.float32)))


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_names_and_shapes_are_those_of_jax(name, batch_norm):
    """`load` expects the names and shapes that JAX's `init` makes; nothing is drawn."""
    settings = SETTINGS | {"batch_norm": batch_norm}
    config = getattr(jax_resnet, name)(**settings)
    expected = jax.eval_shape(lambda: jax_resnet.init(config, jax.random.key(0)))
    assert resnet.shapes(getattr(resnet, name)(**settings)) == jax.tree.map(lambda x: x.shape, expected)


def test_metadata(tree, tmp_path):
    weights.save(tmp_path / "a.safetensors", *tree, metadata={"class_names": "[]"})
    assert jax_weights.read_file(tmp_path / "a.safetensors").metadata == {"class_names": "[]"}
    with pytest.raises(ValueError, match=r"only \.safetensors files hold metadata, got .*a\.npz"):
        weights.save(tmp_path / "a.npz", *tree, metadata={"a": "b"})


def test_batch_counts_of_torch_are_ignored(tree, tmp_path):
    arrays = weights.to_torch(*tree) | {"bn1.num_batches_tracked": np.array(7)}
    same(weights.from_torch(arrays), tree)
    np.savez(tmp_path / "theirs.npz", **arrays)
    same(weights.load(tmp_path / "theirs.npz", CONFIG), tree)


def test_arrays_are_contiguous_copies(tree):
    arrays = weights.to_torch(*tree)
    back = weights.from_torch(arrays)
    for ours, given in ((arrays, tree), (back, arrays)):
        for array in jax.tree.leaves(ours):
            assert array.flags.c_contiguous
            assert not any(np.shares_memory(array, other) for other in jax.tree.leaves(given))


# What does not fit, and what goes wrong.


@every_suffix
def test_all_that_does_not_fit_is_listed_once(suffix, tree, tmp_path):
    arrays = weights.to_torch(*tree)
    del arrays["bn1.bias"], arrays["layer4.1.bn2.running_var"]
    arrays["extra"] = np.zeros(3, np.float32)
    arrays["conv1"] = np.zeros(2, np.float32)  # where the tree has a dict
    arrays["layer1.0.conv1.weight"] = arrays["layer1.0.conv1.weight"].transpose(2, 3, 1, 0).copy()
    arrays["fc.weight"] = arrays["fc.weight"].T.copy()
    path = tmp_path / f"a{suffix}"
    if suffix == ".npz":
        np.savez(path, **arrays)
    else:
        safetensors.numpy.save_file(arrays, path)
    with pytest.raises(ValueError, match="does not fit") as error:
        weights.load(path, CONFIG)
    first, *problems = str(error.value).splitlines()
    assert first == f"{path} does not fit {CONFIG}, 6 problems:"
    assert sorted(problem.strip() for problem in problems) == [
        "fc.weight: expected (5, 512), the file has (512, 5)",
        "layer1.0.conv1.weight: expected (64, 64, 3, 3), the file has (3, 3, 64, 64)",
        "missing: bn1.bias (64,)",
        "missing: layer4.1.bn2.running_var (512,)",
        "unexpected: conv1 (2,)",
        "unexpected: extra (3,)",
    ]


def test_bad_files_are_named(tree, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no weight file .*none\.npz"):
        weights.load(tmp_path / "none.npz", CONFIG)
    for call in (lambda path: weights.load(path, CONFIG), lambda path: weights.save(path, *tree)):
        with pytest.raises(ValueError, match=r"weight files end in \.safetensors or \.npz, got .*a\.txt"):
            call(tmp_path / "a.txt")
    for suffix in weights.SUFFIXES:
        path = tmp_path / f"cut{suffix}"
        weights.save(path, *tree)
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(ValueError, match=rf"cut\{suffix} is not a readable \{suffix} file"):
            weights.load(path, CONFIG)


def test_pickles_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", **{"conv1.weight": np.array([{}], dtype=object)})
    with pytest.raises(ValueError, match=r"not a readable \.npz file"):
        weights.load(tmp_path / "a.npz", CONFIG)


@every_suffix
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(suffix, tree, tmp_path, monkeypatch):
    path = tmp_path / f"a{suffix}"
    weights.save(path, *tree)
    before = path.read_bytes()

    def disk_full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", disk_full)
    monkeypatch.setattr(safetensors.numpy, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        weights.save(path, *converted(tree, np.float64))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


@every_suffix
def test_a_saved_file_has_the_usual_permissions(suffix, tree, tmp_path):
    (tmp_path / "usual").touch()
    weights.save(tmp_path / f"a{suffix}", *tree)
    assert (tmp_path / f"a{suffix}").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == sorted([f"a{suffix}", "usual"])
