"""jax_resnet in the experiments: networks, weights in and out, gradients, optimizers, trainings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.frameworks.common import Array, Arrays, Network, Recipe, ResNet, Training
from experiments.machine import jax_device
from jax_resnet import adabound as bounded
from jax_resnet import layers, resnet, train, weights
from jax_resnet.adabound import AdaBoundState

ADAMS_B2 = 0.999  # the usual default, which make_optimizer does not change


def make_resnet(network: ResNet) -> resnet.ResNetConfig:
    """The configuration that `jax_resnet.resnet.apply` takes."""
    return getattr(resnet, network.arch)(**network.options)


def layer_sizes(
    config: resnet.ResNetConfig, height: int, width: int
) -> Iterator[tuple[resnet.Conv | None, tuple[int, int], tuple[int, int]]]:
    """The convolutions in execution order, and None for the max-pooling after the first.

    Yields:
      each with the height and width of its input and of its output.
    """
    found: list[tuple[resnet.Conv | None, bool]] = [(resnet.stem(config), False), (None, False)]
    for block in resnet.blocks(config):
        found += [(block.projection, True)] if block.projection else []
        found += [(conv, False) for conv in block.convs]
    size = height, width
    for conv, is_shortcut in found:
        stride = conv.stride if conv else 2
        output = -(-size[0] // stride), -(-size[1] // stride)
        yield conv, size, output
        if not is_shortcut:
            size = output


def make_logits(network: ResNet, arrays: Arrays) -> Callable[[Array], Array]:
    """Returns a function images (N, H, W, C) -> logits for evaluation. `arrays` has torchvision's names and layout."""
    config = make_resnet(network)
    params, batch_stats = jax.tree.map(jnp.asarray, weights.from_torch(arrays))

    @jax.jit
    def logits(params: Any, batch_stats: Any, images: jax.Array) -> jax.Array:
        return resnet.apply(config, params, batch_stats, images, train=False).logits

    def run(images: Array) -> Array:
        with jax.default_matmul_precision("highest"):  # on a GPU float32 would be TF32, on a TPU bfloat16
            return np.asarray(logits(params, batch_stats, images))

    return run


def make_gradients(config: resnet.ResNetConfig, *, with_images: bool = False, **options: Any) -> Callable[..., Any]:
    """A jitted function (params, images, batch_stats, labels) -> ((mean loss, Output), gradients).

    Args:
      config: of the network.
      with_images: gradients are (of params, of images) instead of those of params alone.
      options: of `jax_resnet.resnet.apply`, such as train.
    """

    def loss_fn(params: Any, images: jax.Array, batch_stats: Any, labels: jax.Array) -> tuple[jax.Array, resnet.Output]:
        out = resnet.apply(config, params, batch_stats, images, **options)
        return layers.softmax_cross_entropy(out.logits, labels).mean(), out

    return jax.jit(jax.value_and_grad(loss_fn, (0, 1) if with_images else 0, has_aux=True))


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """The optimizer of a recipe, with the recipe's scaling and clipping of gradients before it."""
    experiment, rate, momentum = recipe.experiment, recipe.schedule, recipe.experiment.momentum
    decay = dict(weight_decay=experiment.weight_decay, mask=train.decay_mask)
    l2 = optax.add_decayed_weights(**decay) if experiment.weight_decay else optax.identity()
    match experiment.opt:
        case "adabound" | "amsbound" | "adaboundw":
            bounds = dict(final_lr=experiment.final_lr, gamma=experiment.gamma, base_lr=experiment.learning_rate)
            optimizer = getattr(bounded, experiment.opt)(rate, b1=momentum, **bounds, **decay)
        case "adamw":
            optimizer = optax.adamw(rate, b1=momentum, **decay)
        case "sgd":
            trace = optax.chain(optax.scale(1 - experiment.dampening), optax.trace(momentum))
            optimizer = optax.chain(l2, trace, optax.scale_by_learning_rate(rate))
        case "adam" | "amsgrad":
            optimizer = optax.chain(l2, getattr(optax, experiment.opt)(rate, b1=momentum))
    if experiment.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(experiment.clip_norm), optimizer)
    return optimizer if experiment.loss_scale == 1 else optax.chain(optax.scale(experiment.loss_scale), optimizer)


def moments_of(opt_state: optax.OptState) -> AdaBoundState:
    """The moments in the state of any optimizer of `make_optimizer` but SGD, however deeply they are nested."""
    if (found := optax.tree.get(opt_state, "AdaBoundState")) is not None:
        return found
    if (adam := optax.tree.get(opt_state, "ScaleByAdamState")) is not None:
        return AdaBoundState(adam.count, adam.mu, adam.nu, None)
    amsgrad = optax.tree.get(opt_state, "ScaleByAmsgradState")
    # optax's nu_max includes the bias correction, AdaBoundState's does not: the current correction is taken out.
    correction = -np.expm1(int(amsgrad.count) * np.log(ADAMS_B2))  # 1 - ADAMS_B2**count, to full precision
    nu_max = jax.tree.map(lambda v: v * float(correction), amsgrad.nu_max)
    return AdaBoundState(amsgrad.count, amsgrad.mu, amsgrad.nu, nu_max)


def make_training(network: Network, recipe: Recipe) -> Training:
    """See `experiments.frameworks.common.make_training`."""
    experiment, frozen = recipe.experiment, recipe.freeze_backbone
    config, apply = network.jax
    optimizer = make_optimizer(recipe)
    dtype = experiment.weights_dtype
    trees = jax.tree.map(lambda a: jnp.asarray(a, dtype), (network.params, network.batch_stats))
    state = train.create_train_state(*trees, optimizer, freeze_backbone=frozen, ema=experiment.ema is not None)
    mesh = train.data_mesh(jax.devices()[: recipe.devices]) if recipe.devices > 1 else None
    options = dict(apply=apply, mesh=mesh)
    if experiment.remat:
        options["remat"] = True
    if experiment.precision == "bfloat16":
        options["dtype"] = jnp.bfloat16
    step_options = options | dict(
        label_smoothing=experiment.label_smoothing, preprocess=recipe.preprocess_train, freeze_backbone=frozen
    )
    train_step = train.make_train_step(
        config,
        optimizer,
        accumulate=experiment.accumulate,
        ema_decay=experiment.ema,
        skip_nonfinite=recipe.skip_nonfinite,
        **step_options,
    )

    def place(state: Any) -> Any:
        return train.replicate(state, mesh) if mesh else jax.tree.map(jnp.asarray, state)

    def put(images: Array, labels: Array) -> tuple[Any, Any]:
        return train.shard_batch((images, labels), mesh) if mesh else (jnp.asarray(images), jnp.asarray(labels))

    return Training(
        experiment.framework,
        place(state),
        train_step,
        train.make_eval_step(config, preprocess=recipe.preprocess_test, **options),
        jax_device() | {"used": recipe.devices},
        network.to_torch,
        lambda state: moments_of(state.opt_state),
        put,
        place,
        lambda state: None if state.ema is None else (state.ema["params"], state.ema["batch_stats"]),
        train.make_nonfinite_search(config, **step_options),
    )
