"""jax_resnet for the comparisons: a layer, a network and a training, each run once; the reference."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.parity.cases import OPTIMIZERS, Arrays, LayerCase, Network, State, cotangent
from experiments.parity.errors import Results
from jax_resnet import layers, resnet, weights
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


def run_network(network: Network, state_dict: Arrays, images: np.ndarray, labels: np.ndarray, train: bool) -> Results:
    """One forward and backward pass; weights come and results go through `jax_resnet.weights`."""
    config = getattr(resnet, network.arch)(**network.options)
    params, batch_stats = weights.from_torch(state_dict)

    @jax.jit
    def run(params: Any, batch_stats: Any, images: jax.Array) -> Any:
        def loss_fn(params: Any, images: jax.Array) -> tuple[jax.Array, resnet.Output]:
            out = resnet.apply(config, params, batch_stats, images, train=train, return_activations=True)
            return layers.softmax_cross_entropy(out.logits, labels).mean(), out

        return jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)(params, images)

    (loss, out), (dparams, dimages) = jax.device_get(run(params, batch_stats, images))
    return Results(
        logits=out.logits,
        loss=loss,
        activations=out.activations,
        running_statistics=weights.to_torch({}, out.batch_stats),
        parameter_gradients=weights.to_torch(dparams, {}),
        image_gradient=dimages,
    )


def make_optimizer(name: str) -> optax.GradientTransformation:
    settings = dict(OPTIMIZERS[name])
    if name == "sgd":
        return optax.chain(optax.add_decayed_weights(settings.pop("weight_decay")), optax.sgd(**settings))
    return {"adam": optax.adam, "adamw": optax.adamw, "adabound": adabound, "amsbound": amsbound}[name](**settings)


class Trainer:
    """A training of a network, step by step; the gradients are compiled once for all optimizers."""

    def __init__(self, network: Network):
        config = getattr(resnet, network.arch)(**network.options)

        def loss_fn(params: Any, batch_stats: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
            out = resnet.apply(config, params, batch_stats, images, train=True)
            return layers.softmax_cross_entropy(out.logits, labels).mean(), out.batch_stats

        self._gradients = jax.jit(jax.grad(loss_fn, has_aux=True))

    def start(self, optimizer: str, state_dict: Arrays) -> Trainer:
        """A training from these weights with an optimizer of `cases.OPTIMIZERS`."""
        trainer = copy.copy(self)
        init, trainer._update = _jitted(optimizer)
        trainer._count = 0
        trainer._params, trainer._batch_stats = jax.tree.map(jnp.asarray, weights.from_torch(state_dict))
        trainer._opt_state = init(trainer._params)
        return trainer

    def step(self, images: np.ndarray, labels: np.ndarray) -> None:
        grads, self._batch_stats = self._gradients(self._params, self._batch_stats, images, labels)
        self._params, self._opt_state = self._update(grads, self._opt_state, self._params)
        self._count += 1

    def state(self) -> State:
        """Before the next step."""
        found = {name: optax.tree.get(self._opt_state, name) for name in ("trace", "mu", "nu", "nu_max")}
        moments = {name: tree for name, tree in found.items() if tree is not None}
        return State(self._count, *jax.device_get((self._params, self._batch_stats, moments)))

    def weights(self) -> tuple[Any, Any]:
        """params and batch_stats as NumPy arrays."""
        return jax.device_get((self._params, self._batch_stats))


@functools.cache
def _jitted(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """An optimizer's init and update, the latter with the new parameters in place of the updates."""
    optimizer = make_optimizer(name)

    def update(grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(optimizer.init), jax.jit(update)
