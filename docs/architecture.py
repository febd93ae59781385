"""Draws docs/architecture.png from the import contracts in pyproject.toml: `python docs/architecture.py`."""

import tomllib
from pathlib import Path

from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
COLOURS = {"experiments": "#dfe8f3", "libraries": "#f3e6d0"}
LABELS = ("programs and\nlaboratories", "training", "data and\nframeworks", "output", "basics", "libraries")


def floors() -> list[list[str]]:
    """The floors of the contracts, from the top: those inside experiments, then the three implementations."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    inside = next(found for found in layers if "experiments" not in found)
    outside = next(found for found in layers if "experiments" in found)
    return [[name.strip("() ") for name in floor.replace("|", ":").split(":")] for floor in (*inside, outside[-1])]


def draw(path: Path) -> None:
    rows = floors()
    figure, axis = plt.subplots(figsize=(7.2, 0.9 * len(rows) + 0.6), layout="constrained")
    for number, row in enumerate(rows):
        y = len(rows) - number
        colour = COLOURS["libraries" if number == len(rows) - 1 else "experiments"]
        split = [row[:6], row[6:]] if len(row) > 6 else [row]
        for line, names in enumerate(split):
            top = y + 0.19 * (len(split) - 1) - 0.38 * line
            for place, name in enumerate(names):
                x = 0.17 + 0.83 * (place + 0.5) / len(names)
                box = dict(boxstyle="round,pad=0.35", fc=colour, ec="#55606b")
                axis.text(x, top, name, ha="center", va="center", fontsize=10.5, bbox=box)
        axis.text(-0.02, y, LABELS[number], va="center", fontsize=9.5, color="#55606b")
        if number < len(rows) - 1:
            axis.annotate(
                "", (0.585, y - 0.66), (0.585, y - 0.34), arrowprops=dict(arrowstyle="->", color="#55606b", lw=1.5)
            )
    axis.set(xlim=(-0.02, 1.02), ylim=(0.5, len(rows) + 0.6))
    axis.set_axis_off()
    axis.axhline(1.5, color="#55606b", lw=1, ls=":")
    axis.text(1.02, 1.53, "experiments", ha="right", va="bottom", fontsize=9.5, style="italic", color="#55606b")
    axis.set_title("Imports go downwards only", fontsize=12)
    figure.savefig(path, dpi=130, metadata={"Description": str(rows)})  # for the test that checks what was drawn
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).with_name("architecture.png"))
