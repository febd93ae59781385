"""One jitted training step, one evaluation step, and the state they pass on; on one device or on a mesh of many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_resnet import layers, resnet

Preprocess = Callable[[Array, Array], Array]
Apply = Callable[..., resnet.Output]


@flax.struct.dataclass
class TrainState:
    """Everything a step changes.

    step: () int32, the steps done.
    params, batch_stats, opt_state: the network's and the optimizer's.
    nonfinite: () int32, the steps whose loss or gradients were not finite and which therefore changed nothing.
    ema: {"params", "batch_stats"}, their exponential moving averages; None without.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    nonfinite: Array
    ema: Any = None


def create_train_state(
    params: Any,
    batch_stats: Any,
    optimizer: optax.GradientTransformation,
    *,
    freeze_backbone: bool = False,
    ema: bool = False,
) -> TrainState:
    """The state before the first step; freeze_backbone as for `make_train_step`, ema if that has an ema_decay."""
    trained = _trained_part(params, freeze_backbone)
    # Copies: the step consumes its state, and could not consume one array twice.
    averages = jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats}) if ema else None
    nothing = jnp.zeros((), jnp.int32)
    return TrainState(jnp.copy(nothing), params, batch_stats, optimizer.init(trained), nothing, averages)


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh for data parallelism, by default over all devices of all processes: one axis, "batch"."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), ("batch",))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The same arrays on every device of a mesh; each process hands over the same NumPy or local arrays."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), tree)


def shard_batch(arrays: Any, mesh: Mesh) -> Any:
    """Spreads a batch over the devices of a mesh by its first axis.

    Each process hands over its own rows, in the order of the processes; together they are the batch, whose size must
    be a multiple of the number of devices.
    """
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), arrays)


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


def _make_gradients(
    config: Any, label_smoothing: float, apply: Apply, freeze_backbone: bool, options: dict[str, Any]
) -> Callable[[TrainState, Array, Array], tuple[Array, Array, Any, Any]]:
    """(state, preprocessed images, labels) -> loss, logits, new running statistics, gradients of the trained part."""

    def gradients(state: TrainState, images: Array, labels: Array) -> tuple[Array, Array, Any, Any]:
        def loss_fn(trained):
            return loss_and_logits(
                config,
                {**state.params, **trained},
                state.batch_stats,
                images,
                labels,
                label_smoothing=label_smoothing,
                train=not freeze_backbone,
                apply=apply,
                **options,
            )

        trained = _trained_part(state.params, freeze_backbone)
        (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained)
        return loss, logits, batch_stats, grads

    return gradients


def make_train_step(
    config: Any,
    optimizer: optax.GradientTransformation,
    *,
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
    skip_nonfinite of them count as steps all the same. After one more the state stays for good what it was before that
    step, whatever is run: who reads the metrics late still finds the last good state.

    Args:
      config: the architecture.
      optimizer: an optax transform; a learning rate that changes belongs in it as a schedule.
      label_smoothing: the share of the target spread over all classes.
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
      ValueError: when called with a batch that accumulate or the mesh's devices do not divide.
    """

    gradients = _make_gradients(config, label_smoothing, apply, freeze_backbone, options)

    def accumulated(state: TrainState, images: Array, labels: Array) -> tuple[Array, Array, Any, Any]:
        if len(labels) % accumulate:
            raise ValueError(f"a batch of {len(labels)} cannot be computed in {accumulate} equal parts")

        def parts(array: Array) -> Array:
            # Part k has the rows k, k + accumulate, …: so each device of a mesh keeps its share of every part.
            return array.reshape(-1, accumulate, *array.shape[1:]).swapaxes(0, 1)

        def add(sums, part):
            batch_stats, grads = sums
            loss, logits, batch_stats, part_grads = gradients(state.replace(batch_stats=batch_stats), *part)
            return (batch_stats, jax.tree.map(jnp.add, grads, part_grads)), (loss, logits)

        zeros = jax.tree.map(jnp.zeros_like, _trained_part(state.params, freeze_backbone))
        (batch_stats, grads), (losses, logits) = jax.lax.scan(
            add, (state.batch_stats, zeros), (parts(images), parts(labels))
        )
        grads = jax.tree.map(lambda g: g / accumulate, grads)
        return losses.mean(), logits.swapaxes(0, 1).reshape(len(labels), -1), batch_stats, grads

    def step(state: TrainState, images: Array, labels: Array) -> tuple[TrainState, dict[str, Array]]:
        compute = gradients if accumulate == 1 else accumulated
        loss, logits, batch_stats, grads = compute(state, preprocess(images, state.step), labels)
        trained = _trained_part(state.params, freeze_backbone)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        params = {**state.params, **optax.apply_updates(trained, updates)}
        averages = state.ema
        if ema_decay is not None:
            new = {"params": params, "batch_stats": batch_stats}
            averages = jax.tree.map(lambda a, b: ema_decay * a + (1 - ema_decay) * b, averages, new)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        running = state.nonfinite <= skip_nonfinite
        nonfinite = state.nonfinite + (running & ~finite)
        changed = TrainState(state.step, params, batch_stats, opt_state, state.nonfinite, averages)
        kept = jax.tree.map(lambda new, old: jnp.where(finite & running, new, old), changed, state)
        counted = state.step + (nonfinite <= skip_nonfinite)
        prediction = logits.argmax(-1).astype(jnp.int32)
        metrics = {
            "loss": loss,
            "top1": (prediction == labels).mean(),
            "prediction": prediction,
            "grad_norm": grad_norm,
            "finite": finite,
        }
        return kept.replace(step=counted, nonfinite=nonfinite), metrics

    return jax.jit(step, donate_argnums=0, **_shardings(mesh, ("state", "batch", "batch")))


def _shardings(mesh: Mesh | None, arguments: Sequence[str]) -> dict[str, Any]:
    """For jit: a batch is spread over a mesh, all else is on every device; so is what comes out."""
    if mesh is None:
        return {}
    everywhere, spread = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))
    places = tuple(spread if name == "batch" else everywhere for name in arguments)
    return {"in_shardings": places, "out_shardings": everywhere}


def make_nonfinite_search(
    config: Any,
    *,
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
      layer2.0", "the loss", "the gradient layer1.0.conv1.weight", in the order in which a step comes by them; the state
      is not consumed.
    """
    gradients = _make_gradients(config, label_smoothing, apply, freeze_backbone, options)
    names: list[str] = []

    def flags(state: TrainState, images: Array, labels: Array) -> Array:
        images = preprocess(images, state.step)
        loss, logits, _, grads = gradients(state, images, labels)
        activations = apply(
            config,
            state.params,
            state.batch_stats,
            images,
            train=not freeze_backbone,
            return_activations=True,
            **options,
        ).activations
        found = {"the pictures": images}
        for kind, tree in (("weight", state.params), ("statistic", state.batch_stats), ("activation", activations)):
            found |= {f"the {kind} {name}": array for name, array in flatten_dict(dict(tree), sep=".").items()}
        found |= {"the logits": logits, "the loss": loss}
        found |= {f"the gradient {name}": array for name, array in flatten_dict(dict(grads), sep=".").items()}
        names[:] = found  # by the way of tracing: jit would hand back a dict with its keys sorted
        return jnp.stack([~jnp.isfinite(array).all() for array in found.values()])

    jitted = jax.jit(flags, **_shardings(mesh, ("state", "batch", "batch")))

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

    def step(params: Any, batch_stats: Any, images: Array, labels: Array) -> dict[str, Array]:
        logits = apply(config, params, batch_stats, preprocess(images), train=False, **options).logits
        _, best = jax.lax.top_k(logits, min(5, logits.shape[1]))
        return {
            "loss": layers.softmax_cross_entropy(logits, labels),
            "prediction": best[:, 0].astype(jnp.int32),
            "confidence": jax.nn.softmax(logits).max(-1),
            "top5": (best == labels[:, None]).any(-1),
        }

    return jax.jit(step, **_shardings(mesh, ("params", "batch_stats", "batch", "batch")))
