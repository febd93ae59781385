"""The jitted training and evaluation steps and the training state, for one device or a mesh of several devices."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict
from jax import Array
from jax.sharding import Mesh

from jax_resnet import layers, resnet
from jax_resnet.devices import data_mesh, replicate, shard_batch, shardings

__all__ = [
    "TrainState",
    "create_train_state",
    "data_mesh",
    "decay_mask",
    "loss_and_logits",
    "make_eval_step",
    "make_nonfinite_search",
    "make_train_step",
    "replicate",
    "shard_batch",
]

_Preprocess = Callable[[Array, Array], Array]
_Apply = Callable[..., resnet.Output]
_Loss = Callable[[Array, Array], Array]


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes.

    step: () int32, the number of steps done.
    params, batch_stats, opt_state: the arrays of the network and the state of the optimizer.
    nonfinite: () int32, the number of steps that changed nothing because their loss or gradients were not finite.
    ema: {"params", "batch_stats"}, the exponential moving averages of both; None without averages.
    loss_scale: the factor of the loss for float16, see `create_train_state`; None without a factor.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    nonfinite: Array
    ema: Any = None
    loss_scale: Any = None


# (state, preprocessed images, labels) -> loss, logits, running statistics, gradients of trained parameters, loss scale
_Gradients = Callable[[TrainState, Array, Array], tuple[Array, Array, Any, Any, Any]]


def create_train_state(
    params: Any,
    batch_stats: Any,
    optimizer: optax.GradientTransformation,
    *,
    freeze_backbone: bool = False,
    ema: bool = False,
    loss_scale: Any = None,
) -> TrainState:
    """The state before the first step.

    Args:
      params, batch_stats: as `resnet.init` and `weights.load` return them.
      optimizer, freeze_backbone: as for `make_train_step`.
      ema: whether `make_train_step` gets an ema_decay.
      loss_scale: flax.training.dynamic_scale.DynamicScale(), if `make_train_step` gets dtype=jnp.float16, in which
        small gradients would become 0. The step multiplies the loss by the scale and divides the gradients by it. If
        the gradients overflow, the step only lowers the scale, which grows again later. Such a step counts as done and
        not as nonfinite.
    """
    # The step donates its state: the caller's arrays must survive, and one array cannot be donated twice.
    params, batch_stats = jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, (params, batch_stats))
    trained = _trained_part(params, freeze_backbone)
    averages = jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats}) if ema else None
    nothing = jnp.zeros((), jnp.int32)
    loss_scale = jax.tree.map(lambda x: jnp.array(x, jnp.result_type(x)), loss_scale)  # from Python numbers
    return TrainState(jnp.copy(nothing), params, batch_stats, optimizer.init(trained), nothing, averages, loss_scale)


def _trained_part(params: Any, freeze_backbone: bool) -> Any:
    return {"fc": params["fc"]} if freeze_backbone else params


def decay_mask(params: Any) -> Any:
    """True for the parameters that weight decay applies to: the kernels, but no biases and no BatchNorm weights."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def loss_and_logits(
    config: Any,
    params: Any,
    batch_stats: Any,
    images: Array,
    labels: Array,
    *,
    loss: _Loss = layers.softmax_cross_entropy,
    label_smoothing: float = 0.0,
    train: bool = True,
    apply: _Apply = resnet.apply,
    **options: Any,
) -> tuple[Array, tuple[Array, Any]]:
    """The mean training loss, and as auxiliary data for jax.value_and_grad (logits, new running statistics).

    With label smoothing s, each of the K classes has the target s / K, and the label has 1 - s in addition (Szegedy et
    al. 2016, arXiv:1512.00567).
    """
    out = apply(config, params, batch_stats, images, train=train, **options)
    losses = loss(out.logits, labels)
    if label_smoothing:
        uniform = -jax.nn.log_softmax(out.logits).mean(-1)
        losses = (1 - label_smoothing) * losses + label_smoothing * uniform
    return losses.mean(), (out.logits, out.batch_stats)


def _refuse_unknown(apply: _Apply, options: Mapping[str, Any]) -> None:
    """Raises a TypeError, before the first step, for a keyword that apply does not take."""
    known = list(inspect.signature(apply).parameters.values())[4:]  # after config, params, batch_stats, images
    names = [parameter.name for parameter in known if parameter.name != "train"]
    unknown = [name for name in options if name not in names]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):
        allowed = ", ".join(names) or "no options"
        raise TypeError(f"unknown option {unknown[0]!r}: this function has no such keyword, apply takes {allowed}")


def _make_gradients(
    config: Any, loss: _Loss, label_smoothing: float, apply: _Apply, freeze_backbone: bool, options: dict[str, Any]
) -> _Gradients:
    _refuse_unknown(apply, options)
    if label_smoothing and loss is not layers.softmax_cross_entropy:
        raise ValueError("label_smoothing is for the default loss: with another loss, smooth the labels inside it")

    options = dict(options, loss=loss, label_smoothing=label_smoothing, train=not freeze_backbone, apply=apply)

    def gradients(state: TrainState, images: Array, labels: Array) -> tuple[Array, Array, Any, Any, Any]:
        def loss_fn(trained):
            params = {**state.params, **trained}
            return loss_and_logits(config, params, state.batch_stats, images, labels, **options)

        trained, loss_scale = _trained_part(state.params, freeze_backbone), state.loss_scale
        if loss_scale is None:
            (value, (logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained)
        else:
            scaled = loss_scale.value_and_grad(loss_fn, has_aux=True)
            loss_scale, _, (value, (logits, batch_stats)), grads = scaled(trained)
        return value, logits, batch_stats, grads, loss_scale

    return gradients


def _in_parts(gradients: _Gradients, parts: int, freeze_backbone: bool) -> _Gradients:
    """Computes the gradients of a batch in equal parts, one after the other, and returns the mean over the parts."""

    def split(array: Array) -> Array:
        # Part k has the rows k, k + parts, …, so that each device of a mesh keeps its share of every part.
        return array.reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1)

    def accumulated(state: TrainState, images: Array, labels: Array) -> tuple[Array, Array, Any, Any, Any]:
        if len(labels) % parts:
            raise ValueError(f"a batch of {len(labels)} cannot be computed in {parts} equal parts")

        def add(sums, part):
            batch_stats, grads, loss_scale = sums
            now = state.replace(batch_stats=batch_stats, loss_scale=loss_scale)
            value, logits, batch_stats, part_grads, loss_scale = gradients(now, *part)
            return (batch_stats, jax.tree.map(jnp.add, grads, part_grads), loss_scale), (value, logits)

        zeros = jax.tree.map(jnp.zeros_like, _trained_part(state.params, freeze_backbone))
        (batch_stats, grads, loss_scale), (losses, logits) = jax.lax.scan(
            add, (state.batch_stats, zeros, state.loss_scale), (split(images), split(labels))
        )
        grads = jax.tree.map(lambda g: g / parts, grads)
        return losses.mean(), logits.swapaxes(0, 1).reshape(len(labels), -1), batch_stats, grads, loss_scale

    return accumulated


def _unless_nonfinite(
    state: TrainState, changed: TrainState, loss_scale: Any, finite: Array, failed: Array, skip_nonfinite: int
) -> TrainState:
    """Returns `changed` if it is finite and at most skip_nonfinite steps failed, else `state`. Updates the counts."""
    running = state.nonfinite <= skip_nonfinite
    nonfinite = state.nonfinite + (running & failed)
    kept = jax.tree.map(lambda new, old: jnp.where(finite & running, new, old), changed, state)
    scale = jax.tree.map(lambda new, old: jnp.where(running, new, old), loss_scale, state.loss_scale)
    return kept.replace(step=state.step + (nonfinite <= skip_nonfinite), nonfinite=nonfinite, loss_scale=scale)


def make_train_step(
    config: Any,
    optimizer: optax.GradientTransformation,
    *,
    loss: _Loss = layers.softmax_cross_entropy,
    label_smoothing: float = 0.0,
    preprocess: _Preprocess = lambda images, step: images,
    apply: _Apply = resnet.apply,
    freeze_backbone: bool = False,
    accumulate: int = 1,
    ema_decay: float | None = None,
    skip_nonfinite: int = 0,
    mesh: Mesh | None = None,
    **options: Any,
) -> Callable[[TrainState, Array, Array], tuple[TrainState, dict[str, Array]]]:
    """Builds the jitted training step. The step compiles once per shape and donates (consumes) its state.

    A step whose loss or gradients are not finite changes no weight, no statistic and no optimizer state. The first
    skip_nonfinite such steps still count as steps. After one more, the state never changes again, so a caller that
    reads the metrics late still has the last good state.

    Args:
      config: the architecture.
      optimizer: an optax transform. For a learning rate that changes, give the transform a schedule.
      loss: (logits, labels) -> losses, (N,), whose mean is minimized. With a loss other than the default, labels may
        also be targets, (N, num_classes), of which the largest marks the right class.
      label_smoothing: the share of the target that is spread over all classes, for the default loss.
      preprocess: (images, step) -> float images, for augmentation and normalization; traced into the step.
      apply: the network, `resnet.apply` or another function with this signature.
      freeze_backbone: whether to train only the dense layer "fc". The other layers run as in evaluation and keep their
        running statistics.
      accumulate: the number of parts into which a batch is split. They run one after the other, which takes less
        memory, and their gradients are averaged. Without BatchNorm this is the gradient of the whole batch. BatchNorm
        normalizes each part by the part's own statistics and updates the running statistics once per part.
      ema_decay: keeps moving averages, average = ema_decay * average + (1 - ema_decay) * value, after every step.
      skip_nonfinite: the number of steps that may be not finite, see above.
      mesh: the devices to run on. The state is replicated and the batch is sharded (see `shard_batch`). BatchNorm uses
        the statistics of the whole batch, so results depend on the number of devices by rounding alone.
      options: keywords for `apply`, such as dtype and remat of `resnet.apply`.

    Returns:
      step(state, images, labels) -> (state, metrics), with images as `preprocess` takes them and labels (N,) int32. The
      metrics describe the batch before the update: the scalars "loss", "top1" (the share of right answers), "grad_norm"
      (over all gradients, before the optimizer) and "finite" (whether loss and grad_norm are finite), and "prediction",
      (N,) int32.

    Raises:
      TypeError: an option that apply does not take; raised here.
      ValueError: label_smoothing with a loss other than the default; raised here. The step raises one for a batch
        that accumulate or the number of devices does not divide.
    """
    gradients = _make_gradients(config, loss, label_smoothing, apply, freeze_backbone, options)
    if accumulate > 1:
        gradients = _in_parts(gradients, accumulate, freeze_backbone)

    def step(state: TrainState, images: Array, labels: Array) -> tuple[TrainState, dict[str, Array]]:
        value, logits, batch_stats, grads, loss_scale = gradients(state, preprocess(images, state.step), labels)
        trained = _trained_part(state.params, freeze_backbone)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        params = {**state.params, **optax.apply_updates(trained, updates)}
        averages = state.ema
        if ema_decay is not None:
            new = {"params": params, "batch_stats": batch_stats}
            averages = jax.tree.map(lambda a, b: ema_decay * a + (1 - ema_decay) * b, averages, new)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
        failed = ~finite if loss_scale is None else ~jnp.isfinite(value)  # the scale alone may make gradients overflow
        changed = TrainState(state.step, params, batch_stats, opt_state, state.nonfinite, averages, state.loss_scale)
        new_state = _unless_nonfinite(state, changed, loss_scale, finite, failed, skip_nonfinite)
        prediction = logits.argmax(-1).astype(jnp.int32)
        metrics = {
            "loss": value,
            "top1": (prediction == (labels if labels.ndim == 1 else labels.argmax(-1))).mean(),
            "prediction": prediction,
            "grad_norm": grad_norm,
            "finite": finite,
        }
        return new_state, metrics

    return jax.jit(step, donate_argnums=0, **shardings(mesh, ("state", "batch", "batch")))


def make_nonfinite_search(
    config: Any,
    *,
    loss: _Loss = layers.softmax_cross_entropy,
    label_smoothing: float = 0.0,
    preprocess: _Preprocess = lambda images, step: images,
    apply: _Apply = resnet.apply,
    freeze_backbone: bool = False,
    mesh: Mesh | None = None,
    **options: Any,
) -> Callable[[TrainState, Array, Array], list[str]]:
    """Builds a function that takes the state and the batch of a failed step and names the arrays that are not finite.

    The arguments are those of `make_train_step`. `apply` must take return_activations.

    Returns:
      search(state, images, labels) -> names such as "the pictures", "the weight conv1.weight", "the activation
      layer2.0", "the loss", "the gradient layer1.0.conv1.weight", in execution order. The state is not donated.
    """
    gradients = _make_gradients(config, loss, label_smoothing, apply, freeze_backbone, options)
    options["return_activations"] = True
    names: list[str] = []

    def flags(state: TrainState, images: Array, labels: Array) -> Array:
        images = preprocess(images, state.step)
        value, logits, _, grads, _ = gradients(state, images, labels)
        out = apply(config, state.params, state.batch_stats, images, train=not freeze_backbone, **options)
        found = {"the pictures": images}
        for kind, tree in (("weight", state.params), ("statistic", state.batch_stats), ("activation", out.activations)):
            found |= {f"the {kind} {name}": array for name, array in flatten_dict(dict(tree), sep=".").items()}
        found |= {"the logits": logits, "the loss": value}
        found |= {f"the gradient {name}": array for name, array in flatten_dict(dict(grads), sep=".").items()}
        names[:] = found  # set while tracing, because jit sorts the keys of a dict that it returns
        return jnp.stack([~jnp.isfinite(array).all() for array in found.values()])

    jitted = jax.jit(flags, **shardings(mesh, ("state", "batch", "batch")))

    def search(state: TrainState, images: Array, labels: Array) -> list[str]:
        found = jax.device_get(jitted(state, images, labels))
        return [name for name, bad in zip(names, found, strict=True) if bad]

    return search


def make_eval_step(
    config: Any,
    *,
    preprocess: Callable[[Array], Array] = lambda images: images,
    apply: _Apply = resnet.apply,
    mesh: Mesh | None = None,
    **options: Any,
) -> Callable[[Any, Any, Array, Array], dict[str, Array]]:
    """Builds the jitted evaluation step. Arguments are as for `make_train_step`, but `preprocess` takes only images.

    Returns:
      step(params, batch_stats, images, labels) -> a dict of arrays (N,), one value per example: "loss", "prediction"
      (int32), "confidence" (the prediction's probability) and "top5" (whether the label is among the five largest
      logits, or among all if there are fewer).
    """
    _refuse_unknown(apply, options)

    def step(params: Any, batch_stats: Any, images: Array, labels: Array) -> dict[str, Array]:
        logits = apply(config, params, batch_stats, preprocess(images), train=False, **options).logits
        _, best = jax.lax.top_k(logits, min(5, logits.shape[1]))
        return {
            "loss": layers.softmax_cross_entropy(logits, labels),
            "prediction": best[:, 0].astype(jnp.int32),
            "confidence": jax.nn.softmax(logits).max(-1),
            "top5": (best == labels[:, None]).any(-1),
        }

    return jax.jit(step, **shardings(mesh, ("params", "batch_stats", "batch", "batch")))
