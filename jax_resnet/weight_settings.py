"""The settings that timm and Hugging Face put beside a weight file, and the values that a plain ResNet must have."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_resnet import resnet
from jax_resnet.weight_checks import ARCHITECTURES
from jax_resnet.weight_files import FOLDER_FILES

__all__ = ["SETTINGS_FILES", "check_settings", "of_backbone", "settings_beside"]

SETTINGS_FILES = ("config.json", "preprocessor_config.json")

# Arguments of timm's networks that change nothing in evaluation except shapes, which the arrays show.
_HARMLESS = {"num_classes", "in_chans", "drop_rate", "drop_path_rate", "zero_init_last", "pretrained"}


def settings_beside(path: Path) -> dict[str, Any]:
    """Reads the settings of the Hugging Face folder or training run that holds path; returns {} for other files.

    Raises:
      ValueError: a settings file cannot be read.
    """
    if path.is_file() and path.name not in FOLDER_FILES:
        return {}
    folder = path.parent if path.is_file() else path.parent.parent
    settings: dict[str, Any] = {}
    for name in SETTINGS_FILES:
        if (folder / name).is_file():
            try:
                with (folder / name).open("rb") as file:
                    read = json.loads(file.read(2**24))  # a larger file is cut and refused
            except (OSError, ValueError, RecursionError) as error:
                raise ValueError(f"{folder / name} cannot be read: {error}") from error
            settings |= read if isinstance(read, dict) else {}  # a list is another program's
    return settings


def of_backbone(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of Hugging Face's settings about the ResNet: a detector nests the settings of its backbone."""
    if isinstance(backbone := settings.get("backbone_config"), Mapping):
        return backbone
    return settings if "resnet" in str(settings.get("model_type", "resnet")) else {}


def check_settings(settings: Mapping[str, Any], path: Path) -> None:
    """Raises a ValueError for settings that change what a network computes without changing its arrays.

    Args:
      settings: timm's or Hugging Face's, as `settings_beside` returns them.
      path: the weight file's name for the message.
    """
    plain = [getattr(resnet, name)() for name in ARCHITECTURES]
    of_hugging_face: dict[str, list[Any]] = {
        "hidden_act": ["relu"],
        "downsample_in_first_stage": [False],
        "layer_type": ["basic", "bottleneck"],
        "embedding_size": [64],
        "hidden_sizes": [[64, 128, 256, 512], [256, 512, 1024, 2048]],
        "depths": [list(config.stage_sizes) for config in plain],
    }
    backbone = of_backbone(settings)
    wrong = [name for name, known in of_hugging_face.items() if name in backbone and backbone[name] not in known]
    problems = [f"{name} {backbone[name]!r}" for name in wrong]
    both = {**settings, **backbone}
    for name in ("architecture", "backbone"):  # after the dot timm names the training recipe
        told = str(both.get(name) or "resnet18").lower().removeprefix("tv_").split(".")[0]
        if re.sub("[-_]", "", told) not in ARCHITECTURES:
            problems.append(f"{name} {both[name]!r}")
    plain_values: dict[str, list[Any]] = {"global_pool": ["avg", ""], "dilation": [False], "output_stride": [32]}
    for name, known in plain_values.items():
        number_one = name == "dilation" and type(both.get(name)) is int and both[name] == 1  # pixels, not whether
        if both.get(name) is not None and both[name] not in known and not number_one:
            problems.append(f"{name} {both[name]!r}")
    arguments = settings.get("model_args")
    if isinstance(arguments, Mapping) and set(arguments) - _HARMLESS:
        problems.append(f"model_args {arguments!r}")
    if problems:
        raise ValueError(
            f"{path} is refused: the config.json beside it says {'; '.join(problems)[:300]}. This is no plain ResNet"
        )
