"""Loads a network with what belongs to it, classifies pictures with it, and exports it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from scipy.special import softmax

from experiments.classify import hub_pictures, imagenet, stablehlo
from experiments.classify.preparation import CROP, Middle, Stretched, as_trained
from experiments.data.augment import normalize, to_unit_range
from experiments.data.pictures import printable, read_file, reason_of
from experiments.frameworks.common import ResNet, adapter
from experiments.training.run_folder import WEIGHTS, is_of_a_run, run_metadata
from jax_resnet import resnet, weights
from jax_resnet.weight_checks import check_arrays

if TYPE_CHECKING:
    from experiments.classify.__main__ import Settings

TORCHVISION = "torchvision"
BATCH_SIZE = 8
Logits = Callable[[np.ndarray], np.ndarray]


def check_settings(settings: Settings) -> None:
    """Raises a ValueError for values that are out of range or do not apply to these weights."""
    # This is not in __post_init__, because tyro prints errors from there in a box of several lines.
    if not settings.pictures and settings.export is None:
        raise ValueError("name at least one picture")
    if settings.pictures and settings.export is not None:
        raise ValueError("--export writes a file and classifies nothing: leave the pictures out")
    if settings.top < 1:
        raise ValueError(f"--top must be at least 1, got {settings.top}")
    if settings.resize is not None and settings.resize < CROP:
        raise ValueError(f"--resize must be at least {CROP}, the crop, got {settings.resize}")
    if settings.version and settings.weights != TORCHVISION:
        raise ValueError(f"--version is only for --weights torchvision, got --weights {settings.weights}")
    if settings.weights.lower().endswith(stablehlo.SUFFIX):
        given = [name for name in ("arch", "resize", "export") if getattr(settings, name) is not None]
        given += ["framework"] if settings.framework != "jax" else []
        if given:
            raise ValueError(f"--{given[0]} is for weight files: {settings.weights} is exported already, for JAX")


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A network, with what its weight file says about pictures and classes.

    arch, config: the network.
    arrays: {torchvision's name: float32 array in torchvision's layout}.
    class_names: by number.
    preparation: how pictures are prepared.
    exported: the network of a StableHLO file, uint8 pictures -> logits; then config is None and arrays is empty.
    notes: what the user should know about the weights and the names.
    """

    arch: str
    config: resnet.ResNetConfig | None
    arrays: dict[str, np.ndarray]
    class_names: Sequence[str]
    preparation: Middle | Stretched
    exported: Logits | None = None
    notes: tuple[str, ...] = ()


def load_classifier(settings: Settings) -> Classifier:
    """Reads the weights, and determines how pictures are prepared and how classes are named.

    Raises:
      FileNotFoundError, ValueError: there are no such weights, or they cannot classify.
    """
    if settings.weights.lower().endswith(stablehlo.SUFFIX):
        return load_exported(Path(settings.weights))
    if settings.weights == TORCHVISION:
        arch = settings.arch or "resnet101"
        path, resize = imagenet.torchvision_weights(arch, settings.version)
        file = weights.read_file(path)
    else:
        arch = settings.arch
        file = weights.read_file(settings.weights, settings.entry)
        path, resize = file.path, imagenet.resize_for(file.path)
    arch, config = weights.recognize_file(file, arch)
    check_arrays(file.arrays, config, path)
    if config.batch_norm_eps != resnet.ResNetConfig.batch_norm_eps:
        raise ValueError(f"{path} was saved with batch_norm_eps={config.batch_norm_eps}: only jax_resnet can run it")
    if not config.num_classes:
        raise ValueError(f"{path} has no dense layer, or one that is not a single layer: it cannot classify")
    if config.num_classes == 1:
        raise ValueError(f"{path} has one output, so there are no classes to choose from")
    facts, notes = run_metadata(file), file.notes
    if is_of_a_run(facts):
        if settings.resize is not None:
            raise ValueError(f"--resize is for ImageNet's weights: {path} sets the size of its pictures")
        try:
            class_names, preparation = as_trained(facts, arch, config)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"the metadata of {path} are not as experiments.cars writes them: {error}") from error
    else:
        told = told_beside(file)
        preparation = told or Middle((resize,))
        if settings.resize is not None:
            preparation = dataclasses.replace(preparation, shorter=(settings.resize,))
        if config.in_channels != len(preparation.mean):
            channels = "1 channel" if config.in_channels == 1 else f"{config.in_channels} channels"
            raise ValueError(
                f"{path} is for pictures of {channels}, but does not say how to prepare them: pass the {WEIGHTS} of a "
                "run of experiments.cars, whose metadata say so"
            )
        class_names = hub_pictures.class_names(file.settings, config.num_classes) or imagenet.class_names()
        if config.num_classes != len(class_names):
            class_names = [f"class {number}" for number in range(config.num_classes)]
        assumed = ["preparation of the pictures"] if told is None else []
        assumed += ["names"] if class_names is imagenet.class_names() else []
        if assumed and settings.weights != TORCHVISION:
            verb = "is" if assumed == ["preparation of the pictures"] else "are"
            notes += (f"the {' and the '.join(assumed)} {verb} assumed to be ImageNet's",)
    arrays = {name: array.astype(np.float32) for name, array in file.arrays.items()}
    return Classifier(arch, config, arrays, class_names, preparation, notes=notes)


def told_beside(file: weights.WeightFile) -> Middle | None:
    """The preparation that the settings beside a file or keras.applications define, or None.

    Raises:
      ValueError: the settings are not what timm and Hugging Face write.
    """
    try:
        return hub_pictures.preparation(file.settings) or (hub_pictures.KERAS if file.naming == "Keras" else None)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"the settings beside {file.path} do not say how pictures are prepared: {reason}") from error


def load_exported(path: Path) -> Classifier:
    """Reads a StableHLO file and the .json beside it; raises a ValueError if one is not as --export writes it."""
    network, facts = stablehlo.read(path)
    try:
        kind = Stretched if "grey" in facts["decode"] else Middle
        names, notes = tuple(facts["class_names"]), tuple(map(str, facts.get("notes", ())))
        return Classifier(facts["arch"], None, {}, names, kind(**facts["decode"]), network, notes)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the .json beside {path} was not written by --export ({error!r}): export again") from error


def export_network(classifier: Classifier, path: Path) -> None:
    """Writes a network with its weights and the normalization of pictures as StableHLO."""
    preparation = classifier.preparation
    params, batch_stats = weights.from_torch(classifier.arrays)

    def network(images: jax.Array) -> jax.Array:
        x = normalize(to_unit_range(images), preparation.mean, preparation.std)
        return resnet.apply(classifier.config, params, batch_stats, x, train=False).logits

    facts = {
        "arch": classifier.arch,
        "class_names": list(classifier.class_names),
        "preparation": preparation.text,
        "notes": classifier.notes,
        "decode": dataclasses.asdict(preparation),
    }
    with jax.default_matmul_precision("highest"):  # on a GPU float32 would be TF32, on a TPU bfloat16
        stablehlo.write(path, network, preparation.shape, facts)


def read_pictures(paths: Sequence[Path], decode: Callable[[bytes], np.ndarray]) -> np.ndarray:
    """Decodes the files to (N, H, W, C) uint8; a ValueError names all that cannot be read."""
    images, failures = [], []
    for path in paths:
        try:
            images.append(decode(read_file(path)))
        except IsADirectoryError:
            failures.append(f"{path} (a folder: name the pictures in it, {path}/*.jpg)")
        except Exception as error:  # Pillow raises almost any type for a broken file
            failures.append(f"{path} ({reason_of(error)})")
    if failures:
        listed = ", ".join(map(printable, failures))
        raise ValueError(f"{len(failures)} of {len(paths)} pictures cannot be read: {listed}")
    return np.stack(images)


def normalizing_network(framework: str, classifier: Classifier) -> Logits:
    """The network as a function: uint8 pictures (N, H, W, C) -> logits (N, num_classes)."""
    preparation = classifier.preparation
    names = ("num_classes", "in_channels", "stride_in", "batch_norm")
    options = {name: getattr(classifier.config, name) for name in names}
    network = adapter(framework).make_logits(ResNet(classifier.arch, **options), classifier.arrays)
    return lambda images: network(normalize(to_unit_range(images), preparation.mean, preparation.std))


def compute_logits(framework: str, classifier: Classifier, images: np.ndarray) -> np.ndarray:
    """Runs the network on uint8 pictures (N, H, W, C), in batches of one size.

    Returns:
      logits, (N, num_classes) float32.

    Raises:
      ValueError: the logits are not finite.
    """
    network = classifier.exported or normalizing_network(framework, classifier)
    size = min(len(images), BATCH_SIZE)
    batches = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        full = np.resize(batch, (size, *batch.shape[1:]))  # repeats pictures, since another size would compile again
        batches.append(network(full)[: len(batch)])
    logits = np.concatenate(batches)
    if not np.isfinite(logits).all():
        raise ValueError("the network's logits are not finite: its weights are too large")
    return logits


def answers_of(settings: Settings, classifier: Classifier) -> dict[str, list[dict[str, Any]]]:
    """{picture: its most probable classes, the first one the most probable}."""
    images = read_pictures(settings.pictures, classifier.preparation.decode)
    logits = compute_logits(settings.framework, classifier, images)
    answers = {}
    for path, row in zip(settings.pictures, softmax(logits.astype(np.float64), axis=-1), strict=True):
        chosen = np.argsort(-row, kind="stable")[: settings.top].tolist()
        answers[str(path)] = [
            {"class": classifier.class_names[number], "number": number, "probability": float(row[number])}
            for number in chosen
        ]
    return answers
