"""`jax.export` of a network with symbolic sizes, for CPU, GPU and TPU."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jax_resnet as jr
from jax_resnet import layers

PLATFORMS = ("cpu", "cuda", "tpu")
CONFIG = jr.ResNetConfig("bottleneck", (1, 1, 1, 1), num_classes=3)


@pytest.fixture(scope="module")
def arrays():
    return jr.init(CONFIG, jax.random.key(0))


def infer(params, batch_stats, images):
    return jr.apply(CONFIG, params, batch_stats, images, train=False).logits


def gradients(params, batch_stats, images):
    def loss(params):
        out = jr.apply(CONFIG, params, batch_stats, images, train=True)
        return layers.softmax_cross_entropy(out.logits, jnp.zeros(images.shape[:1], int)).mean(), out.batch_stats

    return jax.value_and_grad(loss, has_aux=True)(params)


def pictures(*shape):
    return jax.random.normal(jax.random.key(1), (*shape, 3))


def exported(function, arrays, shape, constraints=()):
    images = jax.ShapeDtypeStruct(export.symbolic_shape(shape, constraints=constraints), jnp.float32)
    specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)
    return export.export(jax.jit(function), platforms=PLATFORMS)(*specs, images)


@pytest.mark.parametrize(
    ("function", "shape", "sizes"),
    [
        (infer, "n, 40, 32, 3", [(1, 40, 32), (5, 40, 32)]),
        (infer, "n, h, w, 3", [(2, 32, 32), (3, 47, 64)]),
        (gradients, "n, 33, 40, 3", [(2, 33, 40), (5, 33, 40)]),
    ],
    ids=["inference N", "inference N, H, W", "training N"],
)
def test_symbolic_sizes(function, shape, sizes, arrays):
    """Results are those of fixed sizes; 1e-5 of an array's largest entry is for rounding in float32."""
    constraints = ("h >= 32", "w >= 32") if "h" in shape else ()
    program = exported(function, arrays, shape, constraints)
    assert program.platforms == PLATFORMS
    for size in sizes:
        images = pictures(*size)
        found = jax.tree.leaves(program.call(*arrays, images))
        for ours, theirs in zip(found, jax.tree.leaves(jax.jit(function)(*arrays, images)), strict=True):
            assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_another_process_serves_it_without_this_package(arrays, tmp_path):
    """The program's file is enough; 1e-5 of the largest logit is for another compilation."""
    serve = functools.partial(infer, *arrays)
    shape = export.symbolic_shape("n, 32, 32, 3")
    program = export.export(jax.jit(serve), platforms=PLATFORMS)(jax.ShapeDtypeStruct(shape, jnp.float32))
    (tmp_path / "network.stablehlo").write_bytes(program.serialize())
    images = pictures(3, 32, 32)
    np.save(tmp_path / "images.npy", images)
    code = """
import sys, numpy as np, jax.export
with open("network.stablehlo", "rb") as file:
    program = jax.export.deserialize(bytearray(file.read()))
np.save("logits.npy", program.call(np.load("images.npy")))
assert "jax_resnet" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=300)
    expected = jax.jit(serve)(images)
    assert np.abs(np.load(tmp_path / "logits.npy") - expected).max() <= 1e-5 * np.abs(expected).max()


def test_small_images_are_refused_where_that_is_known(arrays):
    with pytest.raises(ValueError, match="at least 32x32"):
        exported(infer, arrays, "n, h, 31, 3")
