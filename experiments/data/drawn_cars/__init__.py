"""Drawn cars: side views of six kinds of cars, painted from a seed, for machines without a data set.

The classes differ only in the outline of the body. Colours, light, ground, backdrop, facing direction, position, size
and noise are random and independent of the class, and a body may be lighter or darker than its background. So no single
pixel indicates a class: a linear classifier on raw pixels learns little, while a ConvNet soon recognizes all classes.
tests/experiments/data/test_drawn_cars.py measures these properties.
"""

from __future__ import annotations

import colorsys
import dataclasses

import numpy as np
from PIL import Image, ImageDraw

from experiments.data.dataset import Dataset, Split
from experiments.data.drawn_cars.shapes import CLASS_NAMES, SHAPES, Points, Shape, rounded

Colour = tuple[int, int, int]
_SUPERSAMPLING = 4
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_TRAIN, _TEST = 0, 1  # the splits' random streams


def drawn_cars(
    image_size: tuple[int, int], train_count: int = 1500, test_count: int = 480, *, grey: bool, seed: int
) -> Dataset:
    """Draws the data set. Picture i of a split depends on the seed, the split, i and the size, not on the counts.

    Args:
      image_size: (height, width) in pixels, each at least 32.
      train_count, test_count: numbers of pictures; the classes' shares differ by one at most.
      grey: one channel (BT.601 luma of the same pictures) instead of RGB.
      seed: an integer >= 0.
    """
    train = _draw_split(image_size, train_count, grey, seed, _TRAIN)
    test = _draw_split(image_size, test_count, grey, seed, _TEST)
    source = {"drawn": True, "image_size": list(image_size), "train_count": train_count, "test_count": test_count}
    return Dataset("drawn cars", CLASS_NAMES, train, test, source | {"grey": bool(grey), "seed": seed})


def draw_car(class_name: str, image_size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """Draws one car in its own scene: (height, width, 3) uint8, RGB; all randomness comes from the generator."""
    height, width = image_size
    canvas = Image.new("RGB", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
    scene = _Scene.drawn(generator)
    road = scene.paint(canvas, generator)
    shape = SHAPES[class_name](lambda value, spread: float(generator.uniform(value - spread, value + spread)))
    _paint_car(canvas, shape, _palette(scene, generator), road, generator)
    picture = np.asarray(canvas.reduce(_SUPERSAMPLING), np.float32)
    contrast, shift = generator.uniform(0.85, 1.1), generator.uniform(-15, 15)
    noise = generator.standard_normal(picture.shape, np.float32) * np.float32(generator.uniform(2, 10))
    picture = (picture - 128) * np.float32(contrast) + np.float32(128 + shift) + noise
    return np.rint(picture).clip(0, 255).astype(np.uint8)


def _draw_split(image_size: tuple[int, int], count: int, grey: bool, seed: int, split: int) -> Split:
    """Draws a split; every len(CLASS_NAMES) successive pictures have each class once, in random order."""
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


# Scene and paint: the same for every class.


def _colour(hue: float, saturation: float, luma: float) -> Colour:
    """The colour of this hue with this luma in [0, 1]; less saturated than asked if it has to be light."""
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
    """Hue and luma of the sky (at the horizon) and of the ground, and the backdrop between them."""

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
    """A colour for every material; parts in front of the sky contrast with it, and glass with the paint."""
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
    canvas: Image.Image, shape: Shape, palette: dict[str, Colour], road: float, generator: np.random.Generator
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
        draw.polygon(place(rounded(outline, radius)), fill=palette[material])
    for x, radius in shape.wheels:
        y = radius / tallness
        disc(x, y, radius * 1.2, "arch", 180)
        disc(x, y, radius, "tyre")
        disc(x, y, radius * 0.58, "rim")
        disc(x, y, radius * 0.2, "tyre")
