"""Scenes: coloured shapes with small numbers on them, clutter and noise, and what is known about each."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

from export.default_model import digits, painting
from export.default_model.digits import PLATE_WINDOW, WINDOW, Hand, Pens

CANVAS = 504  # pixels of the long side, as the hi-res view of the model
PATCH, TILE = 14, 168  # pixels of the vision tower's patches, and of the tiles it sees the hi-res view in
COLOURS = {
    "red": (222, 48, 48), "orange": (245, 140, 32), "yellow": (246, 216, 56), "green": (52, 160, 72),
    "cyan": (70, 200, 214), "blue": (52, 88, 208), "purple": (132, 66, 188), "pink": (242, 136, 188),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross")
PLATE = 150  # grey of the plate that carries a number
INK = 104  # how far ink darkens and its halo brightens the plate, at most
SINGLE = 0.3  # share of numbers with one digit; the others have two
TILT = math.radians(15)  # numbers are turned by at most this
SIZES = 0.8, 1.3  # of digits, times digits.HEIGHT
SMALLEST = 0.7  # the same where other programs draw
ENOUGH = 0.3  # share of a digit that a tile must hold to read it
ALIKE = 0.5  # Style.alike in training: large numbers of things are what counting gets wrong
BORDER = 1.5  # pixels: within these of the border of two patches a digit's middle counts as on both


@dataclass(frozen=True)
class Style:
    """How a scene is drawn. Numbers and backgrounds: as they are in evaluations, unless said otherwise."""

    aspect: float | None = None  # width / height; None: log-uniform 0.6 .. 1.6
    clutter: float = 1.0  # scales the number of strokes and dots
    background: str = "light"  # "light", "dark", "coloured"
    plain: bool = False  # numbers in plain ink, dark or bright, with or without a plate: nothing is hidden from low-res
    photo: bool = False  # as a photographed screen: perspective, blur, more noise
    drawn: bool = False  # as other programs draw: outlines turned, stretched, rounded; gradients, shadows, paper
    quality: int | None = None  # of JPEG; None: not compressed
    alike: float = 0.35  # share of scenes with many things of one colour or shape
    hand: Hand = field(default_factory=Hand)


@dataclass(frozen=True)
class Thing:
    """One shape. All places are x, y in pixels of the padded square, whose side is CANVAS."""

    colour: str
    shape: str
    number: str
    centre: tuple[float, float]
    radius: float
    corners: tuple[tuple[float, float], ...]  # of its outline
    digits: tuple[tuple[float, float], ...]  # the middle of each digit
    height: float  # of a digit, pixels

    @property
    def name(self) -> str:
        """As questions call it: "red square"."""
        return f"{self.colour} {self.shape}"

    @property
    def cut(self) -> bool:
        """Whether the border of a tile runs through one of its digits: each tile sees a part of it."""
        ends = ((at - half, at + half) for place in self.digits for at, half in zip(place, self._half, strict=True))
        return any(int(begin) // TILE != int(end) // TILE for begin, end in ends)

    def parts(self, digit: int) -> tuple[int, ...]:
        """Hi-res patches (36 * row + column) at which a digit can be read, the best one first: where its middle is; if
        the border of a tile cuts it, the nearest patch of each other tile that holds enough of it; and where its middle
        almost is, unless another digit of the number is there, too."""
        (x, y), (half_x, half_y) = self.digits[digit], self._half
        found = []
        for row in range(CANVAS // TILE):
            for column in range(CANVAS // TILE):
                share = 1.0
                for at, half, tile in ((x, half_x, column), (y, half_y, row)):
                    inside = min(at + half, (tile + 1) * TILE) - max(at - half, tile * TILE)
                    share *= max(0.0, inside / (2 * half))
                if share >= ENOUGH:
                    px = min(max(x, column * TILE), (column + 1) * TILE - 1)
                    py = min(max(y, row * TILE), (row + 1) * TILE - 1)
                    found.append((-share, _patch(px, py)))
        others = {
            patch for other, at in enumerate(self.digits) if other != digit for patch in (_patch(*at), *_almost(*at))
        }
        almost = [patch for patch in _almost(x, y) if patch not in others]
        return tuple(dict.fromkeys([*(patch for _, patch in sorted(found)), *almost]))

    @property
    def _half(self) -> tuple[float, float]:
        """Pixels from the middle of a digit to its ends: across, down."""
        return digits.WIDTH / 2 * self.height, 0.5 * self.height


def _patch(x: float, y: float) -> int:
    return int(y) // PATCH * (CANVAS // PATCH) + int(x) // PATCH


def _almost(x: float, y: float) -> list[int]:
    """Patches beside that of x, y, of its own tile, from which it is at most BORDER away."""
    own, found = _patch(x, y), []
    for dx, dy in ((-BORDER, 0), (BORDER, 0), (0, -BORDER), (0, BORDER)):
        same = (int(x + dx) // TILE, int(y + dy) // TILE) == (int(x) // TILE, int(y) // TILE)
        if same and x + dx >= 0 and y + dy >= 0 and _patch(x + dx, y + dy) != own:
            found.append(_patch(x + dx, y + dy))
    return found


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it."""

    image: Image.Image  # RGB, not padded
    things: tuple[Thing, ...]


def varied(rng: np.random.Generator) -> Style:
    """A style as training sees them: four of ten scenes as in evaluations, the rest differ in one way or more."""
    if rng.random() < 0.4:
        return Style(clutter=float(rng.uniform(0, 2.2)), alike=ALIKE)
    return Style(
        alike=ALIKE,
        aspect=float(math.exp(rng.uniform(math.log(0.5), math.log(2)))),
        clutter=float(rng.uniform(0, 2.2)),
        background=("light", "dark", "coloured")[int(rng.choice(3, p=(0.4, 0.35, 0.25)))],
        plain=bool(rng.random() < 0.35),
        photo=bool(rng.random() < 0.25),
        quality=int(rng.integers(45, 96)) if rng.random() < 0.35 else None,
        drawn=bool(rng.random() < 0.5),
    )


def make_scene(rng: np.random.Generator, split: str = "train", style: Style | None = None) -> Scene:
    """A random scene with digits of a split. `style`: Style() when None."""
    style = style or Style()
    aspect = style.aspect or math.exp(rng.uniform(math.log(0.6), math.log(1.6)))
    width, height = (CANVAS, round(CANVAS / aspect)) if aspect >= 1 else (round(CANVAS * aspect), CANVAS)
    edge = np.array([(CANVAS - width) // 2, (CANVAS - height) // 2], float)  # where padding puts the image: x, y
    things = _place(rng, width, height, style)
    pixels = _paint(rng, things, width, height, style)
    things = _write_numbers(rng, pixels, things, split, edge, style)
    pixels += np.float32(rng.uniform(2, 6)) * rng.standard_normal(pixels.shape, np.float32)
    image = Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))
    if style.photo:
        image, things = _photograph(rng, image, things)
    if style.quality is not None:
        packed = io.BytesIO()
        image.save(packed, "JPEG", quality=style.quality)
        image = Image.open(packed).convert("RGB")
    return Scene(image, tuple(_moved(thing, lambda points: points + edge) for thing in things))


def _moved(thing: Thing, move: Callable[[np.ndarray], np.ndarray]) -> Thing:
    """A thing whose places went through `move`: [N, 2] -> [N, 2]."""

    def each(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
        return tuple((float(x), float(y)) for x, y in move(np.array(points, float).reshape(-1, 2)))

    return replace(thing, centre=each([thing.centre])[0], corners=each(thing.corners), digits=each(thing.digits))


def _place(rng: np.random.Generator, width: int, height: int, style: Style) -> list[Thing]:
    """Things without their digits' places; all in pixels of the image."""
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    wanted = int(rng.integers(2, 10))
    largest = 56 if wanted < 6 else 48 if wanted < 8 else 44
    things: list[Thing] = []
    order = [pairs[index] for index in rng.permutation(len(pairs))]
    if rng.random() < style.alike:  # of one colour or shape many: what is counted goes up to eight
        axis, common = int(rng.integers(2)), order[0]
        alike = [pair for pair in order if pair[axis] == common[axis]]
        others = [pair for pair in order if pair[axis] != common[axis]]
        many = int(rng.integers(2, 9))
        order = alike[:many] + others
    for _ in range(300):
        if len(things) == wanted or len(things) == len(order):
            break
        radius = float(rng.uniform(32, largest))
        text = str(rng.integers(0, 10)) if rng.random() < SINGLE else str(rng.integers(10, 100))
        x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        if all(math.dist((x, y), other.centre) > radius + other.radius + 4 for other in things):
            colour, shape = order[len(things)]
            size = digits.HEIGHT * float(rng.uniform(SMALLEST if style.drawn else SIZES[0], SIZES[1]))
            corners = tuple(outline(shape, x, y, radius))
            if style.drawn:
                corners = _reshaped(rng, corners, (x, y))
            things.append(Thing(colour, shape, text, (float(x), float(y)), radius, corners, (), size))
    return things


def _reshaped(
    rng: np.random.Generator, corners: Sequence[tuple[float, float]], centre: tuple[float, float]
) -> tuple[tuple[float, float], ...]:
    """An outline turned a little around its centre, and stretched."""
    turn = rng.uniform(-TILT, TILT)
    matrix = np.array([(math.cos(turn), math.sin(turn)), (-math.sin(turn), math.cos(turn))])
    points = (np.array(corners) - centre) * rng.uniform(0.82, 1.05, 2) @ matrix + centre
    return tuple((float(x), float(y)) for x, y in points)


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
    if shape == "heart":
        turns = [2 * math.pi * index / 40 for index in range(40)]
        points = [
            (16 * math.sin(t) ** 3, 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
            for t in turns
        ]
        return [(x + a * radius / 16.5, y - (b - 1.5) * radius / 16.5) for a, b in points]
    if shape == "cross":
        arm, end = 0.42 * radius, radius
        quarter = [(arm, -end), (arm, -arm), (end, -arm)]
        return [
            (x + a * c - b * s, y + a * s + b * c) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1)) for a, b in quarter
        ]
    outer, inner = ring(5, 1.2 * radius, up), ring(5, 0.6 * radius, up + math.pi / 5)
    return [point for pair in zip(outer, inner, strict=True) for point in pair]


def _paint(rng: np.random.Generator, things: list[Thing], width: int, height: int, style: Style) -> np.ndarray:
    """Everything but the numbers: float32 [height, width, 3]."""
    if style.background == "dark":
        base, clutter = rng.uniform(18, 70) + rng.uniform(-12, 12, 3), (30, 150)
    elif style.background == "coloured":
        base, clutter = rng.uniform(70, 220) + rng.uniform(-35, 35, 3), (60, 220)
    else:
        base, clutter = rng.uniform(205, 245) + rng.uniform(-12, 12, 3), (90, 220)
    slope = rng.uniform(-14, 14, (2, 1))
    line = np.linspace(-1, 1, 16)
    light = (slope[0] * line[:, None] + slope[1] * line)[..., None] + base
    scale = 2  # drawn twice as large, then reduced: smooth edges
    small = Image.fromarray(np.clip(light, 0, 255).astype(np.uint8))
    image = small.resize((scale * width, scale * height), Image.Resampling.BILINEAR)
    if style.drawn:
        painting.rule(rng, image)
    pen = ImageDraw.Draw(image)
    for _ in range(round(style.clutter * rng.integers(3, 10))):
        ends = [(scale * rng.uniform(0, width), scale * rng.uniform(0, height)) for _ in range(3)]
        pen.line(ends[: rng.integers(2, 4)], tuple(rng.integers(*clutter, 3).tolist()), int(rng.integers(2, 7)))
    for _ in range(round(style.clutter * rng.integers(4, 16))):
        x, y, size = scale * rng.uniform(0, width), scale * rng.uniform(0, height), rng.uniform(4, 14)
        pen.ellipse((x - size, y - size, x + size, y + size), tuple(rng.integers(*clutter, 3).tolist()))
    for thing in things:
        fill = np.clip(np.array(COLOURS[thing.colour]) * rng.uniform(0.88, 1.06) + rng.uniform(-8, 8, 3), 0, 255)
        corners = [(scale * a, scale * b) for a, b in thing.corners]
        if style.drawn:
            painting.fill(rng, image, corners, fill)
            continue
        pen.polygon(corners, painting.colour_of(fill))
        if rng.random() < 0.85:
            edge = fill * (0.6 if style.background != "dark" or rng.random() < 0.5 else 1.25)
            pen.line([*corners, corners[0], corners[1]], painting.colour_of(edge), 4, joint="curve")
    return np.asarray(image.reduce(scale), np.float32).copy()


def _write_numbers(
    rng: np.random.Generator, pixels: np.ndarray, things: list[Thing], split: str, edge: np.ndarray, style: Style
) -> list[Thing]:
    """Write on `pixels`, in place; the things with the places of their digits."""
    pens, generator = Pens.of(split), torch.Generator().manual_seed(int(rng.integers(2**62)))
    angle = torch.from_numpy(rng.uniform(-TILT, TILT, len(things)).astype(np.float32))
    loose = 7 if style.drawn else 3  # pixels: numbers do not stand where their things' middles are
    middle = np.array([thing.centre for thing in things]) + rng.uniform(-loose, loose, (len(things), 2))
    placed = []
    for thing, at, turn in zip(things, middle, angle.tolist(), strict=True):
        along = [
            (at[0] + o * math.cos(turn), at[1] + o * math.sin(turn))
            for o in digits.offsets(len(thing.number), thing.height)
        ]
        placed.append(replace(thing, digits=tuple((float(x), float(y)) for x, y in along)))
    count = torch.tensor([len(thing.number) for thing in things])
    height = torch.tensor([thing.height for thing in things])
    where = torch.from_numpy((middle + edge)[:, ::-1].astype(np.float32))  # y, x in the padded square
    shown, ink = np.ones(len(things), np.float32), np.full(len(things), INK, np.float32)
    plate = np.full((len(things), 3), PLATE, np.float32) + rng.uniform(-6, 6, (len(things), 1)).astype(np.float32)
    if style.plain:  # dark ink on a bright plate or on the shape, or the other way round
        bright = rng.random() < 0.4
        plate[:] = rng.uniform(30, 90) if bright else rng.uniform(180, 255)
        ink[:] = rng.uniform(110, 170) * (-1 if bright else 1)
        shown[:] = float(rng.random() < 0.6)
    bold = math.exp(rng.uniform(*digits.BOLD)) if style.plain and style.drawn else 1.0
    alpha = digits.plates(where, count, height, angle).numpy() * shown[:, None, None]
    for at, mask, colour in zip(digits.corner(where, PLATE_WINDOW).int().tolist(), alpha, plate, strict=True):
        _blend(pixels, at, mask, edge, colour)
    text = torch.tensor([int(digit) for thing in things for digit in thing.number])
    centres = torch.tensor([[y + edge[1], x + edge[0]] for thing in placed for x, y in thing.digits]).float()
    hide = torch.full((len(text),), 0.0 if style.plain else 1.0)
    fields = pens.distance[pens.choose(text, generator)]
    shade = digits.draw(
        fields, centres, height.repeat_interleave(count), angle.repeat_interleave(count), hide, generator, style.hand,
        torch.full((len(text),), bold),
    ).numpy()  # fmt: skip
    strength = np.repeat(ink, count.numpy())
    for at, mask, dark in zip(digits.corner(centres, WINDOW).int().tolist(), shade, strength, strict=True):
        _blend(pixels, at, dark * mask, edge, None)
    return placed


def _blend(pixels: np.ndarray, at: list[int], mask: np.ndarray, edge: np.ndarray, colour: np.ndarray | None) -> None:
    """Change a square of `pixels` in place, as far as it lies on them. `at`: its first row and column in the padded
    square; mask [side, side]: what is added, or with `colour` [3] how opaque that is."""
    side = len(mask)
    top, left = at[0] - int(edge[1]), at[1] - int(edge[0])
    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + side, len(pixels)), min(left + side, pixels.shape[1])
    region = pixels[y0:y1, x0:x1]  # a view
    part = mask[y0 - top : y1 - top, x0 - left : x1 - left, None]
    region += part if colour is None else part * (colour - region)


def _photograph(rng: np.random.Generator, image: Image.Image, things: list[Thing]) -> tuple[Image.Image, list[Thing]]:
    """The picture as a camera sees it on a screen, a little from the side; places move with it."""
    width, height = image.size
    square = np.array([(0, 0), (width, 0), (width, height), (0, height)], float)
    seen = square + rng.uniform(0, 0.04, (4, 2)) * (width, height) * np.where(square > 0, -1, 1)
    forward = _homography(square, seen)
    matrix = np.linalg.inv(forward)
    matrix /= matrix[2, 2]
    around = tuple(rng.integers(5, 60, 3).tolist())
    image = image.transform(
        image.size, Image.Transform.PERSPECTIVE, matrix.flatten()[:8], Image.Resampling.BICUBIC, fillcolor=around
    )
    image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 0.6))))
    pixels = np.asarray(image, np.float32) * np.float32(rng.uniform(0.85, 1.05))
    pixels = pixels * (1 + rng.uniform(-0.04, 0.04, 3)) + rng.uniform(3, 8) * rng.standard_normal(pixels.shape)

    def move(points: np.ndarray) -> np.ndarray:
        mapped = np.concatenate([points, np.ones((len(points), 1))], 1) @ forward.T
        return mapped[:, :2] / mapped[:, 2:]

    shot = Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))
    return shot, [_moved(thing, move) for thing in things]


def _homography(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """[3, 3] that takes four points [4, 2] to four others."""
    rows, right = [], []
    for (x, y), (u, v) in zip(source, target, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        right += [u, v]
    return np.append(np.linalg.solve(np.array(rows), np.array(right)), 1).reshape(3, 3)
