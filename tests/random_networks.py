"""Networks with random parameters, and the passes of one batch through those of numpy_ref.

BatchNorm's parameters and running statistics are random: as 1 and 0 they would hide half of the possible bugs. The
weight of a block's last BatchNorm is a quarter of the others. Each block then adds less to its shortcut, as in a
trained network, and a deep network in training does not magnify rounding by itself.
"""

import numpy as np

from numpy_ref import config as architecture
from numpy_ref import layers, resnet

CHANNELS, CLASSES = 2, 7


def network(name, **options):
    """(config, params, batch_stats) in float64."""
    config = getattr(resnet, name)(**{"num_classes": CLASSES, "in_channels": CHANNELS} | options)
    rng = np.random.default_rng(0)
    params, batch_stats = randomized(rng, resnet.init(config, rng, np.float64))
    if config.batch_norm:
        for stage, number, _ in architecture.blocks(config):
            params[stage][number]["bn2" if config.block == "basic" else "bn3"]["weight"] /= 4
    return config, params, batch_stats


def randomized(rng, tree):
    """NumPy's copy of dicts of arrays, with other values in vectors; variances stay positive."""
    if isinstance(tree, tuple):
        return tuple(randomized(rng, part) for part in tree)
    if isinstance(tree, dict):
        return {name: randomized(rng, value) for name, value in tree.items()}
    moved_by = 0.5 * rng.random(tree.shape) - 0.2 if tree.ndim == 1 else 0
    return (np.asarray(tree) + moved_by).astype(tree.dtype)


def norm_arrays(rng, shape):
    """x, weight, bias, running mean and variance of a BatchNorm."""
    c = shape[-1]
    x, weight, bias, mean = (rng.standard_normal(s) for s in (shape, c, c, c))
    return 2 * x + 3, weight + 1.5, bias, mean, rng.random(c) + 0.5


def images_of(shape):
    """Random images for (N, H, W)."""
    return np.random.default_rng(1).standard_normal((*shape, CHANNELS))


def labels_of(n):
    return np.random.default_rng(2).integers(0, CLASSES, n)


def passes(module, config, params, batch_stats, images, train, **options):
    """Everything that a forward and a backward pass of the mean cross-entropy give."""
    out, vjp = module.apply(config, params, batch_stats, images, train=train, return_activations=True, **options)
    losses, vjp_loss = layers.softmax_cross_entropy(out.logits, labels_of(len(images)))
    dparams, dimages = vjp(*vjp_loss(np.full(len(images), 1 / len(images))))
    return dict(out._asdict(), loss=losses.mean(), dparams=dparams, dimages=dimages)
