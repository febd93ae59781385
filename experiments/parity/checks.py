"""Layers, networks and trainings of all frameworks against those of JAX."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from experiments.frameworks.common import Arrays, ResNet
from experiments.parity import in_jax, in_numpy
from experiments.parity.cases import Batch, LayerCase, activation_names, draw_batch
from experiments.parity.errors import Results, Row, largest, length_of_difference, relative_errors

# BOUND_FLOAT64 is the project's target. In float32 a layer may lose two of its seven digits to a sum of some hundred
# products. A network may have ten times the error of JAX's own float32, or a layer's bound if that is more. Gradients
# are not continuous in the weights: where rounding turns a ReLU on or off, some of them jump, in JAX too. So in float32
# only the length of their whole difference is bounded.
BOUND_FLOAT64 = 1e-10
LAYER_BOUNDS = {"float64": BOUND_FLOAT64, "float32": 1e-5}
LOGITS_BOUND_FLOAT32 = 1e-4  # absolute
OWN_ERROR_BOUND_FLOAT32 = 10.0  # times JAX's own
LENGTH_BOUND_FLOAT32 = 0.1
GRADIENTS = ("parameter_gradients", "image_gradient")
OWN_ERROR = "jax against float64"
FLOAT32_NOTE = (
    f'float32: "{OWN_ERROR}" is JAX\'s own rounding, the measure of the bounds; single gradients have none: where '
    "rounding turns a ReLU on or off they jump, in JAX itself too"
)
STEP_BOUND = 1e-9
GROWTH_BOUND = 10.0  # times the distance that one unit in the last place of the weights causes


def module_of(framework: str) -> ModuleType:
    """The functions of a framework, imported when they are needed: torch may not be installed."""
    if framework == "numpy":
        return in_numpy
    from experiments.parity import in_torch

    return in_torch


def compare_layer(case: LayerCase, dtype: str, frameworks: Sequence[str]) -> list[Row]:
    """A layer's outputs and gradients: a row per framework ("torch" is torch.nn.functional)."""
    case = case.astype(dtype)
    reference = in_jax.run_layer(case)
    rows = []
    for framework in frameworks:
        error, where = largest(relative_errors(module_of(framework).run_layer(case), reference))
        rows.append(Row(f"{case.title}, {dtype}", framework, error, LAYER_BOUNDS[dtype], where))
    return rows


class Profile(NamedTuple):
    """Errors along a network, in execution order: of activations and of the gradients of parameters, by name."""

    framework: str
    dtype: str
    mode: str
    activations: dict[str, float]
    gradients: dict[str, float]


Errors = Mapping[str, Mapping[str, float]]  # {field of Results: {array: relative error}}


def compare_network(
    network: ResNet, state_dict: Arrays, batch: Batch, dtypes: Sequence[str], mode: str, frameworks: Sequence[str]
) -> Iterator[tuple[list[Row], Profile]]:
    """Runs a pass of the network, mode "train" or "eval", in JAX and then in each framework, for each dtype.

    If float64 comes first, JAX's float32 is compared with it too: most bounds of float32 follow from that error.

    Yields:
      the rows of each comparison, and its errors along the network.
    """
    images, labels = batch
    order = [*activation_names(network), *state_dict]
    exact, bounds = None, {}
    for dtype in dtypes:
        what = f"{mode}, {dtype}"
        weights = {name: value.astype(dtype) for name, value in state_dict.items()}
        arguments = (network, weights, images.astype(dtype), labels, mode == "train")
        reference = in_jax.run_network(*arguments)
        if dtype == "float64":
            exact, bounds = reference, dict.fromkeys(Results._fields, BOUND_FLOAT64)
        elif exact is not None:
            own = errors_by_part(reference, exact)
            bounds = bounds_float32(own)
            yield rows_by_part(own, what, OWN_ERROR, {}), profile_of(own, order, OWN_ERROR, dtype, mode)
        for framework in frameworks:
            library = {} if framework == "numpy" else {"library": framework}
            results = module_of(framework).run_network(*arguments, **library)
            errors = errors_by_part(results, reference)
            rows = rows_by_part(errors, what, framework, bounds)
            if dtype == "float32":
                rows += rows_of_float32(results, reference, what, framework)
            yield rows, profile_of(errors, order, framework, dtype, mode)


def profile_of(errors: Errors, order: Sequence[str], framework: str, dtype: str, mode: str) -> Profile:
    """The errors of activations and of parameters' gradients, in the order of the names."""
    parts = (errors["activations"], errors["parameter_gradients"])
    return Profile(framework, dtype, mode, *({n: of_part[n] for n in order if n in of_part} for of_part in parts))


def errors_by_part(results: Results, reference: Results) -> dict[str, dict[str, float]]:
    """The errors of all arrays by field; a field that is a single array has one error, under its own name."""
    errors = {}
    for part, ours in results._asdict().items():
        theirs = getattr(reference, part)
        if not isinstance(ours, dict):
            ours, theirs = {part: ours}, {part: theirs}
        if ours or theirs:  # without BatchNorm there are no running statistics
            errors[part] = relative_errors(ours, theirs)
    return errors


def bounds_float32(own: Errors) -> dict[str, float]:
    """Bounds by part, from JAX's own errors; none is smaller than the bound of a layer."""
    return {
        part: max(OWN_ERROR_BOUND_FLOAT32 * largest(errors)[0], LAYER_BOUNDS["float32"])
        for part, errors in own.items()
        if part not in GRADIENTS
    }


def rows_by_part(errors: Errors, what: str, framework: str, bounds: Mapping[str, float]) -> list[Row]:
    """The largest error of each part; a part without a bound is for information."""
    rows = []
    for part, of_part in errors.items():
        error, where = largest(of_part)
        rows.append(Row(f"{part.replace('_', ' ')}, {what}", framework, error, bounds.get(part), where))
    return rows


def rows_of_float32(results: Results, reference: Results, what: str, framework: str) -> list[Row]:
    """The rows of the other checks of float32: logits, the best five classes, and the gradients as a whole."""
    difference = np.abs(results.logits - reference.logits)
    image = f"image {difference.max(1).argmax()}"
    ours, theirs = (np.argsort(-logits, axis=1, kind="stable")[:, :5] for logits in (results.logits, reference.logits))
    different = (ours != theirs).any(1)
    first = f"image {different.argmax()}" if different.any() else "no image"
    rows = [
        Row(f"logits, absolute, {what}", framework, float(difference.max()), LOGITS_BOUND_FLOAT32, image),
        Row(f"images with another top-5, {what}", framework, float(different.sum()), 0.0, first),
    ]
    for part in GRADIENTS:
        error = length_of_difference(getattr(results, part), getattr(reference, part))
        name = part.replace("_", " ")
        rows.append(Row(f"{name}, length of difference, {what}", framework, error, LENGTH_BOUND_FLOAT32, "all"))
    return rows


class Growth(NamedTuple):
    """How far trainings with the same initial weights and the same batches diverge.

    distances: from JAX's training after each step, by framework: the largest relative error over all parameters and
      running statistics.
    yardstick: the same for a training in JAX whose initial weights were moved by one unit in the last place.
    """

    optimizer: str
    distances: dict[str, list[float]]
    yardstick: list[float]


def compare_trainings(
    network: ResNet,
    state_dict: Arrays,
    optimizer: str,
    steps: Iterable[int],
    batch_shape: tuple[int, int, int],
    frameworks: Sequence[str],
    seed: int,
) -> tuple[list[Row], Growth]:
    """Trains in all frameworks at once, in float64, each framework twice.

    One training starts each step from the state that JAX had before it; the other makes all steps on its own.

    Args:
      network, state_dict: the network and its initial weights.
      optimizer: a name in `cases.OPTIMIZERS`.
      steps: their numbers, from 1.
      batch_shape: (N, H, W); each step sees another batch.
      frameworks: "numpy", "torch_ref".
      seed: of the batches, and of which weights move up and which down by one unit in the last place.
    """
    rng = np.random.default_rng(seed)
    step_by_step, free = (
        {name: module_of(name).Trainer(network, optimizer, state_dict) for name in frameworks} for _ in range(2)
    )
    reference = in_jax.Trainer(network, optimizer, state_dict)
    moved = in_jax.Trainer(network, optimizer, moved_by_one_unit(state_dict, rng))
    growth = Growth(optimizer, {name: [] for name in frameworks}, [])
    of_steps, of_free = ({name: [] for name in frameworks} for _ in range(2))
    for step in steps:
        images, labels = draw_batch(network, batch_shape, rng)
        before = reference.state()
        reference.step(images, labels)
        expected = _flat(reference.weights())
        moved.step(images, labels)
        yardstick, _ = largest(relative_errors(_flat(moved.weights()), expected))
        growth.yardstick.append(yardstick)
        for name in frameworks:
            step_by_step[name].load(before)
            for trainer, found in ((step_by_step[name], of_steps[name]), (free[name], of_free[name])):
                trainer.step(images, labels)
                error, where = largest(relative_errors(_flat(trainer.weights()), expected))
                found.append((error, f"step {step}, {where}"))
            growth.distances[name].append(of_free[name][-1][0])
    rows = []
    for name in frameworks:
        rows.append(Row(f"{optimizer}, each step", name, *_worst(of_steps[name], STEP_BOUND)))
        ratios = [(d / y, at) for (d, at), y in zip(of_free[name], growth.yardstick, strict=True)]
        rows.append(Row(f"{optimizer}, free, over one ulp's", name, *_worst(ratios, GROWTH_BOUND)))
    return rows, growth


def _worst(found: Sequence[tuple[float, str]], bound: float) -> tuple[float, float, str]:
    error, where = largest({at: error for error, at in found})
    return error, bound, where


def _flat(trees: tuple[Any, Any]) -> Arrays:
    return dict(itertools.chain.from_iterable(flatten_dict(tree, sep=".").items() for tree in trees))


def moved_by_one_unit(state_dict: Arrays, rng: np.random.Generator) -> Arrays:
    """Moves each weight up or down by one unit in the last place, at random like rounding."""
    return {
        name: value if "running" in name else np.nextafter(value, rng.choice([-np.inf, np.inf], value.shape))
        for name, value in state_dict.items()
    }
