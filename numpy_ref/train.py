"""A training step, an evaluation step and the training state: `jax_resnet.train` in NumPy.

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
    """Everything that a step changes: the step count, params, batch_stats and the optimizer's state."""

    step: int
    params: Any
    batch_stats: Any
    opt_state: Any


def create_train_state(
    params: Any, batch_stats: Any, optimizer: GradientTransformation, *, freeze_backbone: bool = False
) -> TrainState:
    """Returns the state before the first step. Pass the same freeze_backbone as to `make_train_step`."""
    return TrainState(0, params, batch_stats, optimizer.init(_trained_part(params, freeze_backbone)))


def _trained_part(params: Any, freeze_backbone: bool) -> Any:
    return {"fc": params["fc"]} if freeze_backbone else params


def smoothed_cross_entropy(logits: Array, labels: Array, label_smoothing: float) -> tuple[Array, layers.Vjp]:
    """Cross-entropy whose target is s / K for each of the K classes, plus 1 - s for the label.

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
    # The mean of -log softmax over all classes is -log softmax of the label + (the label's logit - the mean logit).
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
      label_smoothing: the share of the target that is spread over all classes.
      preprocess: (images, step) -> float images.
      apply: the network, `resnet.apply` or a function with the same arguments and results.
      freeze_backbone: whether to train only the dense layer "fc", whose input is the activation "pool". The network
        then runs in evaluation mode and keeps its running statistics.

    Returns:
      step(state, images, labels) -> (state, metrics). images are the input of `preprocess`; labels are (N,) int.
      metrics has the scalars "loss" and "top1" (the share of correct predictions) and "prediction", (N,), all from
      before the update. The step does not change its arguments. Overflow gives inf or nan without a warning, so check
      the loss.
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
    """Returns the output in training mode, and vjp: dlogits -> gradients of all parameters."""
    out, vjp = apply(config, state.params, state.batch_stats, images, train=True)
    return out, lambda dlogits: vjp(dlogits)[0]


def _forward_head(apply: Apply, config: Any, state: TrainState, images: Array) -> tuple[resnet.Output, Callable]:
    """Returns the output in evaluation mode, and vjp: dlogits -> gradients of the dense layer only."""
    out, _ = apply(config, state.params, state.batch_stats, images, train=False, return_activations=True)
    _, vjp_dense = layers.dense(out.activations["pool"], **state.params["fc"])

    def vjp(dlogits: Array) -> Any:
        _, dweight, dbias = vjp_dense(dlogits)
        return {"fc": {"weight": dweight, "bias": dbias}}

    return out, vjp


def make_eval_step(
    config: Any, *, preprocess: Callable[[Array], Array] = lambda images: images, apply: Apply = resnet.apply
) -> Callable[[Any, Any, Array, Array], dict[str, Array]]:
    """Builds the evaluation step. Arguments are those of `make_train_step`, but `preprocess` takes only images.

    Returns:
      step(params, batch_stats, images, labels) -> a dict of arrays (N,): "loss", "prediction", "confidence" (the
      prediction's probability) and "top5" (whether the label has one of the five largest logits). With at most five
      classes, "top5" is always true.
    """

    @np.errstate(over="ignore", invalid="ignore")
    def step(params: Any, batch_stats: Any, images: Array, labels: Array) -> dict[str, Array]:
        out, _ = apply(config, params, batch_stats, preprocess(images), train=False)
        best = np.argsort(-out.logits, axis=1, kind="stable")[:, :5]  # stable: the first of equal logits comes first
        losses, _ = layers.softmax_cross_entropy(out.logits, labels)
        least_losses, _ = layers.softmax_cross_entropy(out.logits, best[:, 0])
        return {
            "loss": losses,
            "prediction": best[:, 0],
            "confidence": np.exp(-least_losses),
            "top5": (best == labels[:, None]).any(1),
        }

    return step
