"""numpy_ref for the comparisons: a layer, a pass of a network, a training."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.frameworks.common import Arrays, ResNet
from experiments.frameworks.numpy import forward_backward, make_resnet
from experiments.parity.cases import OPTIMIZERS, LayerCase, TrainerState, cotangent
from experiments.parity.errors import Results
from numpy_ref import layers, optim, weights


def run_layer(case: LayerCase) -> Arrays:
    """Outputs and gradients, by name."""
    outputs, vjp = getattr(layers, case.layer)(*case.arrays.values(), *case.constants.values(), **case.settings)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return case.named_results(outputs, vjp(cotangent(outputs[0].shape, outputs[0].dtype)))


def run_network(network: ResNet, state_dict: Arrays, images: np.ndarray, labels: np.ndarray, train: bool) -> Results:
    """A forward and backward pass; weights and results are converted by `numpy_ref.weights`."""
    params, batch_stats = weights.from_torch(state_dict)
    options = dict(train=train, return_activations=True)
    passed = forward_backward(make_resnet(network), params, images, batch_stats, labels, **options)
    return Results.of(*passed, weights.to_torch)


class Trainer:
    """A training with an optimizer of `cases.OPTIMIZERS`."""

    def __init__(self, network: ResNet, optimizer: str, state_dict: Arrays):
        settings = dict(OPTIMIZERS[optimizer])
        decay = settings.pop("weight_decay") if optimizer == "sgd" else 0.0
        self._optimizer = optim.add_decayed_weights(getattr(optim, optimizer)(**settings), decay)
        self._config = make_resnet(network)
        self._params, self._batch_stats = weights.from_torch(state_dict)
        self._opt_state = self._optimizer.init(self._params)

    def load(self, state: TrainerState) -> None:
        """Continues from this state."""
        self._params, self._batch_stats = state.params, state.batch_stats
        self._opt_state = self._opt_state._replace(count=state.count, **state.moments)

    def step(self, images: np.ndarray, labels: np.ndarray) -> None:
        (_, out), (grads, _) = forward_backward(
            self._config, self._params, images, self._batch_stats, labels, train=True
        )
        updates, self._opt_state = self._optimizer.update(grads, self._opt_state, self._params)
        self._params, self._batch_stats = optim.apply_updates(self._params, updates), out.batch_stats

    def weights(self) -> tuple[Any, Any]:
        """params and batch_stats."""
        return self._params, self._batch_stats
