"""One training step, one evaluation step, and the state they pass on: `jax_resnet.train` in NumPy.

>>> from numpy_ref import optim
>>> config, optimizer = resnet.resnet18(num_classes=10, in_channels=1), optim.adam(1e-3)
>>> state = create_train_state(*resnet.init(config, np.random.default_rng(0)), optimizer)
>>> step = make_train_step(config, optimizer)
>>> state, metrics = step(state, np.zeros((8, 32, 32, 1), np.float32), np.arange(8))
>>> state.step, metrics["prediction"].shape
(1, (8,))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray as Array

from numpy_ref import layers, resnet
from numpy_ref.optim import GradientTransformation, apply_updates

Apply = Callable[..., tuple[resnet.Output, layers.Vjp]]


class TrainState(NamedTuple):
    """Everything a step changes: the count of steps, params, batch_stats and the optimizer's state."""

    step: int
    params: Any
    batch_stats: Any
    opt_state: Any


def create_train_state(
    params: Any, batch_stats: Any, optimizer: GradientTransformation, *, freeze_backbone: bool = False
) -> TrainState:
    """The state before the first step; freeze_backbone as for `make_train_step`."""
    return TrainState(0, params, batch_stats, optimizer.init(_trained_part(params, freeze_backbone)))


def _trained_part(params: Any, freeze_backbone: bool) -> Any:
    return {"fc": params["fc"]} if freeze_backbone else params


def smoothed_cross_entropy(logits: Array, labels: Array, label_smoothing: float) -> tuple[Array, layers.Vjp]:
    """The cross-entropy with a target of 1 - s for the label and s / K for each of the K classes on top.

    Args:
      logits: (N, K) float.
      labels: (N,) int.
      label_smoothing: s (Szegedy et al. 2016, arXiv:1512.00567).

    Returns:
      losses, (N,), and vjp: dlosses (N,) -> (dlogits,).
    """
    losses, vjp_label = layers.softmax_cross_entropy(logits, labels)
    if not label_smoothing:
        return losses, vjp_label
    s = label_smoothing
    # The mean over all classes of -log softmax is the label's own plus how far its logit is above the mean.
    above = np.take_along_axis(logits, labels[:, None], 1)[:, 0] - logits.mean(1)

    def vjp(dlosses: Array) -> tuple[Array]:
        (dlogits,) = vjp_label(dlosses)
        dabove = s * dlosses[:, None]
        dlogits = dlogits - dabove / logits.shape[1]
        dlogits[np.arange(len(labels)), labels] += dabove[:, 0]
        return (dlogits,)

    return losses + s * above, vjp


def make_train_step(
    config: Any,
    optimizer: GradientTransformation,
    *,
    label_smoothing: float = 0.0,
    preprocess: Callable[[Array, int], Array] = lambda images, step: images,
    apply: Apply = resnet.apply,
    freeze_backbone: bool = False,
) -> Callable[[TrainState, Array, Array], tuple[TrainState, dict[str, Array]]]:
    """Builds the training step.

    Args:
      config: the architecture.
      optimizer: one of `numpy_ref.optim`.
      label_smoothing: the share of the target spread over all classes.
      preprocess: (images, step) -> float images.
      apply: the network, `resnet.apply` or another function of that form.
      freeze_backbone: train the dense layer "fc" alone, which is given the activation "pool"; the rest runs as in
        evaluation, and its running statistics stay.

    Returns:
      step(state, images, labels) -> (state, metrics): images as `preprocess` takes them, labels (N,) int; metrics, of
      the batch before the update, are "loss" and "top1" (the share of right answers), scalars, and "prediction", (N,).
      The state that goes in stays as it is. Numbers that overflow become inf or nan in silence: look at the loss.
    """

    forward = _forward_head if freeze_backbone else _forward

    @np.errstate(over="ignore", invalid="ignore")
    def step(state: TrainState, images: Array, labels: Array) -> tuple[TrainState, dict[str, Array]]:
        images = preprocess(images, state.step)
        out, vjp = forward(apply, config, state, images)
        losses, vjp_loss = smoothed_cross_entropy(out.logits, labels, label_smoothing)
        (dlogits,) = vjp_loss(np.full_like(losses, 1 / len(losses)))  # the training loss is the mean
        grads = vjp(dlogits)
        trained = _trained_part(state.params, freeze_backbone)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        params = {**state.params, **apply_updates(trained, updates)}
        prediction = out.logits.argmax(-1)
        metrics = {"loss": losses.mean(), "top1": (prediction == labels).mean(), "prediction": prediction}
        return TrainState(state.step + 1, params, out.batch_stats, opt_state), metrics

    return step


def _forward(apply: Apply, config: Any, state: TrainState, images: Array) -> tuple[resnet.Output, Callable]:
    """The output in training, and vjp: dlogits -> gradients of all parameters."""
    out, vjp = apply(config, state.params, state.batch_stats, images, train=True)
    return out, lambda dlogits: vjp(dlogits)[0]


def _forward_head(apply: Apply, config: Any, state: TrainState, images: Array) -> tuple[resnet.Output, Callable]:
    """The output in evaluation, and vjp: dlogits -> gradients of the dense layer; none go further back."""
    out, _ = apply(config, state.params, state.batch_stats, images, train=False, return_activations=True)
    _, vjp_dense = layers.dense(out.activations["pool"], **state.params["fc"])

    def vjp(dlogits: Array) -> Any:
        _, dweight, dbias = vjp_dense(dlogits)
        return {"fc": {"weight": dweight, "bias": dbias}}

    return out, vjp


def make_eval_step(
    config: Any, *, preprocess: Callable[[Array], Array] = lambda images: images, apply: Apply = resnet.apply
) -> Callable[[Any, Any, Array, Array], dict[str, Array]]:
    """Builds the evaluation step; arguments as for `make_train_step`, but `preprocess` takes images alone.

    Returns:
      step(params, batch_stats, images, labels) -> per example, each (N,): "loss", "prediction", "confidence" (the
      prediction's probability) and "top5" (whether the label is among the five largest logits, or all if there are
      fewer).
    """

    @np.errstate(over="ignore", invalid="ignore")
    def step(params: Any, batch_stats: Any, images: Array, labels: Array) -> dict[str, Array]:
        out, _ = apply(config, params, batch_stats, preprocess(images), train=False)
        best = np.argsort(-out.logits, axis=1, kind="stable")[:, :5]  # stable: of equal logits the first one wins
        losses, _ = layers.softmax_cross_entropy(out.logits, labels)
        least_losses, _ = layers.softmax_cross_entropy(out.logits, best[:, 0])
        return {
            "loss": losses,
            "prediction": best[:, 0],
            "confidence": np.exp(-least_losses),
            "top5": (best == labels[:, None]).any(1),
        }

    return step
