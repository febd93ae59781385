"""The outlines of drawn cars; each class has its own.

Coordinates are in units of the car's length: x runs from the rear (0) to the front (1), y from the ground up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

Points = list[tuple[float, float]]
Part = tuple[str, Points, float]  # material, outline, radius of its corners
Vary = Callable[[float, float], float]  # vary(value, spread): uniform in value ± spread


@dataclasses.dataclass(frozen=True)
class Shape:
    """parts: painted in this order; wheels: (x of the hub, radius)."""

    parts: list[Part]
    wheels: list[tuple[float, float]]


def _sedan(vary: Vary) -> Shape:
    """Three boxes: bonnet, cabin, boot."""
    belt, roof = vary(0.25, 0.015), vary(0.41, 0.02)
    rear, front = vary(0.16, 0.025), vary(0.73, 0.025)
    roof_rear, roof_front = rear + vary(0.14, 0.025), front - vary(0.14, 0.025)
    body = [(0, 0.09), (0, belt - 0.03), (0.02, belt), (rear, belt + 0.01), (roof_rear, roof), (roof_front, roof)]
    body += [(front, belt), (0.94, belt - 0.03), (1, belt - 0.08), (1, 0.09)]
    glass = _panes(2, (rear + 0.05, front - 0.04), (roof_rear + 0.02, roof_front - 0.015), (belt + 0.01, roof - 0.03))
    door = _door((rear + front) / 2 + 0.01, 0.13, belt)
    return Shape([("paint", body, 0.04), *glass, door, *_lamps(belt - 0.06)], _wheels(vary, 0.2, 0.8, 0.085))


def _suv(vary: Vary) -> Shape:
    """Two boxes: a bonnet, and an upright cabin to the rear. It stands higher than a sedan, on larger wheels."""
    belt, roof = vary(0.30, 0.015), vary(0.48, 0.025)
    front = vary(0.74, 0.025)
    roof_rear, roof_front = vary(0.05, 0.025), front - vary(0.10, 0.02)
    body = [(0, 0.12), (0, belt), (roof_rear, roof), (roof_front, roof), (front, belt), (0.96, belt - 0.02)]
    body += [(1, belt - 0.07), (1, 0.12)]
    glass = _panes(3, (0.05, front - 0.04), (roof_rear + 0.035, roof_front - 0.015), (belt + 0.01, roof - 0.035))
    rail = ("trim", _box(roof_rear + 0.05, roof_front - 0.04, roof, roof + 0.015), 0)
    door = _door(vary(0.45, 0.02), 0.16, belt)
    return Shape([rail, ("paint", body, 0.035), *glass, door, *_lamps(belt - 0.06)], _wheels(vary, 0.2, 0.8, 0.1))


def _pickup(vary: Vary) -> Shape:
    """A cabin in the middle and an open bed behind it."""
    belt, roof, bed = vary(0.28, 0.015), vary(0.46, 0.025), vary(0.27, 0.015)
    cab, front = vary(0.40, 0.03), vary(0.76, 0.02)
    roof_front = front - vary(0.11, 0.02)
    body = [(0, 0.12), (0, bed), (cab, bed), (cab + 0.01, roof), (roof_front, roof), (front, belt)]
    body += [(0.96, belt - 0.02), (1, belt - 0.07), (1, 0.12)]
    glass = _panes(2, (cab + 0.035, front - 0.04), (cab + 0.04, roof_front - 0.015), (belt + 0.01, roof - 0.035))
    edge = ("trim", _box(0, cab, bed - 0.005, bed + 0.012), 0)
    door = _door(cab + 0.02, 0.16, belt)
    return Shape([("paint", body, 0.02), edge, *glass, door, *_lamps(belt - 0.06)], _wheels(vary, 0.2, 0.82, 0.095))


def _cabriolet(vary: Vary) -> Shape:
    """No roof: a windscreen, seats and the folded top behind them."""
    belt, top = vary(0.25, 0.015), vary(0.39, 0.02)
    rear, front = vary(0.28, 0.025), vary(0.68, 0.025)
    slant = vary(0.10, 0.02)
    body = [(0, 0.09), (0, belt - 0.03), (0.03, belt + 0.01), (rear, belt + 0.01), (rear + 0.03, belt - 0.02)]
    body += [(front - 0.06, belt - 0.02), (front, belt), (0.93, belt - 0.03), (1, belt - 0.09), (1, 0.09)]
    screen = [(front - 0.03, belt), (front - slant - 0.02, top), (front - slant + 0.005, top), (front + 0.01, belt)]
    hood = [(rear - 0.12, belt), (rear - 0.1, belt + 0.035), (rear, belt + 0.045), (rear + 0.02, belt)]
    parts = [("trim", hood, 0.02)]
    for x in (rear + vary(0.05, 0.01), front - vary(0.20, 0.015)):
        seat = [(x, belt - 0.03), (x - 0.02, top - 0.05), (x + 0.03, top - 0.05), (x + 0.05, belt - 0.03)]
        parts.append(("seat", seat, 0.02))
    parts += [("glass", screen, 0), ("paint", body, 0.04), _door(front - 0.27, 0.13, belt - 0.02), *_lamps(belt - 0.06)]
    return Shape(parts, _wheels(vary, 0.2, 0.8, 0.088))


def _bus(vary: Vary) -> Shape:
    """One long box with a row of windows and a door at the front."""
    belt, roof = vary(0.27, 0.02), vary(0.48, 0.025)
    body = [(0, 0.085), (0, roof), (vary(0.975, 0.015), roof), (1, belt), (1, 0.085)]
    glass = _panes(int(vary(5.5, 1.5)), (0.03, 0.84), (0.03, 0.84), (belt, roof - 0.05))
    door = ("glass", _box(0.865, 0.945, 0.11, roof - 0.05), 0.01)
    stripe = ("second", _box(0, 0.85, belt - 0.06, belt - 0.035), 0)
    return Shape([("paint", body, 0.04), stripe, *glass, door, *_lamps(0.15)], _wheels(vary, 0.22, 0.76, 0.075))


def _truck(vary: Vary) -> Shape:
    """A lorry: a cab and a closed box behind it on a chassis."""
    belt, cab_roof, roof = vary(0.28, 0.015), vary(0.43, 0.02), vary(0.51, 0.025)
    cab = vary(0.70, 0.025)
    cabin = [(cab, 0.11), (cab, cab_roof), (vary(0.93, 0.02), cab_roof), (0.985, belt), (1, belt - 0.06), (1, 0.11)]
    glass = _panes(1, (cab + 0.07, 0.955), (cab + 0.07, 0.92), (belt + 0.005, cab_roof - 0.03))
    box = ("second", _box(0, cab - vary(0.03, 0.01), 0.165, roof), 0.008)
    chassis = ("trim", _box(0.01, cab + 0.05, 0.115, 0.165), 0)
    door = _door(cab + 0.05, 0.13, belt)
    wheels = _wheels(vary, 0.2, 0.84, 0.085)
    if vary(0.5, 0.5) < 0.5:
        wheels.append((wheels[0][0] + 2.1 * wheels[0][1], wheels[0][1]))
    return Shape([chassis, box, ("paint", cabin, 0.03), *glass, door, *_lamps(0.17)], wheels)


SHAPES: dict[str, Callable[[Vary], Shape]] = {
    "sedan": _sedan,
    "SUV": _suv,
    "pickup": _pickup,
    "cabriolet": _cabriolet,
    "bus": _bus,
    "truck": _truck,
}
CLASS_NAMES: tuple[str, ...] = tuple(SHAPES)


def _box(left: float, right: float, bottom: float, top: float) -> Points:
    return [(left, bottom), (left, top), (right, top), (right, bottom)]


def _panes(count: int, low: tuple[float, float], high: tuple[float, float], heights: tuple[float, float]) -> list[Part]:
    """`count` side windows: their lower edges span low[0] to low[1] in x, their upper edges high[0] to high[1]."""

    def at(edge: int, t: float) -> tuple[float, float]:
        left, right = (low, high)[edge]
        return left + t * (right - left), heights[edge]

    pillar = 0.02 / (low[1] - low[0])
    starts = np.linspace(0, 1 + pillar, count + 1)
    return [
        ("glass", [at(0, start), at(1, start), at(1, stop), at(0, stop)], 0.012)
        for start, stop in zip(starts[:-1], starts[1:] - pillar, strict=True)
    ]


def _door(x: float, bottom: float, top: float) -> Part:
    return "seam", _box(x, x + 0.012, bottom, top), 0


def _lamps(y: float) -> list[Part]:
    return [
        ("tail lamp", _box(0, 0.025, y - 0.02, y + 0.025), 0),
        ("head lamp", _box(0.96, 1, y - 0.025, y + 0.02), 0.01),
    ]


def _wheels(vary: Vary, rear: float, front: float, radius: float) -> list[tuple[float, float]]:
    radius = vary(radius, 0.008)
    return [(vary(rear, 0.02), radius), (vary(front, 0.02), radius)]


def rounded(outline: Points, radius: float) -> Points:
    """The closed outline with corners rounded by quadratic Bézier curves that start min(radius, edge / 2) away."""
    if radius == 0:
        return outline
    corners = np.array(outline)
    rounded = []
    for before, corner, after in zip(np.roll(corners, 1, 0), corners, np.roll(corners, -1, 0), strict=True):
        start, stop = (
            corner + (other - corner) * min(0.5, radius / (np.hypot(*(other - corner)) + 1e-9))
            for other in (before, after)
        )
        rounded += [tuple((1 - t) ** 2 * start + 2 * t * (1 - t) * corner + t**2 * stop) for t in (0, 0.33, 0.67, 1)]
    return rounded
