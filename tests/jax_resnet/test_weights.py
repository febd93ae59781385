"""jax_resnet.weights: torchvision's names and layout, bit for bit, and one clear error for files that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jax_resnet import resnet, weights

CONFIG = resnet.resnet18(num_classes=5, in_channels=1)


@pytest.fixture(scope="module")
def tree():
    return resnet.init(CONFIG, jax.random.key(0))


def same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("suffix", weights.SUFFIXES)
def test_there_and_back(suffix, tree, tmp_path):
    path = tmp_path / f"weights{suffix}"
    weights.save(path, *tree)
    same(weights.load(path, CONFIG), tree)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_layout_is_torchvisions(tree):
    arrays = weights.to_torch(*tree)
    assert arrays["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
    assert arrays["fc.weight"].shape == (5, 512)
    kernel = tree[0]["layer1"]["0"]["conv2"]["weight"]
    assert arrays["layer1.0.conv2.weight"][3, 2, 0, 1] == kernel[0, 1, 2, 3]
    same(weights.from_torch(arrays | {"bn1.num_batches_tracked": np.array(7)}), tree)


def test_metadata(tree, tmp_path):
    weights.save(tmp_path / "a.safetensors", *tree, metadata={"class_names": "[]"})
    assert weights.read_metadata(tmp_path / "a.safetensors") == {"class_names": "[]"}
    with pytest.raises(ValueError, match=r"only \.safetensors files hold metadata"):
        weights.save(tmp_path / "a.npz", *tree, metadata={"a": "b"})


def test_all_that_does_not_fit_is_listed(tree, tmp_path):
    arrays = weights.to_torch(*tree)
    del arrays["bn1.bias"]
    arrays["extra"] = np.zeros(3, np.float32)
    arrays["layer1.0.conv1.weight"] = arrays["layer1.0.conv1.weight"].transpose(2, 3, 1, 0).copy()
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="does not fit") as error:
        weights.load(tmp_path / "a.safetensors", CONFIG)
    assert "missing: bn1.bias (64,)" in str(error.value)
    assert "unexpected: extra (3,)" in str(error.value)
    assert "layer1.0.conv1.weight: expected (64, 64, 3, 3), the file has (3, 3, 64, 64)" in str(error.value)


def test_new_head_and_grey_stem(tmp_path):
    source = resnet.resnet18(num_classes=10, in_channels=3)
    params, batch_stats = resnet.init(source, jax.random.key(1))
    weights.save(tmp_path / "a.npz", params, batch_stats)
    with pytest.raises(ValueError, match=r"conv1.weight: expected \(64, 1, 7, 7\)"):
        weights.load(tmp_path / "a.npz", CONFIG)
    loaded, _ = weights.load(tmp_path / "a.npz", CONFIG, head="new", stem="grey", key=jax.random.key(2))
    kernel = params["conv1"]["weight"]
    np.testing.assert_allclose(loaded["conv1"]["weight"], kernel.sum(2, keepdims=True), rtol=1e-5, atol=1e-7)
    assert loaded["fc"]["weight"].shape == (512, 5)
    np.testing.assert_array_equal(loaded["layer4"]["1"]["bn2"]["weight"], params["layer4"]["1"]["bn2"]["weight"])
    with pytest.raises(ValueError, match="pass key"):
        weights.load(tmp_path / "a.npz", CONFIG, head="new")


def test_bad_files_are_named(tree, tmp_path):
    with pytest.raises(FileNotFoundError, match="no weight file"):
        weights.load(tmp_path / "none.npz", CONFIG)
    with pytest.raises(ValueError, match=r"end in \.safetensors or \.npz"):
        weights.load(tmp_path / "a.txt", CONFIG)
    for suffix in weights.SUFFIXES:
        path = tmp_path / f"cut{suffix}"
        weights.save(path, *tree)
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(ValueError, match=f"not a readable {suffix} file"):
            weights.load(path, CONFIG)


def test_float16_stays_float16(tree, tmp_path):
    half = jax.tree.map(lambda a: a.astype(jnp.float16), tree)
    weights.save(tmp_path / "a.safetensors", *half)
    loaded = weights.load(tmp_path / "a.safetensors", CONFIG)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float16)}
    same(loaded, half)
