"""Classifies pictures with a ResNet; its weights come from torchvision, from any weight file, or from a run.

    python -m experiments.classify beagle.jpg --weights torchvision
    python -m experiments.classify beagle.jpg lynx.jpg --weights resnet50.pth --framework numpy
    python -m experiments.classify car.jpg --weights runs/cars
    python -m experiments.classify --weights runs/cars --export cars.stablehlo
    python -m experiments.classify car.jpg --weights cars.stablehlo

Pictures are prepared as in the network's training. For ImageNet, the settings beside the weight file say how (timm's
config.json, Hugging Face's preprocessor_config.json); without such settings, the result is equal bit for bit to
torchvision's `weights.transforms()`. The weight file of a run of experiments.cars holds the preparation and the class
names. Whole pictures are used then: if the run cut its pictures to the car, cut yours first. An exported network (see
`stablehlo`) contains its weights and the normalization, and needs no weight file.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Literal

import tyro

from experiments.cli import Arch, exit_code, parse


@dataclasses.dataclass(frozen=True)
class Settings:
    """Classify pictures. Like torchvision, this ignores the orientation that EXIF data give."""

    pictures: tyro.conf.Positional[tuple[Path, ...]]
    """Files in any format that Pillow reads."""
    weights: str
    """A weight file of any kind, or .stablehlo; the folder of a run (finished or not) or one of its checkpoints;
    hf:OWNER/NAME for Hugging Face's hub; or torchvision, which downloads weights for ImageNet."""
    arch: Arch | None = None
    """The network [default: a file's own, resnet101 for torchvision]."""
    framework: Literal["jax", "numpy", "torch"] = "jax"
    """The framework that computes."""
    top: int = 5
    """How many classes to name, the most probable first."""
    version: Literal["V1", "V2"] | None = None
    """Version of torchvision's weights, IMAGENET1K_V1 or V2 [default: torchvision's default, V2 if it exists]."""
    entry: str | None = None
    """Which network to take from a file with several, such as model_ema or teacher [default: the trained one]."""
    resize: int | None = None
    """The shorter side of a picture in pixels, before the central 224x224 are cut out [default: what the settings
    beside the file say; 232 for torchvision's V2 weights, recognized by file name; 256 for all others]."""
    json: bool = False
    """Print JSON instead of tables."""
    export: Path | None = None
    """Write the network to FILE.stablehlo, and how pictures are decoded to FILE.stablehlo.json; takes no pictures."""


def classify(settings: Settings) -> None:
    """Prints the most probable classes of each picture, or exports the network.

    Raises:
      FileNotFoundError, ValueError: for bad input, with a message for the user.
    """
    from experiments.classify.classifier import answers_of, check_settings, export_network, load_classifier
    from experiments.data.pictures import printable

    check_settings(settings)
    classifier = load_classifier(settings)
    about = {
        "arch": classifier.arch,
        "weights": settings.weights,
        "framework": settings.framework,
        "preparation": classifier.preparation.text,
        "notes": classifier.notes,
    }
    if settings.export is not None:
        export_network(classifier, settings.export)
        title = f"wrote {settings.export} and {settings.export}.json: {about['arch']}, {about['preparation']}"
        print(title, *classifier.notes, sep="\n")
        return
    answers = answers_of(settings, classifier)
    if settings.json:
        print(json.dumps(about | {"pictures": answers}, indent=1, ensure_ascii=False))
        return
    title = f"{about['arch']}, {about['weights']}, {about['framework']}; pictures: {about['preparation']}"
    print(title, *classifier.notes, sep="\n")
    for picture, rows in answers.items():
        print(f"\n{printable(picture)}")
        for row in rows:
            print(f"  {row['probability']:8.3%}  {row['class']}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: classify(parse(Settings, arguments, "classify")))


if __name__ == "__main__":
    sys.exit(main())
