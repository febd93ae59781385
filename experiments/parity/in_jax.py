"""jax_resnet, the reference of the comparisons: a layer, a pass of a network, a training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.frameworks.common import Arrays, ResNet
from experiments.frameworks.jax import make_gradients, make_resnet
from experiments.parity.cases import OPTIMIZERS, LayerCase, TrainerState, cotangent
from experiments.parity.errors import Results
from jax_resnet import layers, weights
from jax_resnet.adabound import adabound, amsbound


def run_layer(case: LayerCase) -> Arrays:
    """Outputs and gradients, by name."""
    constants = [jnp.asarray(value) for value in case.constants.values()]

    def call(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        outputs = getattr(layers, case.layer)(*arrays, *constants, **case.settings)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    @jax.jit
    def run(*arrays: jax.Array) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        outputs, vjp = jax.vjp(call, *arrays)
        first, *others = outputs
        return outputs, vjp((jnp.asarray(cotangent(first.shape, first.dtype)), *map(jnp.zeros_like, others)))

    return case.named_results(*run(*case.arrays.values()))


def run_network(network: ResNet, state_dict: Arrays, images: np.ndarray, labels: np.ndarray, train: bool) -> Results:
    """A forward and backward pass; weights and results are converted by `jax_resnet.weights`."""
    gradients = make_gradients(make_resnet(network), with_images=True, train=train, return_activations=True)
    params, batch_stats = weights.from_torch(state_dict)
    return Results.of(*jax.device_get(gradients(params, images, batch_stats, labels)), weights.to_torch)


@functools.cache
def _gradients(network: ResNet) -> Callable[..., Any]:
    """(params, images, batch_stats, labels) -> gradients and new running statistics."""
    gradients = make_gradients(make_resnet(network), train=True)

    @jax.jit  # leaves out the loss and the logits, which nobody reads
    def run(*arguments: Any) -> tuple[Any, Any]:
        (_, out), grads = gradients(*arguments)
        return grads, out.batch_stats

    return run


@functools.cache
def _optimizer(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """init, and an update that returns the new parameters instead of the updates; both jitted."""
    settings = dict(OPTIMIZERS[name])
    if name == "sgd":
        optimizer = optax.chain(optax.add_decayed_weights(settings.pop("weight_decay")), optax.sgd(**settings))
    else:
        aliases = {"adam": optax.adam, "adamw": optax.adamw, "adabound": adabound, "amsbound": amsbound}
        optimizer = aliases[name](**settings)

    def update(grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(optimizer.init), jax.jit(update)


class Trainer:
    """A training with an optimizer of `cases.OPTIMIZERS`; all trainings of a network share its compiled gradients."""

    def __init__(self, network: ResNet, optimizer: str, state_dict: Arrays):
        init, self._update = _optimizer(optimizer)
        self._gradients, self._count = _gradients(network), 0
        self._params, self._batch_stats = jax.tree.map(jnp.asarray, weights.from_torch(state_dict))
        self._opt_state = init(self._params)

    def step(self, images: np.ndarray, labels: np.ndarray) -> None:
        grads, self._batch_stats = self._gradients(self._params, images, self._batch_stats, labels)
        self._params, self._opt_state = self._update(grads, self._opt_state, self._params)
        self._count += 1

    def state(self) -> TrainerState:
        """The state before the next step."""
        found = {name: optax.tree.get(self._opt_state, name) for name in ("trace", "mu", "nu", "nu_max")}
        moments = {name: tree for name, tree in found.items() if tree is not None}
        return TrainerState(self._count, *self.weights(), jax.device_get(moments))

    def weights(self) -> tuple[Any, Any]:
        """params and batch_stats as NumPy arrays."""
        return jax.device_get((self._params, self._batch_stats))
