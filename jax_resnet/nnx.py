"""A thin flax.nnx module around `resnet.init` and `resnet.apply`.

Its parameters are nnx.Param and its running statistics nnx.BatchStat, in one tree whose paths joined by "." are
torchvision's names. It computes nothing itself.

    config = resnet.resnet50()
    model = ResNet(config, weights.load("resnet50.pth", config))    # or ResNet(config, rngs=nnx.Rngs(0))
    logits = model(images, train=False)
    pooled = model.features(images, train=False)["pool"]            # (N, 2048)
    model.fc = nnx.Linear(2048, 196, rngs=nnx.Rngs(0))              # a head of your own: any module that takes them
    kernel = model.layer3[0].downsample[0].weight                   # an nnx.Param, (1, 1, 512, 1024)
    weights.save("resnet50.safetensors", *model.arrays())

For another number of classes of the network's own head give `weights.load` a configuration with it, head="new" and a
key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from jax_resnet import resnet


def _at_least_float32(array: Array) -> Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


class Part(nnx.Module):
    """A stage, a block or a layer: parts and variables are its attributes, those named by a number its items too."""

    def __init__(self, parts: Mapping[str, Any]):
        for name, value in parts.items():
            setattr(self, name, Part(value) if isinstance(value, Mapping) else value)

    def __getitem__(self, number: int) -> Any:
        try:
            return getattr(self, str(number))
        except AttributeError as error:
            raise IndexError(f"there is no part number {number}") from error


class ResNet(Part):
    """A ResNet as a flax.nnx module.

    Args:
      config: the architecture; the attribute of that name.
      arrays: (params, batch_stats) as `resnet.init` and `weights.load` return them; what is narrower than float32
        becomes float32.
      rngs: draws the arrays by `resnet.init` where there are none, with its stream "params".

    Raises:
      ValueError: if there is neither arrays nor rngs.
    """

    def __init__(
        self,
        config: resnet.ResNetConfig,
        arrays: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ):
        if arrays is None:
            if rngs is None:
                raise ValueError("pass arrays, (params, batch_stats), or rngs to draw them")
            arrays = resnet.init(config, rngs.params())
        variables = {
            name: kind(_at_least_float32(jnp.asarray(array)))
            for kind, tree in zip((nnx.Param, nnx.BatchStat), arrays, strict=True)
            for name, array in flatten_dict(dict(tree), sep=".").items()
        }
        super().__init__(unflatten_dict(variables, sep="."))
        self.config = config

    def arrays(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(params, batch_stats), nested dicts as `resnet.apply` and `weights.save` take them; without "fc" if that is a
        module of your own."""
        params, batch_stats = (nnx.to_pure_dict(nnx.state(self, kind)) for kind in (nnx.Param, nnx.BatchStat))
        if not isinstance(self.fc, Part):
            for tree in (params, batch_stats):
                tree.pop("fc", None)
        return params, batch_stats

    def __call__(self, images: Array, *, train: bool, **options: Any) -> Array:
        """The logits, (N, num_classes); with train=True the running statistics are updated in place.

        Args:
          images: (N, H, W, in_channels) float, normalized.
          train: as for `resnet.apply`.
          options: dtype and remat of `resnet.apply`.
        """
        if isinstance(self.fc, Part):
            return self._apply(images, train=train, **options).logits
        return self.fc(self.features(images, train=train, **options)["pool"])

    def features(self, images: Array, *, train: bool, **options: Any) -> dict[str, Array]:
        """The activations by name, {"stem", "layer1.0", ..., "layer4.2", "pool"}; arguments and effect as a call's."""
        return self._apply(images, train=train, return_activations=True, **options).activations

    def _apply(self, images: Array, *, train: bool, **options: Any) -> resnet.Output:
        params, batch_stats = self.arrays()
        if "fc" not in params:  # apply wants one; its logits are not asked for
            classes = self.config.num_classes
            zeros = {"weight": (resnet.feature_channels(self.config), classes), "bias": (classes,)}
            params["fc"] = {name: jnp.zeros(shape) for name, shape in zeros.items()}
        out = resnet.apply(self.config, params, batch_stats, images, train=train, **options)
        if train:
            nnx.update(self, out.batch_stats)
        return out
