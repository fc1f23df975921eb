"""How other programs draw: paper with lines or dots on it, and shapes with gradients, shadows and borders of all kinds.

What a visitor draws looks like none of training's plain scenes; nothing here imitates a program in particular.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SHADOWED, BORDERED, ROUNDED, RULED = 0.4, 0.75, 0.5, 0.5  # shares of shapes, and of scenes
BORDERS = ((20, 20, 25), (255, 255, 255), None)  # None: the shape's own colour, darker
Points = list[tuple[float, float]]


def rule(rng: np.random.Generator, image: Image.Image) -> None:
    """Draw lines, a grid, stripes or dots all over half of the images, in place: a little brighter or darker."""
    if rng.random() >= RULED:
        return
    pen, (width, height) = ImageDraw.Draw(image), image.size
    ground = np.array(image.getpixel((width // 2, height // 2)))
    colour = colour_of(ground + rng.choice((-1, 1)) * rng.uniform(6, 30))
    kind, apart = int(rng.integers(4)), int(rng.integers(24, 120))
    thick = apart // 2 if kind == 2 else int(rng.integers(1, 4))
    if kind == 3:
        size = rng.uniform(2, apart / 5)
        for x in range(apart // 2, width, apart):
            for y in range(apart // 2, height, apart):
                pen.ellipse((x - size, y - size, x + size, y + size), colour)
        return
    upright, grid = rng.random() < 0.5, kind == 1
    for at in range(apart // 2, max(width, height), apart):
        if upright or grid:
            pen.line((at, 0, at, height), colour, thick)
        if not upright or grid:
            pen.line((0, at, width, at), colour, thick)


def fill(rng: np.random.Generator, image: Image.Image, corners: Points, colour: np.ndarray) -> None:
    """Paint one shape on the image, in place. corners: x, y in its pixels; colour [3], 0..255."""
    room = 24  # pixels around it, for shadow and border
    left, top = (int(min(point[axis] for point in corners)) - room for axis in (0, 1))
    right, bottom = (int(max(point[axis] for point in corners)) + room for axis in (0, 1))
    own = [(x - left, y - top) for x, y in corners]
    size = right - left, bottom - top
    rounding = int(rng.integers(4, 13)) if rng.random() < ROUNDED else 0
    border = int(rng.integers(2, 8)) if rng.random() < BORDERED else 0
    inner = _mask(size, own, rounding)
    outer = _mask(size, own, rounding + 2 * border) if border else inner
    if rng.random() < SHADOWED:
        at = (left + int(rng.integers(-2, 7)), top + int(rng.integers(2, 9)))
        shadow = outer.filter(ImageFilter.GaussianBlur(float(rng.uniform(1, 7))))
        strength = rng.uniform(0.2, 0.5)
        image.paste((0, 0, 0), at, shadow.point(lambda value: int(value * strength)))
    if border:
        edge = BORDERS[int(rng.integers(len(BORDERS)))]
        image.paste(colour_of(colour * 0.6) if edge is None else edge, (left, top), outer)
    first, last = colour * rng.uniform(0.94, 1.06), colour * rng.uniform(0.78, 1.06)
    if rng.random() < 0.5:
        last = last + rng.uniform(0, 0.22) * (255 - last)
    share = np.linspace(0, 1, size[1])[:, None, None]
    rows = np.broadcast_to(first + share * (last - first), (size[1], size[0], 3))
    image.paste(Image.fromarray(np.clip(rows, 0, 255).astype(np.uint8)), (left, top), inner)


def _mask(size: tuple[int, int], corners: Points, around: int) -> Image.Image:
    """Where a polygon is, with rounded corners and half of `around` pixels more on all sides."""
    mask = Image.new("L", size, 0)
    pen = ImageDraw.Draw(mask)
    pen.polygon(corners, 255)
    if around:
        pen.line([*corners, corners[0], corners[1]], 255, around, joint="curve")
    return mask


def colour_of(values: np.ndarray) -> tuple[int, ...]:
    """[3], of any size -> red, green, blue, 0..255, as pens take it."""
    return tuple(np.clip(values, 0, 255).astype(int).tolist())
