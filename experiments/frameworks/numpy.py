"""numpy_ref in the experiments: networks, weights in and out, gradients, optimizers, trainings.

JAX is imported only for trainings, since it would add to the memory that a benchmark measures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.frameworks.common import Array, Arrays, Network, Recipe, ResNet, Training
from experiments.frameworks.schedules import as_numbers
from experiments.machine import numpy_device
from numpy_ref import fast, layers, optim, train, weights

if TYPE_CHECKING:
    from jax_resnet.adabound import AdaBoundState


def make_resnet(network: ResNet) -> fast.ResNetConfig:
    """The configuration that `numpy_ref.fast.apply` takes."""
    return getattr(fast, network.arch)(**network.options)


def make_logits(network: ResNet, arrays: Arrays) -> Callable[[Array], Array]:
    """A function from images (N, H, W, C) to logits, in evaluation; arrays as in a weight file."""
    config, trees = make_resnet(network), weights.from_torch(arrays)
    return lambda images: fast.apply(config, *trees, images, train=False)[0].logits


def forward_backward(
    config: fast.ResNetConfig, params: Any, images: Array, batch_stats: Any, labels: Array, **options: Any
) -> tuple[tuple[Array, fast.Output], tuple[Any, Array]]:
    """((mean loss, Output), (gradients of params, of images)); options are those of `numpy_ref.fast.apply`."""
    out, vjp = fast.apply(config, params, batch_stats, images, **options)
    losses, vjp_loss = layers.softmax_cross_entropy(out.logits, labels)
    return (losses.mean(), out), vjp(*vjp_loss(np.full_like(losses, 1 / len(losses))))


def make_optimizer(recipe: Recipe) -> optim.GradientTransformation:
    """The optimizer of a recipe."""
    from jax_resnet.train import decay_mask

    experiment = recipe.experiment
    rate, momentum, decay = as_numbers(recipe.schedule, recipe.steps), experiment.momentum, experiment.weight_decay
    match experiment.opt:
        case "adabound" | "amsbound":
            bounds = dict(gamma=experiment.gamma, base_lr=experiment.learning_rate, weight_decay=decay, mask=decay_mask)
            return getattr(optim, experiment.opt)(rate, experiment.final_lr, b1=momentum, **bounds)
        case "adamw":
            return optim.adamw(rate, b1=momentum, weight_decay=decay, mask=decay_mask)
        case "sgd":
            optimizer = optim.sgd(rate, momentum, dampening=experiment.dampening)
        case _:
            optimizer = optim.adam(rate, b1=momentum)
    return optim.add_decayed_weights(optimizer, decay, decay_mask)


def moments_of(opt_state: Any) -> AdaBoundState:
    """The moments in the state of any optimizer of `make_optimizer` but SGD."""
    from jax_resnet.adabound import AdaBoundState

    return AdaBoundState(opt_state.count, opt_state.mu, opt_state.nu, getattr(opt_state, "nu_max", None))


def make_training(network: Network, recipe: Recipe) -> Training:
    """See `experiments.frameworks.common.make_training`."""
    experiment = recipe.experiment
    import jax

    config, apply = network.numpy
    optimizer = make_optimizer(recipe)
    trees = jax.tree.map(lambda a: np.asarray(a, experiment.precision), (network.params, network.batch_stats))
    train_step = train.make_train_step(
        config,
        optimizer,
        label_smoothing=experiment.label_smoothing,
        preprocess=lambda images, step: np.asarray(recipe.preprocess_train(images, step)),
        apply=apply,
        freeze_backbone=recipe.freeze_backbone,
    )
    return Training(
        experiment.framework,
        train.create_train_state(*trees, optimizer, freeze_backbone=recipe.freeze_backbone),
        train_step,
        train.make_eval_step(config, preprocess=lambda images: np.asarray(recipe.preprocess_test(images)), apply=apply),
        numpy_device(),
        network.to_torch,
        lambda state: moments_of(state.opt_state),
    )
