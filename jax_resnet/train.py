"""One jitted training step, one evaluation step, and the state they pass on; on one device or on a mesh of many."""

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

Preprocess = Callable[[Array, Array], Array]
Apply = Callable[..., resnet.Output]
Loss = Callable[[Array, Array], Array]


class TrainState(flax.struct.PyTreeNode):
    """Everything a step changes.

    step: () int32, the steps done.
    params, batch_stats, opt_state: the network's and the optimizer's.
    nonfinite: () int32, the steps whose loss or gradients were not finite and which therefore changed nothing.
    ema: {"params", "batch_stats"}, their exponential moving averages; None without.
    loss_scale: what the loss is multiplied by for its gradients, see `create_train_state`; None without.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    nonfinite: Array
    ema: Any = None
    loss_scale: Any = None


# (state, preprocessed images, labels) -> loss, logits, running statistics, gradients of the trained part, loss scale
Gradients = Callable[[TrainState, Array, Array], tuple[Array, Array, Any, Any, Any]]


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
      ema: whether the step has an ema_decay.
      loss_scale: flax.training.dynamic_scale.DynamicScale(), for activations in float16 (dtype=jnp.float16 of
        `make_train_step`), whose small gradients would be 0. The step multiplies the loss by its scale and divides the
        gradients by it. When gradients overflow, the step changes nothing but the scale, which falls; it grows again
        later. Such a step counts as a step, and not as one that is not finite.
    """
    trained = _trained_part(params, freeze_backbone)
    # Copies: the step consumes its state, and could not consume one array twice.
    averages = jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats}) if ema else None
    nothing = jnp.zeros((), jnp.int32)
    loss_scale = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), loss_scale)  # its numbers are Python's
    return TrainState(jnp.copy(nothing), params, batch_stats, optimizer.init(trained), nothing, averages, loss_scale)


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
    loss: Loss = layers.softmax_cross_entropy,
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
    losses = loss(out.logits, labels)
    if label_smoothing:
        uniform = -jax.nn.log_softmax(out.logits).mean(-1)
        losses = (1 - label_smoothing) * losses + label_smoothing * uniform
    return losses.mean(), (out.logits, out.batch_stats)


def _refuse_unknown(apply: Apply, options: Mapping[str, Any]) -> None:
    """Raises a TypeError at once, and not in the first step, for a keyword that apply does not take."""
    known = list(inspect.signature(apply).parameters.values())[4:]  # after config, params, batch_stats, images
    names = [parameter.name for parameter in known if parameter.name != "train"]
    unknown = [name for name in options if name not in names]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):
        raise TypeError(f"unknown option {unknown[0]!r}: apply takes {', '.join(names) or 'no options'}")


def _make_gradients(
    config: Any, loss: Loss, label_smoothing: float, apply: Apply, freeze_backbone: bool, options: dict[str, Any]
) -> Gradients:
    _refuse_unknown(apply, options)
    if label_smoothing and loss is not layers.softmax_cross_entropy:
        raise ValueError("label_smoothing is for the default loss: smooth the labels in your own")

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


def _in_parts(gradients: Gradients, parts: int, freeze_backbone: bool) -> Gradients:
    """The same of a batch in equal parts, one after the other; the gradient is the mean of theirs."""

    def split(array: Array) -> Array:
        # Part k has the rows k, k + parts, …: so each device of a mesh keeps its share of every part.
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
    """`changed`, if it is finite and not more than skip_nonfinite steps failed before, else `state`; with counts."""
    running = state.nonfinite <= skip_nonfinite
    nonfinite = state.nonfinite + (running & failed)
    kept = jax.tree.map(lambda new, old: jnp.where(finite & running, new, old), changed, state)
    scale = jax.tree.map(lambda new, old: jnp.where(running, new, old), loss_scale, state.loss_scale)
    return kept.replace(step=state.step + (nonfinite <= skip_nonfinite), nonfinite=nonfinite, loss_scale=scale)


def make_train_step(
    config: Any,
    optimizer: optax.GradientTransformation,
    *,
    loss: Loss = layers.softmax_cross_entropy,
    label_smoothing: float = 0.0,
    preprocess: Preprocess = lambda images, step: images,
    apply: Apply = resnet.apply,
    freeze_backbone: bool = False,
    accumulate: int = 1,
    ema_decay: float | None = None,
    skip_nonfinite: int = 0,
    mesh: Mesh | None = None,
    **options: Any,
) -> Callable[[TrainState, Array, Array], tuple[TrainState, dict[str, Array]]]:
    """Builds the jitted training step; it compiles once per shape and consumes (donates) the state it is given.

    A step whose loss or gradients are not finite changes no weight, no statistic and no optimizer state. The first
    skip_nonfinite of them count as steps all the same. After one more the state never changes again: if the metrics are
    read late, the last good state is still there.

    Args:
      config: the architecture.
      optimizer: an optax transform; a learning rate that changes belongs in it as a schedule.
      loss: (logits, labels) -> losses, (N,), whose mean is minimized. With one of your own, labels may also be targets,
        (N, num_classes): the largest is the right answer.
      label_smoothing: the share of the target spread over all classes, for the default loss.
      preprocess: (images, step) -> float images, traced into the step: augmentation and normalization.
      apply: the network, `resnet.apply` or another function of that form.
      freeze_backbone: train the dense layer "fc" alone; the rest runs as in evaluation, its running statistics stay.
      accumulate: the number of parts that a batch is computed in, one after the other, for less memory. The gradient is
        the mean of theirs: without BatchNorm the whole batch's. With it each part is normalized by its own statistics,
        and the running ones are updated once for each part.
      ema_decay: keep moving averages, average = ema_decay * average + (1 - ema_decay) * value, after every step.
      skip_nonfinite: see above.
      mesh: run on its devices: the state replicated, the batch sharded (see `shard_batch`). BatchNorm's statistics are
        those of the whole batch, so results do not depend on the number of devices, up to rounding.
      options: for `apply`: dtype and remat of `resnet.apply`.

    Returns:
      step(state, images, labels) -> (state, metrics): images as `preprocess` takes them, labels (N,) int32; metrics,
      of the batch before the update, are the scalars "loss", "top1" (the share of right answers), "grad_norm" (over
      all gradients, before the optimizer) and "finite" (whether loss and grad_norm are), and "prediction", (N,) int32.

    Raises:
      TypeError: at once, for an option that apply does not take.
      ValueError: at once, for label_smoothing with another loss; when called with a batch that accumulate or the mesh's
        devices do not divide.
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
        failed = ~finite if loss_scale is None else ~jnp.isfinite(value)  # gradients may overflow by their scale alone
        changed = TrainState(state.step, params, batch_stats, opt_state, state.nonfinite, averages, state.loss_scale)
        new_state = _unless_nonfinite(state, changed, loss_scale, finite, failed, skip_nonfinite)
        prediction = logits.argmax(-1).astype(jnp.int32)
        answers = labels if labels.ndim == 1 else labels.argmax(-1)
        metrics = {
            "loss": value,
            "top1": (prediction == answers).mean(),
            "prediction": prediction,
            "grad_norm": grad_norm,
            "finite": finite,
        }
        return new_state, metrics

    return jax.jit(step, donate_argnums=0, **shardings(mesh, ("state", "batch", "batch")))


def make_nonfinite_search(
    config: Any,
    *,
    loss: Loss = layers.softmax_cross_entropy,
    label_smoothing: float = 0.0,
    preprocess: Preprocess = lambda images, step: images,
    apply: Apply = resnet.apply,
    freeze_backbone: bool = False,
    mesh: Mesh | None = None,
    **options: Any,
) -> Callable[[TrainState, Array, Array], list[str]]:
    """Builds a function that names what is not finite in a step, for the state and the batch of a step that failed.

    Arguments as for `make_train_step`; apply must know return_activations.

    Returns:
      search(state, images, labels) -> names such as "the pictures", "the weight conv1.weight", "the activation
      layer2.0", "the loss", "the gradient layer1.0.conv1.weight", in execution order; the state is not consumed.
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
        names[:] = found  # set while tracing: jit would return a dict with its keys sorted
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
    apply: Apply = resnet.apply,
    mesh: Mesh | None = None,
    **options: Any,
) -> Callable[[Any, Any, Array, Array], dict[str, Array]]:
    """Builds the jitted evaluation step; arguments as for `make_train_step`, but `preprocess` takes images alone.

    Returns:
      step(params, batch_stats, images, labels) -> per example, each (N,): "loss", "prediction" (int32), "confidence"
      (the prediction's probability) and "top5" (whether the label is among the five largest logits, or all if there
      are fewer).
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
