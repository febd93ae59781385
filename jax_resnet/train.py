"""One jitted training step, one evaluation step, and the state they pass on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from jax_resnet import layers, resnet

Preprocess = Callable[[Array, Array], Array]
Apply = Callable[..., resnet.Output]


@flax.struct.dataclass
class TrainState:
    """Everything a step changes: step, a () int32 count, params, batch_stats and the optimizer's state."""

    step: Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState


def create_train_state(
    params: Any, batch_stats: Any, optimizer: optax.GradientTransformation, *, freeze_backbone: bool = False
) -> TrainState:
    """The state before the first step; freeze_backbone as for `make_train_step`."""
    trained = _trained_part(params, freeze_backbone)
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(trained))


def _trained_part(params: Any, freeze_backbone: bool) -> Any:
    return {"fc": params["fc"]} if freeze_backbone else params


def decay_mask(params: Any) -> Any:
    """True for what weight decay applies to: kernels; not biases, not BatchNorm's weights."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def loss_and_logits(
    config: Any,
    params: Any,
    batch_stats: Any,
    images: Array,
    labels: Array,
    *,
    label_smoothing: float = 0.0,
    train: bool = True,
    apply: Apply = resnet.apply,
    **options: Any,
) -> tuple[Array, tuple[Array, Any]]:
    """The mean training loss, and beside it the logits and the new running statistics: for jax.value_and_grad.

    With label smoothing s the target is 1 - s for the label and s / K for each of the K classes on top (Szegedy et al.
    2016, arXiv:1512.00567).
    """
    out = apply(config, params, batch_stats, images, train=train, **options)
    losses = layers.softmax_cross_entropy(out.logits, labels)
    if label_smoothing:
        uniform = -jax.nn.log_softmax(out.logits).mean(-1)
        losses = (1 - label_smoothing) * losses + label_smoothing * uniform
    return losses.mean(), (out.logits, out.batch_stats)


def make_train_step(
    config: Any,
    optimizer: optax.GradientTransformation,
    *,
    label_smoothing: float = 0.0,
    preprocess: Preprocess = lambda images, step: images,
    apply: Apply = resnet.apply,
    freeze_backbone: bool = False,
    **options: Any,
) -> Callable[[TrainState, Array, Array], tuple[TrainState, dict[str, Array]]]:
    """Builds the jitted training step; it compiles once per shape and consumes (donates) the state it is given.

    Args:
      config: the architecture.
      optimizer: an optax transform; a learning rate that changes belongs in it as a schedule.
      label_smoothing: the share of the target spread over all classes.
      preprocess: (images, step) -> float images, traced into the step: augmentation and normalization.
      apply: the network, `resnet.apply` or another function of that form.
      freeze_backbone: train the dense layer "fc" alone; the rest runs as in evaluation, its running statistics stay.
      options: for `apply`: dtype and remat of `resnet.apply`.

    Returns:
      step(state, images, labels) -> (state, metrics): images as `preprocess` takes them, labels (N,) int32; metrics,
      of the batch before the update, are "loss" and "top1" (the share of right answers), scalars, and "prediction",
      (N,) int32.
    """

    def step(state: TrainState, images: Array, labels: Array) -> tuple[TrainState, dict[str, Array]]:
        def loss_fn(trained):
            return loss_and_logits(
                config,
                {**state.params, **trained},
                state.batch_stats,
                preprocess(images, state.step),
                labels,
                label_smoothing=label_smoothing,
                train=not freeze_backbone,
                apply=apply,
                **options,
            )

        trained = _trained_part(state.params, freeze_backbone)
        (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        params = {**state.params, **optax.apply_updates(trained, updates)}
        prediction = logits.argmax(-1).astype(jnp.int32)
        metrics = {"loss": loss, "top1": (prediction == labels).mean(), "prediction": prediction}
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    return jax.jit(step, donate_argnums=0)


def make_eval_step(
    config: Any,
    *,
    preprocess: Callable[[Array], Array] = lambda images: images,
    apply: Apply = resnet.apply,
    **options: Any,
) -> Callable[[Any, Any, Array, Array], dict[str, Array]]:
    """Builds the jitted evaluation step; arguments as for `make_train_step`, but `preprocess` takes images alone.

    Returns:
      step(params, batch_stats, images, labels) -> per example, each (N,): "loss", "prediction" (int32), "confidence"
      (the prediction's probability) and "top5" (whether the label is among the five largest logits, or all if there
      are fewer).
    """

    def step(params: Any, batch_stats: Any, images: Array, labels: Array) -> dict[str, Array]:
        logits = apply(config, params, batch_stats, preprocess(images), train=False, **options).logits
        _, best = jax.lax.top_k(logits, min(5, logits.shape[1]))
        return {
            "loss": layers.softmax_cross_entropy(logits, labels),
            "prediction": best[:, 0].astype(jnp.int32),
            "confidence": jax.nn.softmax(logits).max(-1),
            "top5": (best == labels[:, None]).any(-1),
        }

    return jax.jit(step)
