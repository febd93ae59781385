"""Drawn cars: side views of six kinds of cars, painted from a seed, for a machine that has no data set.

The classes differ in the outline of the body and in nothing else. Colours, light, ground, backdrop, facing direction,
place, size and noise are drawn without looking at the class, and a body may be lighter or darker than what is behind
it, so that no single pixel speaks for a class: a linear classifier on raw pixels finds little, a ConvNet soon finds
all of it. What can be measured of this is in tests/experiments/data/test_drawn_cars.py.

A shape is written in units of the car's length, x from the rear (0) to the front (1), y from the ground up.
"""

from __future__ import annotations

import colorsys
import dataclasses
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from experiments.data.dataset import Dataset, Split

Colour = tuple[int, int, int]
Points = list[tuple[float, float]]
Part = tuple[str, Points, float]  # material, outline, radius of its corners
Vary = Callable[[float, float], float]  # vary(value, spread): uniform in value ± spread

SMALLEST_SIDE = 32
_SUPERSAMPLING = 4
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_TRAIN, _TEST = 0, 1  # the splits' random streams


def drawn_cars(
    image_size: tuple[int, int], train_count: int = 1500, test_count: int = 480, *, grey: bool, seed: int
) -> Dataset:
    """Draws the data set. Picture i of a split depends on the seed, the split, i and the size, not on the counts.

    Args:
      image_size: (height, width) in pixels, each >= 32.
      train_count: number of pictures to train on; every class gets its share, to within one.
      test_count: likewise, to test on; from a random stream of their own.
      grey: one channel (BT.601 luma of the same pictures) rather than RGB.
      seed: >= 0.

    Returns:
      A Dataset with the title "drawn cars".

    Raises:
      ValueError: a size, a count or a seed out of range.
    """
    _check(train_count=(train_count, 1), test_count=(test_count, 1), seed=(seed, 0))
    return Dataset(
        title="drawn cars",
        class_names=CLASS_NAMES,
        train=_draw_split(image_size, train_count, grey, seed, _TRAIN),
        test=_draw_split(image_size, test_count, grey, seed, _TEST),
        source={
            "drawn": True,
            "image_size": list(image_size),
            "train_count": train_count,
            "test_count": test_count,
            "grey": bool(grey),
            "seed": seed,
        },
    )


def draw_car(class_name: str, image_size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """Draws one car in a scene of its own.

    Args:
      class_name: one of CLASS_NAMES.
      image_size: (height, width) in pixels, each >= 32.
      generator: where all the randomness comes from.

    Returns:
      (height, width, 3) uint8, RGB.
    """
    if class_name not in _SHAPES:
        raise ValueError(f"class_name must be one of {', '.join(CLASS_NAMES)}, got {class_name!r}")
    height, width = image_size
    _check(height=(height, SMALLEST_SIDE), width=(width, SMALLEST_SIDE))
    canvas = Image.new("RGB", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
    scene = _Scene.drawn(generator)
    road = scene.paint(canvas, generator)
    _paint_car(canvas, _SHAPES[class_name](_vary(generator)), _palette(scene, generator), road, generator)
    picture = np.asarray(canvas.reduce(_SUPERSAMPLING), np.float32)
    contrast, shift = generator.uniform(0.85, 1.1), generator.uniform(-15, 15)
    noise = generator.standard_normal(picture.shape, np.float32) * np.float32(generator.uniform(2, 10))
    picture = (picture - 128) * np.float32(contrast) + np.float32(128 + shift) + noise
    return np.rint(picture).clip(0, 255).astype(np.uint8)


def _draw_split(image_size: tuple[int, int], count: int, grey: bool, seed: int, split: int) -> Split:
    """Each run of len(CLASS_NAMES) pictures has every class once, in an order of its own."""
    classes = len(CLASS_NAMES)
    orders = [_generator(seed, split, 0, run).permutation(classes) for run in range(-(-count // classes))]
    labels = np.concatenate(orders)[:count].astype(np.int32)
    images = np.empty((count, *image_size, 1 if grey else 3), np.uint8)
    for i, label in enumerate(labels):
        picture = draw_car(CLASS_NAMES[label], image_size, _generator(seed, split, 1, i))
        images[i] = np.rint(picture @ _LUMA)[..., None] if grey else picture
    return Split(images, labels)


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _vary(generator: np.random.Generator) -> Vary:
    return lambda value, spread: float(generator.uniform(value - spread, value + spread))


def _check(**values: tuple[int, int]) -> None:
    """Raises a ValueError for a value below the least that it may be; values: name -> (value, least)."""
    for name, (value, least) in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


# --- Shapes: what makes a class -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Shape:
    """parts: painted in this order; wheels: (x of the hub, radius)."""

    parts: list[Part]
    wheels: list[tuple[float, float]]


def _sedan(vary: Vary) -> _Shape:
    """Three boxes: bonnet, cabin, boot."""
    belt, roof = vary(0.25, 0.015), vary(0.41, 0.02)
    rear, front = vary(0.16, 0.025), vary(0.73, 0.025)
    roof_rear, roof_front = rear + vary(0.14, 0.025), front - vary(0.14, 0.025)
    body = [(0, 0.09), (0, belt - 0.03), (0.02, belt), (rear, belt + 0.01), (roof_rear, roof), (roof_front, roof)]
    body += [(front, belt), (0.94, belt - 0.03), (1, belt - 0.08), (1, 0.09)]
    glass = _panes(2, (rear + 0.05, front - 0.04), (roof_rear + 0.02, roof_front - 0.015), (belt + 0.01, roof - 0.03))
    door = _door((rear + front) / 2 + 0.01, 0.13, belt)
    return _Shape([("paint", body, 0.04), *glass, door, *_lamps(belt - 0.06)], _wheels(vary, 0.2, 0.8, 0.085))


def _suv(vary: Vary) -> _Shape:
    """Two boxes, the cabin upright and as far back as the car goes; more clearance, larger wheels."""
    belt, roof = vary(0.30, 0.015), vary(0.48, 0.025)
    front = vary(0.74, 0.025)
    roof_rear, roof_front = vary(0.05, 0.025), front - vary(0.10, 0.02)
    body = [(0, 0.12), (0, belt), (roof_rear, roof), (roof_front, roof), (front, belt), (0.96, belt - 0.02)]
    body += [(1, belt - 0.07), (1, 0.12)]
    glass = _panes(3, (0.05, front - 0.04), (roof_rear + 0.035, roof_front - 0.015), (belt + 0.01, roof - 0.035))
    rail = ("trim", _box(roof_rear + 0.05, roof_front - 0.04, roof, roof + 0.015), 0)
    door = _door(vary(0.45, 0.02), 0.16, belt)
    return _Shape([rail, ("paint", body, 0.035), *glass, door, *_lamps(belt - 0.06)], _wheels(vary, 0.2, 0.8, 0.1))


def _pickup(vary: Vary) -> _Shape:
    """A cabin in the middle and an open bed behind it."""
    belt, roof, bed = vary(0.28, 0.015), vary(0.46, 0.025), vary(0.27, 0.015)
    cab, front = vary(0.40, 0.03), vary(0.76, 0.02)
    roof_front = front - vary(0.11, 0.02)
    body = [(0, 0.12), (0, bed), (cab, bed), (cab + 0.01, roof), (roof_front, roof), (front, belt)]
    body += [(0.96, belt - 0.02), (1, belt - 0.07), (1, 0.12)]
    glass = _panes(2, (cab + 0.035, front - 0.04), (cab + 0.04, roof_front - 0.015), (belt + 0.01, roof - 0.035))
    edge = ("trim", _box(0, cab, bed - 0.005, bed + 0.012), 0)
    door = _door(cab + 0.02, 0.16, belt)
    return _Shape([("paint", body, 0.02), edge, *glass, door, *_lamps(belt - 0.06)], _wheels(vary, 0.2, 0.82, 0.095))


def _cabriolet(vary: Vary) -> _Shape:
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
    return _Shape(parts, _wheels(vary, 0.2, 0.8, 0.088))


def _bus(vary: Vary) -> _Shape:
    """One long box with a row of windows and a door at the front."""
    belt, roof = vary(0.27, 0.02), vary(0.48, 0.025)
    body = [(0, 0.085), (0, roof), (vary(0.975, 0.015), roof), (1, belt), (1, 0.085)]
    glass = _panes(int(vary(5.5, 1.5)), (0.03, 0.84), (0.03, 0.84), (belt, roof - 0.05))
    door = ("glass", _box(0.865, 0.945, 0.11, roof - 0.05), 0.01)
    stripe = ("second", _box(0, 0.85, belt - 0.06, belt - 0.035), 0)
    return _Shape([("paint", body, 0.04), stripe, *glass, door, *_lamps(0.15)], _wheels(vary, 0.22, 0.76, 0.075))


def _truck(vary: Vary) -> _Shape:
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
    return _Shape([chassis, box, ("paint", cabin, 0.03), *glass, door, *_lamps(0.17)], wheels)


_SHAPES: dict[str, Callable[[Vary], _Shape]] = {
    "sedan": _sedan,
    "SUV": _suv,
    "pickup": _pickup,
    "cabriolet": _cabriolet,
    "bus": _bus,
    "truck": _truck,
}
CLASS_NAMES: tuple[str, ...] = tuple(_SHAPES)


def _box(left: float, right: float, bottom: float, top: float) -> Points:
    return [(left, bottom), (left, top), (right, top), (right, bottom)]


def _panes(count: int, low: tuple[float, float], high: tuple[float, float], heights: tuple[float, float]) -> list[Part]:
    """Side windows: `count` panes; x runs from low[0] to low[1] at their lower edge, from high[0] to high[1] above."""

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


# --- Scene and paint: the same for every class ------------------------------------------------------------------------


def _colour(hue: float, saturation: float, luma: float) -> Colour:
    """The colour of this hue with this luma in [0, 1]; paler than asked where it could not be that light or dark."""
    vivid = np.array(colorsys.hsv_to_rgb(hue % 1, saturation, 1.0))
    full = float(vivid @ _LUMA)
    rgb = vivid * (luma / full) if luma <= full else vivid + (1 - vivid) * ((luma - full) / (1 - full + 1e-9))
    return tuple(int(v) for v in np.rint(255 * rgb))


def _away_from(luma: float, distance: float, generator: np.random.Generator) -> float:
    """A luma in [0.05, 0.95] that differs from `luma` by at least `distance`."""
    below, above = max(0.0, luma - distance - 0.05), max(0.0, 0.95 - luma - distance)
    at = generator.uniform(0, below + above)
    return 0.05 + at if at < below else luma + distance + at - below


@dataclasses.dataclass(frozen=True)
class _Scene:
    """hue and luma of the sky (at the horizon) and of the ground; what stands between them."""

    sky_hue: float
    sky_luma: float
    ground_hue: float
    ground_luma: float
    backdrop: str

    @classmethod
    def drawn(cls, generator: np.random.Generator) -> _Scene:
        sky_luma = generator.uniform(0.15, 0.9)
        return cls(
            sky_hue=generator.choice([0.53, 0.57, 0.61, 0.08, 0.04]),
            sky_luma=sky_luma,
            ground_hue=generator.choice([0.1, 0.3, 0.6, 0.08]),
            ground_luma=float(np.clip(sky_luma + generator.uniform(-0.3, 0.15), 0.15, 0.85)),
            backdrop=generator.choice(["open", "hills", "houses", "trees"]),
        )

    def paint(self, canvas: Image.Image, generator: np.random.Generator) -> float:
        """Paints sky, backdrop and ground; returns the y of the road under the wheels, in pixels of the canvas."""
        width, height = canvas.size
        road = height * generator.uniform(0.74, 0.82)
        horizon = road - height * generator.uniform(0.04, 0.12)
        low = np.array(_colour(self.sky_hue, 0.3, self.sky_luma), np.float32)
        high = np.array(_colour(self.sky_hue, 0.55, self.sky_luma * generator.uniform(0.7, 1.0)), np.float32)
        rise = np.linspace(1, 0, height, dtype=np.float32)[:, None]
        column = np.rint(low + (high - low) * rise).astype(np.uint8)
        canvas.paste(Image.fromarray(column[:, None]).resize((width, height)))
        draw = ImageDraw.Draw(canvas)
        self._paint_backdrop(draw, width, height, horizon, generator)
        ground = _colour(self.ground_hue, generator.uniform(0.05, 0.4), self.ground_luma)
        draw.rectangle((0, horizon, width, height), fill=ground)
        lane = _colour(self.ground_hue, 0.05, self.ground_luma * 0.8)
        draw.rectangle((0, road - 0.02 * height, width, road + 0.10 * height), fill=lane)
        return road

    def _paint_backdrop(
        self, draw: ImageDraw.ImageDraw, width: int, height: int, horizon: float, generator: np.random.Generator
    ) -> None:
        def tone(hue: float) -> Colour:
            return _colour(hue, 0.4, float(np.clip(self.sky_luma + generator.uniform(-0.12, 0.06), 0.05, 0.95)))

        if self.backdrop == "hills":
            x = np.linspace(0, width, 25)
            for lift in (0.22, 0.10):
                waves = np.sin(x / width * generator.uniform(3, 9) + generator.uniform(0, 6.28))
                y = horizon - height * (lift + 0.06 * waves)
                draw.polygon([(0, height), *zip(x, y, strict=True), (width, height)], fill=tone(self.ground_hue))
        elif self.backdrop == "houses":
            left = -width * generator.uniform(0, 0.15)
            while left < width:
                right = left + width * generator.uniform(0.12, 0.3)
                top = horizon - height * generator.uniform(0.1, 0.55)
                draw.rectangle((left, top, right, horizon), fill=tone(self.sky_hue))
                left = right + width * generator.uniform(0, 0.12)
        elif self.backdrop == "trees":
            for _ in range(generator.integers(2, 6)):
                x, radius = width * generator.uniform(0, 1), height * generator.uniform(0.07, 0.13)
                top = horizon - height * generator.uniform(0.2, 0.5)
                draw.rectangle((x - 0.015 * width, top, x + 0.015 * width, horizon), fill=tone(0.08))
                draw.ellipse((x - radius, top - radius, x + radius, top + radius), fill=tone(0.3))


def _palette(scene: _Scene, generator: np.random.Generator) -> dict[str, Colour]:
    """A colour for every material; what meets the sky stands out from it, and glass from the paint."""
    hue, second_hue = generator.uniform(0, 1, 2)
    paint = _away_from(scene.sky_luma, 0.25, generator)
    return {
        "paint": _colour(hue, generator.uniform(0.1, 0.9), paint),
        "second": _colour(second_hue, generator.uniform(0.0, 0.8), _away_from(scene.sky_luma, 0.25, generator)),
        "glass": _colour(generator.uniform(0.5, 0.62), 0.25, _away_from(paint, 0.3, generator)),
        "seam": _colour(hue, 0.3, 0.6 * paint),
        "arch": _colour(hue, 0.3, 0.4 * paint),
        "seat": _colour(generator.uniform(0, 0.1), 0.5, _away_from(scene.sky_luma, 0.25, generator)),
        "trim": _colour(hue, 0.05, _away_from(scene.sky_luma, 0.25, generator)),
        "rim": _colour(0.6, 0.05, generator.uniform(0.45, 0.9)),
        "tyre": _colour(0.6, 0.1, generator.uniform(0.04, 0.12)),
        "shadow": _colour(scene.ground_hue, 0.2, 0.5 * scene.ground_luma),
        "tail lamp": (200, 30, 30),
        "head lamp": (255, 240, 190),
    }


def _paint_car(
    canvas: Image.Image, shape: _Shape, palette: dict[str, Colour], road: float, generator: np.random.Generator
) -> None:
    width, height = canvas.size
    length = min(0.84 * width, 1.1 * height) * generator.uniform(0.86, 1.06)
    tallness = generator.uniform(0.98, 1.2)
    centre = width / 2 + min(0.3 * (width - length), 0.1 * length) * generator.uniform(-1, 1)
    facing = generator.choice([-1, 1])

    def place(points: Points) -> list[tuple[float, float]]:
        return [(centre + facing * (x - 0.5) * length, road - y * tallness * length) for x, y in points]

    def disc(x: float, y: float, radius: float, material: str, start: int = 0) -> None:
        ((x, y),) = place([(x, y)])
        radius *= length
        draw.pieslice((x - radius, y - radius, x + radius, y + radius), start, 360, fill=palette[material])

    draw = ImageDraw.Draw(canvas)
    left, right = sorted(x for x, _ in place([(-0.02, 0), (1.02, 0)]))
    draw.ellipse((left, road - 0.04 * length, right, road + 0.03 * length), fill=palette["shadow"])
    for material, outline, radius in shape.parts:
        draw.polygon(place(_rounded(outline, radius)), fill=palette[material])
    for x, radius in shape.wheels:
        y = radius / tallness
        disc(x, y, radius * 1.2, "arch", 180)
        disc(x, y, radius, "tyre")
        disc(x, y, radius * 0.58, "rim")
        disc(x, y, radius * 0.2, "tyre")


def _rounded(outline: Points, radius: float) -> Points:
    """The closed outline with every corner replaced by a quadratic Bézier curve that starts `radius` before it."""
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
