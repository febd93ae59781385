"""Trains a ResNet on pictures of cars: Stanford Cars if you have them, drawn cars otherwise.

    python -m experiments.cars --opt adabound                    # draws its own cars: ResNet-101, minutes on a CPU
    python -m experiments.cars --opt adabound --data DIR         # Stanford Cars, grey 96x96 crops (preset cars96)
    python -m experiments.cars --compare jax,torch --epochs 1    # in turn; overlays their curves

A run leaves a folder with its settings, metrics, curves, some predictions and the weights.
"""

from __future__ import annotations

from experiments.machine import use_huge_pages

if __name__ == "__main__":
    use_huge_pages()  # before imports that the restart would repeat

import sys
from typing import get_args

from experiments.cli import exit_code
from experiments.compare import start
from experiments.frameworks.experiment import TITLES, FrameworkName
from experiments.training.settings import Settings, parse_settings


def train(settings: Settings) -> int | None:
    """Trains in one framework, once the processes are connected; see `train_and_report`."""
    from experiments.training.loop import count_steps
    from experiments.training.prepare import load_cars, prepare_cars
    from experiments.training.run import train_and_report

    dataset, experiment = load_cars(settings), settings.experiment
    steps = experiment.epochs * count_steps(dataset.train, experiment.batch_size)
    if experiment.gamma_times_steps is not None:
        settings = settings.replace(gamma=experiment.gamma_times_steps / steps)
    network = experiment.arch
    if experiment.framework == "torchvision":
        network = f"torchvision's {network} in PyTorch"
    elif experiment.framework != "jax":
        network += f" in {TITLES[experiment.framework]}"
    return train_and_report(settings, dataset, network, prepare_cars)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: start(train, parse_settings(arguments), get_args(FrameworkName)))


if __name__ == "__main__":
    sys.exit(main())
