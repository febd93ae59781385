"""numpy_ref for the comparisons: a layer, a network and a training, each run once."""

from __future__ import annotations

import copy
from typing import Any

import jax
import numpy as np

from experiments.parity.cases import OPTIMIZERS, Arrays, LayerCase, Network, State, cotangent
from experiments.parity.errors import Results
from numpy_ref import fast, layers, optim, weights


def run_layer(case: LayerCase) -> Arrays:
    """Outputs and gradients, by name."""
    outputs, vjp = getattr(layers, case.layer)(*case.arrays.values(), *case.constants.values(), **case.settings)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return case.named_results(outputs, vjp(cotangent(outputs[0].shape, outputs[0].dtype)))


def run_network(network: Network, state_dict: Arrays, images: np.ndarray, labels: np.ndarray, train: bool) -> Results:
    """One forward and backward pass; weights come and results go through `numpy_ref.weights`."""
    config = getattr(fast, network.arch)(**network.options)
    params, batch_stats = weights.from_torch(state_dict)
    out, losses, dparams, dimages = _forward_backward(config, params, batch_stats, images, labels, train)
    return Results(
        logits=out.logits,
        loss=losses.mean(),
        activations=out.activations,
        running_statistics=weights.to_torch({}, out.batch_stats),
        parameter_gradients=weights.to_torch(dparams, {}),
        image_gradient=dimages,
    )


def _forward_backward(
    config: fast.ResNetConfig, params: Any, batch_stats: Any, images: np.ndarray, labels: np.ndarray, train: bool
) -> tuple[fast.Output, np.ndarray, Any, np.ndarray]:
    out, vjp = fast.apply(config, params, batch_stats, images, train=train, return_activations=True)
    losses, vjp_loss = layers.softmax_cross_entropy(out.logits, labels)
    return out, losses, *vjp(*vjp_loss(np.full_like(losses, 1 / len(losses))))


def make_optimizer(name: str) -> optim.GradientTransformation:
    settings = dict(OPTIMIZERS[name])
    if name == "sgd":
        del settings["weight_decay"]  # numpy_ref's SGD has none: `Trainer.step` adds it to the gradient
    return getattr(optim, name)(**settings)


class Trainer:
    """A training of a network, step by step."""

    def __init__(self, network: Network):
        self._config = getattr(fast, network.arch)(**network.options)

    def start(self, optimizer: str, state_dict: Arrays) -> Trainer:
        """A training from these weights with an optimizer of `cases.OPTIMIZERS`."""
        trainer = copy.copy(self)
        trainer._optimizer = make_optimizer(optimizer)
        trainer._l2 = OPTIMIZERS[optimizer]["weight_decay"] if optimizer == "sgd" else 0.0
        trainer._params, trainer._batch_stats = weights.from_torch(state_dict)
        trainer._opt_state = trainer._optimizer.init(trainer._params)
        return trainer

    def load(self, state: State) -> None:
        """Continues from there."""
        self._params, self._batch_stats = state.params, state.batch_stats
        self._opt_state = self._opt_state._replace(count=state.count, **state.moments)

    def step(self, images: np.ndarray, labels: np.ndarray) -> None:
        out, _, grads, _ = _forward_backward(self._config, self._params, self._batch_stats, images, labels, train=True)
        if self._l2:
            grads = jax.tree.map(lambda g, p: g + self._l2 * p, grads, self._params)
        updates, self._opt_state = self._optimizer.update(grads, self._opt_state, self._params)
        self._params, self._batch_stats = optim.apply_updates(self._params, updates), out.batch_stats

    def weights(self) -> tuple[Any, Any]:
        """params and batch_stats."""
        return self._params, self._batch_stats
