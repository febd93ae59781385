"""ResNets in pure-functional JAX, and AdaBound as an optax transform.

    import jax
    import jax_resnet as jr

    config = jr.resnet50(num_classes=10)
    params, batch_stats = jr.init(config, jax.random.key(0))
    out = jr.apply(config, params, batch_stats, images, train=False)  # images (N, H, W, 3) float, normalized
    out.logits                                                        # (N, 10)

`jax_resnet.layers` has the layers, `jax_resnet.weights` reads and writes weight files, `jax_resnet.adabound` has the
optimizers, `jax_resnet.train` the training step, `jax_resnet.checkpoint` the checkpoints of a training run, and
`jax_resnet.nnx` a flax.nnx module. docs/jax.md shows most of them in a few lines.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from jax_resnet.architecture import ResNetConfig, resnet18, resnet34, resnet50, resnet101, resnet152
from jax_resnet.resnet import Output, apply, init

__all__ = [
    "Output",
    "ResNetConfig",
    "apply",
    "init",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
]

if TYPE_CHECKING:  # `__getattr__` imports them when the program runs
    from jax_resnet import adabound, checkpoint, layers, nnx, resnet, step_sizes, train, weights  # noqa: F401

_MODULES = ("adabound", "checkpoint", "layers", "nnx", "resnet", "step_sizes", "train", "weights")


def __getattr__(name: str) -> ModuleType:
    """Imports `jax_resnet.weights` and other modules when they are first used."""
    if name in _MODULES:
        return importlib.import_module(f"jax_resnet.{name}")
    raise AttributeError(f"module 'jax_resnet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
