"""A network with BatchNorm that compiles in a second, and pictures for it, to test the code around a network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.dataset import Dataset, Split
from experiments.frameworks.common import Network, Recipe, make_training
from experiments.frameworks.schedules import make_schedule
from jax_resnet import layers, weights
from jax_resnet.resnet import Output

CLASSES = ("dark", "bright", "striped")


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    batch_norm: bool = True


def draw(seed=0):
    """params and batch_stats."""
    rng = np.random.default_rng(seed)
    params = {
        "conv1": {"weight": rng.standard_normal((3, 3, 1, 8)) / 3},
        "bn1": {"weight": np.ones(8), "bias": np.zeros(8)},
        "fc": {"weight": rng.standard_normal((8, 3)) / 3, "bias": np.zeros(3)},
    }
    return params, {"bn1": {"running_mean": np.zeros(8), "running_var": np.ones(8)}}


def apply(config, params, batch_stats, images, *, train, dtype=None, remat=False, return_activations=False):
    x = layers.conv2d(images, params["conv1"]["weight"], stride=2, padding=1)
    if config.batch_norm:
        running = batch_stats["bn1"]["running_mean"], batch_stats["bn1"]["running_var"]
        x, mean, variance = layers.batch_norm(x, params["bn1"]["weight"], params["bn1"]["bias"], *running, train=train)
        batch_stats = {"bn1": {"running_mean": mean, "running_var": variance}}
    features = layers.global_avg_pool(layers.relu(x))
    logits = layers.dense(features, params["fc"]["weight"], params["fc"]["bias"])
    return Output(logits, batch_stats, {"conv1": x, "pool": features} if return_activations else {})


def pictures(count, seed):
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % 3).astype(np.int32)
    images = rng.integers(0, 90, (count, 8, 8, 1)).astype(np.uint8)
    images[labels == 1] += 90
    images[labels == 2, ::2] += 120
    return Split(images, labels)


def dataset():
    return Dataset("tiny pictures", CLASSES, pictures(30, 0), pictures(14, 1), {})


def training(settings, data, *, spoiled=()):
    """A training as a program's `prepare` makes it, with random augmentation; spoiled steps, from 1, get NaN."""
    key = jax.random.key(settings.experiment.seed)

    def preprocess_train(images, step):
        x = images.astype(jnp.float32) / 255 + 0.1 * jax.random.normal(jax.random.fold_in(key, step), images.shape)
        return jnp.where(jnp.isin(step + 1, jnp.asarray([0, *spoiled])), jnp.nan, x)

    experiment = settings.experiment
    steps = experiment.epochs * (len(data.train) // experiment.batch_size)
    recipe = Recipe(
        experiment,
        make_schedule("cosine", experiment.learning_rate, steps, 0),
        steps,
        preprocess_train=preprocess_train,
        preprocess_test=lambda images: images.astype(jnp.float32) / 255,
        skip_nonfinite=settings.system.skip_nonfinite,
    )
    return make_training(
        Network((TinyConfig(), apply), (None, None), lambda framework: None, *draw(), weights.to_torch), recipe
    )
