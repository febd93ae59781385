"""ResNets as flax.nnx modules, which compute what `resnet.apply` computes.

    import jax_resnet as jr
    from flax import nnx
    from jax_resnet.nnx import ResNet

    config = jr.resnet50()
    model = ResNet(config, jr.weights.load("resnet50.pth", config))    # or ResNet(config, rngs=nnx.Rngs(0))
    model.eval()                                                    # a new model starts in training mode, as in flax
    logits = model(images)
    activations = model.features(images)                            # {"stem", "layer1.0", ..., "layer4.2", "pool"}
    again = model.layer4[-1](activations["layer4.1"])               # a block is a module
    model.fc = nnx.Linear(2048, 196, rngs=nnx.Rngs(0))              # another head; None returns the pooled vector
    jr.weights.save("cars.safetensors", *model.arrays())

Parameters are nnx.Param and running statistics nnx.BatchStat. Their paths joined by "." are torchvision's names.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from jax_resnet import cpu, layers, resnet

__all__ = ["Block", "Dense", "Layer", "ResNet"]


class Layer(nnx.Module):
    """The arrays of a convolution or of a BatchNorm. The module around the layer computes with them."""

    def __init__(self, variables: Mapping[str, nnx.Variable]):
        for name, variable in variables.items():
            setattr(self, name, variable)


class Dense(Layer):
    """The dense layer: (N, features) -> (N, num_classes)."""

    weight: nnx.Param
    bias: nnx.Param

    def __call__(self, x: Array) -> Array:
        return layers.dense(x, self.weight[...], self.bias[...])


class _WithMode(nnx.Module):
    """A module that computes with the batch's statistics or with the running ones."""

    use_running_average: bool

    def set_view(self, use_running_average: bool | None = None) -> dict[str, Any]:
        """Sets the mode for `nnx.view`.

        Args:
          use_running_average: whether to normalize with the running statistics; None changes nothing.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        return {}  # Flax 0.12.4 expects the arguments that were not used


class Block(_WithMode):
    """A residual block: conv1, bn1, conv2, ..., and downsample, the list of the shortcut's layers if there are any."""

    def __init__(self, config: resnet.ResNetConfig, block: resnet.Block, variables: Mapping[str, nnx.Variable]):
        self.config = config
        self.convs, self.projection = resnet._without_prefix(block)
        self.use_running_average = False
        for name, layer in _layers(variables).items():
            if not name.startswith("downsample."):
                setattr(self, name, layer)
        if self.projection:
            self.downsample = nnx.List(_layers(variables, "downsample.").values())

    def __call__(self, x: Array, *, train: bool | None = None, dtype: Any = None, remat: bool = False) -> Array:
        """Returns the block's output, (N, H', W', C'). Arguments and effects are those of `ResNet.__call__`."""
        run = functools.partial(
            resnet._residual,
            self.config,
            self.convs,
            self.projection,
            train=_in_training(self, train),
            dtype=dtype,
        )
        y, stats = (cpu.recomputed(run) if remat else run)(x, _flat(self, nnx.Param), _flat(self, nnx.BatchStat))
        _assign(self, stats)
        return y


class ResNet(_WithMode):
    """A ResNet: conv1, bn1, the nnx.Lists of blocks layer1 to layer4, and fc.

    Args:
      config: the architecture, also an attribute.
      arrays: (params, batch_stats) as `resnet.init` and `weights.load` return them. float16 and bfloat16 become
        float32.
      rngs: `resnet.init` draws the arrays with the stream "params" of rngs if arrays is None.

    Raises:
      ValueError: arrays and rngs are both missing, or the arrays do not fit config.
    """

    def __init__(
        self,
        config: resnet.ResNetConfig,
        arrays: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ):
        if isinstance(arrays, nnx.Rngs):
            raise ValueError("arrays must be (params, batch_stats), got nnx.Rngs: pass rngs=")
        if arrays is None:
            if rngs is None:
                raise ValueError("pass arrays, (params, batch_stats), or rngs to draw them")
            arrays = resnet.init(config, rngs.params())
        params, stats = (flatten_dict(dict(tree), sep=".") for tree in arrays)
        resnet._check_names(config, params, stats)
        variables = {name: nnx.Param(_at_least_float32(array)) for name, array in params.items()}
        variables |= {name: nnx.BatchStat(_at_least_float32(array)) for name, array in stats.items()}
        self.config = config
        self.use_running_average = False
        for name in ("conv1", "bn1") if config.batch_norm else ("conv1",):
            setattr(self, name, Layer(_below(variables, f"{name}.")))
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            blocks = [block for block in resnet.blocks(config) if block.name.startswith(stage)]
            modules = [Block(config, block, _below(variables, f"{block.name}.")) for block in blocks]
            setattr(self, stage, nnx.List(modules))
        self.fc = Dense(_below(variables, "fc.")) if config.num_classes else None

    def __call__(self, images: Array, *, train: bool | None = None, dtype: Any = None, remat: bool = False) -> Array:
        """Returns the logits, (N, num_classes), the output of fc; the pooled vector if fc is None.

        Args:
          images: (N, H, W, in_channels) float, normalized.
          train: whether to normalize with the batch's statistics and to update the running statistics in place. None
            takes the mode that model.train() or model.eval() set; a new model is in training mode.
          dtype, remat: as for `resnet.apply`.
        """
        pooled = self.features(images, train=train, dtype=dtype, remat=remat)["pool"]
        return pooled if self.fc is None else self.fc(pooled)

    def features(
        self, images: Array, *, train: bool | None = None, dtype: Any = None, remat: bool = False
    ) -> dict[str, Array]:
        """Returns {name: activation}, with the names "stem", "layer1.0", ..., "layer4.2", "pool".

        Arguments and effects are those of `__call__`.
        """
        resnet._check_images(self.config, images)
        options = {"train": _in_training(self, train), "dtype": dtype}
        x = images if dtype is None else images.astype(dtype)
        arrays = _flat(self, nnx.Param), _flat(self, nnx.BatchStat)
        x, stats = resnet._conv_norm(self.config, resnet.stem(self.config), x, *arrays, **options)
        _assign(self, stats)
        activations = {"stem": (x := layers.max_pool(layers.relu(x)))}
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            for number, block in enumerate(getattr(self, stage)):
                activations[f"{stage}.{number}"] = x = block(x, remat=remat, **options)
        activations["pool"] = layers.global_avg_pool(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        return activations

    def arrays(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns (params, batch_stats), nested dicts as `resnet.apply` and `weights.save` take them.

        "fc" holds the arrays of any head: an nnx.Linear as weight and bias, another module under the module's names.
        """
        trees = (_flat(self, kind) for kind in (nnx.Param, nnx.BatchStat))
        params, batch_stats = ({self._renamed(name): array for name, array in tree.items()} for tree in trees)
        return unflatten_dict(params, sep="."), unflatten_dict(batch_stats, sep=".")

    def load(self, arrays: tuple[Mapping[str, Any], Mapping[str, Any]]) -> None:
        """Replaces all arrays, including those of the head, by trees as `arrays` returns them.

        Raises:
          ValueError: names or shapes differ from those of `arrays`. Nothing is replaced then.
        """
        for new, old in zip(arrays, self.arrays(), strict=True):
            new, old = ({name: np.shape(a) for name, a in flatten_dict(dict(t), sep=".").items()} for t in (new, old))
            if wrong := [name for name in old.keys() | new.keys() if old.get(name) != new.get(name)]:
                raise ValueError(f"these arrays do not fit the model: {len(wrong)} differ, the first is {min(wrong)}")
        for kind, tree in zip((nnx.Param, nnx.BatchStat), arrays, strict=True):
            new = flatten_dict(dict(tree), sep=".")
            _assign(self, {name: _at_least_float32(new[self._renamed(name)]) for name in _flat(self, kind)})

    def _renamed(self, name: str) -> str:
        return "fc.weight" if name == "fc.kernel" and isinstance(self.fc, nnx.Linear) else name


def _at_least_float32(array: Any) -> Array:
    array = jnp.asarray(array)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _in_training(module: Block | ResNet, train: bool | None) -> bool:
    """Whether to run in training mode. nnx.Module's train() and eval() set use_running_average."""
    return not module.use_running_average if train is None else train


def _below(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _layers(variables: Mapping[str, nnx.Variable], prefix: str = "") -> dict[str, Layer]:
    """Returns {"bn1": Layer, …} for the variables "bn1.weight", "bn1.bias", … whose names begin with the prefix."""
    names = dict.fromkeys(name.rpartition(".")[0] for name in variables if name.startswith(prefix))
    return {name: Layer(_below(variables, f"{name}.")) for name in sorted(names)}


def _flat(module: nnx.Module, kind: type[nnx.Variable]) -> dict[str, Array]:
    """Returns {"downsample.0.weight": array, …} for the variables of one kind."""
    state = nnx.to_pure_dict(nnx.state(module, kind))
    return {".".join(map(str, path)): array for path, array in flatten_dict(state).items()}


def _assign(module: nnx.Module, arrays: Mapping[str, Array]) -> None:
    for name, array in arrays.items():
        *path, last = name.split(".")
        part: Any = module
        for step in path:
            part = part[int(step)] if step.isdecimal() else getattr(part, step)
        getattr(part, last)[...] = array
