"""Draws the figures of docs/batchnorm.md and docs/backprop-resnet.md, next to them.

    python docs/figures.py

They are as wide as a phone: 4.5 inches with letters of at least 9 points.
"""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from numpy_ref import config as architecture
from numpy_ref import resnet
from numpy_ref.convolution import fold, unfold

FOLDER = Path(__file__).parent
DIGEST = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
WIDTH, DPI = 4.5, 200
INK, GREY, BLUE, ORANGE, GREEN = "#222222", "#bbbbbb", "#1f77b4", "#d95f02", "#1b9e77"
FILL = "#f2f2ee"

Point = tuple[float, float]


def canvas(height: float, x: tuple[float, float], y: tuple[float, float]) -> tuple[plt.Figure, Axes]:
    figure, axes = plt.subplots(figsize=(WIDTH, height), layout="constrained")
    axes.set(xlim=x, ylim=y)
    axes.axis("off")
    return figure, axes


def box(
    axes: Axes, at: Point, text: str, width: float, height: float = 0.62, fill: str = FILL, size: float = 10
) -> None:
    corner = at[0] - width / 2, at[1] - height / 2
    style = "round,pad=0,rounding_size=0.1"
    axes.add_patch(FancyBboxPatch(corner, width, height, style, facecolor=fill, edgecolor=INK, linewidth=1, zorder=2))
    axes.text(*at, text, ha="center", va="center", fontsize=size, color=INK, zorder=3)


def arrow(axes: Axes, start: Point, end: Point, color: str = INK, width: float = 1.4) -> None:
    style = dict(arrowstyle="-|>", mutation_scale=11, color=color, linewidth=width, shrinkA=1, shrinkB=1, zorder=4)
    axes.add_patch(FancyArrowPatch(start, end, **style))


def grid(axes: Axes, corner: Point, values: np.ndarray, colors: np.ndarray, size: float = 10, side: float = 1) -> None:
    """Draws a matrix as square cells, its first row at the top; corner is the upper left corner."""
    colors = np.broadcast_to(colors, values.shape)
    for (i, j), value in np.ndenumerate(values):
        x, y = corner[0] + side * j, corner[1] - side * (i + 1)
        axes.add_patch(Rectangle((x, y), side, side, facecolor=colors[i, j], edgecolor=INK, linewidth=0.8))
        text = value if isinstance(value, str) else f"{value:g}"
        axes.text(x + side / 2, y + side / 2, text, ha="center", va="center", fontsize=size, color=INK)


def save(figure: plt.Figure, name: str) -> None:
    # The description lets a test see that this file was changed after a figure was drawn.
    figure.savefig(FOLDER / f"{name}.png", dpi=DPI, metadata={"Description": DIGEST})
    plt.close(figure)


def batchnorm_graph() -> None:
    """How x flows through BatchNorm, and the three paths on which the gradient comes back."""
    figure, axes = canvas(4.4, (-0.2, 8.7), (-0.7, 7.6))
    box(axes, (1.6, 6.9), "x", 1.2)
    box(axes, (5.6, 5.6), "mean μ", 1.8)
    box(axes, (1.6, 4.4), "x − μ", 1.6)
    box(axes, (5.6, 3.1), "variance v", 2.3)
    box(axes, (1.6, 1.7), "x̂ = (x − μ) / σ", 3.2)
    box(axes, (1.6, 0.0), "y = γ·x̂ + β", 2.6)
    for upper, lower in itertools.pairwise((6.9, 4.4, 1.7, 0.0)):
        arrow(axes, (1.3, upper - 0.35), (1.3, lower + 0.35), GREY)
    arrow(axes, (2.2, 6.75), (4.9, 5.95), GREY)
    arrow(axes, (4.7, 5.5), (2.43, 4.72), GREY)
    arrow(axes, (2.43, 4.08), (4.45, 3.25), GREY)
    arrow(axes, (4.45, 2.85), (2.6, 2.05), GREY)
    arrow(axes, (1.9, 0.35), (1.9, 1.35), INK, width=2)
    arrow(axes, (1.9, 2.05), (1.9, 4.05), BLUE, width=2)
    arrow(axes, (1.75, 4.75), (1.75, 6.55), BLUE, width=2)
    arrow(axes, (2.05, 4.75), (2.05, 6.55), GREEN, width=2)
    arrow(axes, (3.2, 1.95), (5.2, 2.75), GREEN, width=2)
    arrow(axes, (4.8, 3.43), (2.43, 4.29), GREEN, width=2)
    arrow(axes, (2.43, 4.51), (4.85, 5.27), ORANGE, width=2)
    arrow(axes, (5.2, 5.95), (2.25, 7.0), ORANGE, width=2)
    axes.text(2.15, 0.85, "dy", fontsize=11, color=INK, va="center")
    axes.text(2.45, 7.25, "dx: all three added", fontsize=9.5, color=INK, va="center")
    paths = [(2.3, 3.05, BLUE, "through x̂"), (5.2, 6.5, ORANGE, "through the mean")]
    paths.append((5.2, 4.05, GREEN, "through the variance"))
    for number, (x, y, color, text) in enumerate(paths, start=1):
        axes.text(x, y, str(number), fontsize=13, color=color, weight="bold", ha="center", va="center")
        axes.text(
            8.7, -0.75 + 0.5 * (4 - number), f"{number}  {text}", fontsize=9.5, color=color, ha="right", va="center"
        )
    axes.text(8.7, 1.6, "grey: forward\nothers: gradients", fontsize=9.5, color=INK, ha="right", va="center")
    save(figure, "batchnorm-graph")


def resnet_shapes() -> None:
    """Height, width and channels through ResNet-50 for a picture of 224x224."""
    config = resnet.resnet50()
    rows = [("picture", 224, 3, "white"), ("conv 7×7, stride 2", 112, 64, FILL), ("max-pool, stride 2", 56, 64, FILL)]
    side = 56
    for stage, count in enumerate(config.stage_sizes, start=1):
        side = side if stage == 1 else side // 2
        width = architecture.STAGE_WIDTHS[stage - 1]
        rows.append((f"layer{stage}: {count} bottlenecks", side, 4 * width, "#d7e6f2"))
    rows += [("mean over the picture", 1, 2048, FILL), ("dense", 1, 1000, FILL)]
    figure, axes = canvas(5.0, (0, 10), (-len(rows) + 0.2, 1.0))
    axes.text(0, 0.75, "side (wide),\nchannels (high),\nnot to scale", fontsize=9, ha="left", va="center")
    axes.text(3.35, 0.75, "layer", fontsize=9, ha="left", va="center")
    axes.text(9.9, 0.75, "H × W × C", fontsize=9, ha="right", va="center")
    for i, (name, side, channels, fill) in enumerate(rows):
        length = 2.2 * np.sqrt(side / 224)
        thick = 0.16 + 0.13 * np.log2(channels) / 2
        corner = 1.1 - length / 2, -i - thick / 2
        axes.add_patch(Rectangle(corner, length, thick, facecolor=fill, edgecolor=INK, linewidth=1))
        axes.text(3.35, -i, name, fontsize=10, va="center")
        shape = f"{side} × {side} × {channels}" if side > 1 else str(channels)
        axes.text(9.9, -i, shape, fontsize=10, va="center", ha="right")
        if i:
            arrow(axes, (2.75, -i + 0.72), (2.75, -i + 0.28), GREY)
    save(figure, "resnet-shapes")


PICTURE = np.arange(1.0, 17).reshape(4, 4)
SEEN, SEEN_TWICE = ["#9ecae1", "#fdd0a2"], "#cdb8d8"  # by the first patch, by the last, by both


def seen_by() -> np.ndarray:
    """The colours of a 4x4 picture's pixels, by the patches that they are in."""
    colors = np.full((4, 4), "white", object)
    colors[1:, 1:] = SEEN[1]
    colors[:3, :3] = SEEN[0]
    colors[1:3, 1:3] = SEEN_TWICE
    return colors


def im2col() -> None:
    """A 4x4 picture and its four 3x3 patches as rows."""
    patches = unfold(PICTURE[None, :, :, None], 3, 3, 1, 0)
    figure, axes = canvas(4.6, (-0.3, 10.6), (-12.4, 1.2))
    axes.text(0, 0.5, "picture", fontsize=10)
    grid(axes, (0, 0), PICTURE, seen_by())
    axes.text(
        4.7,
        -2,
        "3×3 kernel, stride 1:\nfour patches.\nBlue: the first, orange: the\nlast, purple: in both.",
        fontsize=10,
        va="center",
    )
    axes.text(0, -5.5, "unfold: each patch is a row", fontsize=10)
    grid(axes, (0, -5.9), patches, np.array([[SEEN[0]], ["white"], ["white"], [SEEN[1]]]), 9.5)
    axes.text(9.3, -7.9, "·", fontsize=14, va="center", ha="center")
    grid(axes, (9.75, -5.9), np.full((9, 1), ""), np.array("white"), side=4 / 9)
    axes.text(9.97, -5.5, "w", fontsize=11, ha="center")
    arrow(axes, (4.6, -10.05), (4.6, -10.95), INK)
    axes.text(0, -11.9, "y = patches · w,  4 values of a 2×2 output", fontsize=10)
    save(figure, "im2col")


def fold_figure() -> None:
    """A pixel receives one gradient from each patch that contains it."""
    gradients = np.repeat(10.0 ** np.arange(4)[:, None], 9, axis=1)
    sums = fold(gradients, (1, 4, 4, 1), 3, 3, 1, 0)[0, :, :, 0]
    figure, axes = canvas(3.7, (-0.3, 10.6), (-10.6, 1.2))
    axes.text(0, 0.5, "gradients of the patches, dy · wᵀ", fontsize=10)
    grid(axes, (0, 0), gradients, np.array([[SEEN[0]], ["white"], ["white"], [SEEN[1]]]), 9)
    axes.text(0, -5.3, "fold: each value goes back to its pixel, values meet and add", fontsize=9.5)
    grid(axes, (0, -5.8), sums, seen_by(), 9)
    axes.text(
        4.5,
        -7.8,
        "here the gradients are 1, 10,\n100, 1000 by patch: a corner is\nin one, the centre in all four",
        fontsize=10,
        va="center",
    )
    save(figure, "fold")


def bottleneck() -> None:
    """One bottleneck: grey forward, orange backward; gradients add where x was used twice."""
    figure, axes = canvas(5.6, (-0.2, 8.6), (-0.6, 10.4))
    steps = ["conv1 1×1", "BatchNorm, ReLU", "conv2 3×3", "BatchNorm, ReLU", "conv3 1×1", "BatchNorm"]
    heights = [8.4 - 1.05 * i for i in range(len(steps))]
    box(axes, (2.7, 9.7), "x", 1.3)
    for text, y in zip(steps, heights, strict=True):
        box(axes, (2.7, y), text, 3.3)
    box(axes, (2.7, 1.75), "+", 0.8)
    box(axes, (2.7, 0.65), "ReLU", 1.7)
    stops = [9.7, *heights, 1.75, 0.65]
    for upper, lower in itertools.pairwise(stops):
        arrow(axes, (2.45, upper - 0.32), (2.45, lower + 0.32), GREY)
        arrow(axes, (2.95, lower + 0.32), (2.95, upper - 0.32), ORANGE, width=2)
    arrow(axes, (2.45, 0.33), (2.45, -0.45), GREY)
    arrow(axes, (2.95, -0.45), (2.95, 0.33), ORANGE, width=2)
    axes.text(3.2, -0.25, "dy", fontsize=11, color=ORANGE, va="center")
    axes.text(2.2, -0.25, "y", fontsize=11, color="#777777", va="center", ha="right")
    for x, color, ends in [(6.6, GREY, (9.85, 1.65)), (6.1, ORANGE, (1.9, 9.55))]:
        start, end = ((3.4, ends[0]), (3.15, ends[1])) if color == GREY else ((3.15, ends[0]), (3.4, ends[1]))
        axes.plot([start[0], x, x], [start[1], start[1], end[1]], color=color, lw=1.4 if color == GREY else 2)
        arrow(axes, (x, end[1]), end, color, width=1.4 if color == GREY else 2)
    axes.text(6.8, 5.6, "shortcut:\nx itself, or a\n1×1 projection", fontsize=9, va="center")
    axes.text(3.6, 10.25, "dx = both added", fontsize=10, color=ORANGE, va="center")
    axes.text(3.75, 1.15, "d, the same gradient,\ngoes both ways", fontsize=9, color=ORANGE, va="center")
    save(figure, "bottleneck")


FIGURES = (batchnorm_graph, resnet_shapes, im2col, fold_figure, bottleneck)


if __name__ == "__main__":
    for draw in FIGURES:
        draw()
