"""Scenes: coloured shapes with small numbers on them, clutter and noise, and what is known about each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw

from export.default_model import digits
from export.default_model.digits import PATCH

CANVAS = 504  # pixels of the long side, as the hi-res view of the model
COLOURS = {
    "red": (222, 48, 48), "orange": (245, 140, 32), "yellow": (246, 216, 56), "green": (52, 160, 72),
    "cyan": (70, 200, 214), "blue": (52, 88, 208), "purple": (132, 66, 188), "pink": (242, 136, 188),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond", "star")
PLATE = 150  # grey of the plate that carries a number
INK = 104  # how far ink darkens and its halo brightens the plate, at most
SINGLE = 0.3  # share of numbers with one digit; the others have two


@dataclass(frozen=True)
class Thing:
    """One shape. `cells`: hi-res patches (row, column) its digits stand on (mostly, unless aligned), after padding."""

    colour: str
    shape: str
    number: str
    centre: tuple[float, float]  # x, y in pixels of the padded square
    radius: float
    cells: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        """As questions call it: "red square"."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it."""

    image: Image.Image  # RGB, not padded
    things: tuple[Thing, ...]


def make_scene(
    rng: np.random.Generator,
    split: str = "train",
    *,
    aspect: float | None = None,
    clutter: float = 1.0,
    aligned: bool = True,
    warp: float = 0.25,
) -> Scene:
    """A random scene. `aspect`: width / height, log-uniform 0.6 .. 1.6 when None.

    `clutter` scales the number of strokes and dots. `warp`: see digits.draw.
    `aligned`: every digit stands on one hi-res patch; otherwise numbers are shifted by up to half a patch each way.
    """
    if aspect is None:
        aspect = math.exp(rng.uniform(math.log(0.6), math.log(1.6)))
    width, height = (CANVAS, round(CANVAS / aspect)) if aspect >= 1 else (round(CANVAS * aspect), CANVAS)
    left, top = (CANVAS - width) // 2, (CANVAS - height) // 2  # where the model's padding puts the image
    things = _place(rng, width, height, left, top, aligned)
    pixels = _paint(rng, things, width, height, left, top, clutter)
    _write_numbers(rng, pixels, things, split, left, top, warp)
    pixels += np.float32(rng.uniform(2, 6)) * rng.standard_normal(pixels.shape, np.float32)
    return Scene(Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8)), tuple(things))


def _place(rng: np.random.Generator, width: int, height: int, left: int, top: int, aligned: bool) -> list[Thing]:
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    wanted = int(rng.integers(3, 9))
    things: list[Thing] = []
    order = rng.permutation(len(pairs))
    for _ in range(150):
        if len(things) == wanted:
            break
        radius = float(rng.uniform(40, 56))
        count = 1 if rng.random() < SINGLE else 2
        text = str(rng.integers(0, 10)) if count == 1 else str(rng.integers(10, 100))
        x0, y0 = left + radius + 2, top + radius + 2
        x1, y1 = left + width - radius - 2, top + height - radius - 2
        # The middle of the number: on the patch grid, then the shape around it.
        x = round(rng.uniform(x0, x1) / PATCH - count / 2) * PATCH + count * PATCH / 2
        y = round(rng.uniform(y0, y1) / PATCH - 0.5) * PATCH + PATCH / 2
        cells = tuple((int(y // PATCH), int(x - count * PATCH / 2) // PATCH + index) for index in range(count))
        if not aligned:
            x, y = x + rng.integers(-7, 8), y + rng.integers(-7, 8)
        if not (x0 - 7 <= x <= x1 + 7 and y0 - 7 <= y <= y1 + 7):
            continue
        if all(math.dist((x, y), other.centre) > radius + other.radius + 4 for other in things):
            colour, shape = pairs[order[len(things)]]
            things.append(Thing(colour, shape, text, (float(x), float(y)), radius, cells))
    return things


def outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corners of a shape around its number at (x, y)."""

    def ring(count: int, size: float, turn: float) -> list[tuple[float, float]]:
        angles = [2 * math.pi * index / count + turn for index in range(count)]
        return [(x + size * math.cos(angle), y + size * math.sin(angle)) for angle in angles]

    up = -math.pi / 2
    if shape == "circle":
        return ring(48, 0.92 * radius, up)
    if shape == "square":
        return ring(4, 1.15 * radius, up + math.pi / 4)
    if shape == "diamond":
        return [(x, y - 1.1 * radius), (x + 0.85 * radius, y), (x, y + 1.1 * radius), (x - 0.85 * radius, y)]
    if shape == "triangle":
        return [(px, py - 0.12 * radius) for px, py in ring(3, 1.25 * radius, up)]
    outer, inner = ring(5, 1.2 * radius, up), ring(5, 0.58 * radius, up + math.pi / 5)
    return [point for pair in zip(outer, inner, strict=True) for point in pair]


def _paint(
    rng: np.random.Generator, things: list[Thing], width: int, height: int, left: int, top: int, clutter: float
) -> np.ndarray:
    """Everything but the numbers: float32 [height, width, 3]."""
    base = rng.uniform(205, 245) + rng.uniform(-12, 12, 3)
    slope = rng.uniform(-14, 14, (2, 1))
    line = np.linspace(-1, 1, 16)
    light = (slope[0] * line[:, None] + slope[1] * line)[..., None] + base
    scale = 2  # drawn twice as large, then reduced: smooth edges
    corner = Image.fromarray(np.clip(light, 0, 255).astype(np.uint8))
    image = corner.resize((scale * width, scale * height), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(image)
    for _ in range(round(clutter * rng.integers(3, 10))):
        ends = [(scale * rng.uniform(0, width), scale * rng.uniform(0, height)) for _ in range(3)]
        pen.line(ends[: rng.integers(2, 4)], tuple(rng.integers(90, 215, 3).tolist()), int(rng.integers(2, 7)))
    for _ in range(round(clutter * rng.integers(4, 16))):
        x, y, size = scale * rng.uniform(0, width), scale * rng.uniform(0, height), rng.uniform(4, 14)
        pen.ellipse((x - size, y - size, x + size, y + size), tuple(rng.integers(90, 225, 3).tolist()))
    for thing in things:
        x, y = thing.centre[0] - left, thing.centre[1] - top
        fill = np.clip(np.array(COLOURS[thing.colour]) * rng.uniform(0.9, 1.06) + rng.uniform(-8, 8, 3), 0, 255)
        corners = [(scale * a, scale * b) for a, b in outline(thing.shape, x, y, thing.radius)]
        pen.polygon(corners, tuple(fill.astype(int).tolist()))
        pen.line([*corners, corners[0], corners[1]], tuple((0.6 * fill).astype(int).tolist()), 4, joint="curve")
        half, inset = len(thing.number) * PATCH / 2, 1.5
        box = (x - half + inset, y - PATCH / 2 + 0.5, x + half - inset, y + PATCH / 2 - 0.5)
        pen.rounded_rectangle([scale * edge for edge in box], 6, (PLATE,) * 3)
    return np.asarray(image.reduce(scale), np.float32).copy()


def _write_numbers(
    rng: np.random.Generator, pixels: np.ndarray, things: list[Thing], split: str, left: int, top: int, warp: float
) -> None:
    images, classes = digits.samples(split)
    by_class = [torch.nonzero(classes == digit).flatten() for digit in range(10)]
    text = "".join(thing.number for thing in things)
    chosen = torch.stack([by_class[int(digit)][rng.integers(len(by_class[int(digit)]))] for digit in text])
    where = []
    for thing in things:
        x = round(thing.centre[0] - len(thing.number) * PATCH / 2)
        where += [(round(thing.centre[1] - PATCH / 2), x + PATCH * index) for index in range(len(thing.number))]
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    patches = digits.draw(images[chosen], torch.tensor(where), generator, warp=warp).numpy()
    for (y, x), patch in zip(where, patches, strict=True):
        pixels[y - top : y - top + PATCH, x - left : x - left + PATCH] += INK * patch[..., None]
