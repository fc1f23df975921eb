"""Small digits that only a hi-res view can read: how pen strokes become pixels.

Dark ink with a bright halo, less most of what survives the threefold reduction to the low-res view. Only who looks
closely can read it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from export.default_model import strokes

WINDOW = 38  # pixels, side of the square a digit is drawn in
PLATE_WINDOW = 52  # pixels, side of the square a plate is drawn in
HEIGHT = 16.0  # pixels, of a digit of size 1
WIDTH = 0.72  # of a digit at most, in heights
PEN = 0.11  # width of a stroke, in heights
BOLD = -0.3, 0.8  # logarithms: how much thinner and thicker strokes of plain ink may be
HALO = 1.4  # pixels, standard deviation of the blur that balances the ink
ZOOM = 3  # hi-res pixels per low-res pixel
HIDE = 0.9  # share that is taken out of what the low-res view would see


@dataclass(frozen=True)
class Hand:
    """How much writing varies: `warp` (slant, width, weight) and `bend` (the path itself), 0..1."""

    warp: float = 0.5
    bend: float = 0.5


@dataclass(frozen=True)
class Pens:
    """Forms of a split: `distance` [F, 48, 48] as in strokes.distances, `digit` [F] int64."""

    distance: Tensor
    digit: Tensor

    @classmethod
    @lru_cache(maxsize=8)
    def of(cls, split: str, device: str = "cpu") -> Pens:
        """The forms of "train", "validation" or "test"."""
        fields, digits = strokes.distances(split)
        return cls(torch.from_numpy(fields).to(device), torch.from_numpy(digits).to(device))

    def choose(self, digits: Tensor, generator: torch.Generator) -> Tensor:
        """For each of `digits` [N] a form of it, at random: indices [N]."""
        lots = torch.rand(len(digits), len(self.digit), generator=generator, device=digits.device)
        return (lots + 2 * (self.digit == digits[:, None])).argmax(1)


def draw(
    fields: Tensor, centre: Tensor, height: Tensor, angle: Tensor, hide: Tensor, generator: torch.Generator, hand: Hand,
    bold: Tensor,
) -> Tensor:  # fmt: skip
    """Digits as windows [N, 38, 38] float32: negative ink, positive halo, at most 1 away from 0.

    fields [N, 48, 48]: forms; centre [N, 2]: y, x of their middles in pixels of the padded square, on which the low-res
    grid lies; the window begins at `corner(centre, WINDOW)`. height [N] in pixels; angle [N] in radians. hide [N]: the
    share of HALO and of HIDE that applies, 1 as in our scenes, 0 for plain ink. bold [N]: the width of strokes, in PEN.
    """
    count, device = len(fields), fields.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator, device=device)

    begin = corner(centre, WINDOW)
    line = torch.arange(WINDOW, device=device) + 0.5
    y = (line - (centre[:, :1] - begin[:, :1]))[:, :, None] / height[:, None, None]
    x = (line - (centre[:, 1:] - begin[:, 1:]))[:, None, :] / height[:, None, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    x, y = cos * x + sin * y, cos * y - sin * x
    x = (x + hand.warp * uniform(-0.35, 0.35)[:, None, None] * y) * (1 + hand.warp * uniform(-0.2, 0.3))[:, None, None]
    grid = torch.stack([x, y], -1)
    if hand.bend:
        noise = torch.randn(count, 2, 4, 4, generator=generator, device=device)
        moved = F.grid_sample(noise, 1.4 * grid, mode="bicubic", padding_mode="border", align_corners=True)
        grid = grid + 0.07 * hand.bend * moved.movedim(1, -1)
    away = F.grid_sample(fields[:, None], grid, padding_mode="border", align_corners=False)[:, 0]
    pen = PEN * bold * torch.exp(hand.warp * uniform(-0.4, 0.4))
    scale = height[:, None, None]
    ink = torch.sigmoid((pen[:, None, None] / 2 - away) * scale / 0.3)
    hide = hide[:, None, None]
    shade = hide * (_blur(device) @ ink @ _blur(device)) - ink
    rows, columns = (_seen(device)[(begin[:, axis] % ZOOM).long()] for axis in (0, 1))
    shade = shade - HIDE * hide * (rows @ shade @ columns)
    return shade / shade.abs().amax((1, 2), keepdim=True).clamp(min=0.1)


def plates(centre: Tensor, count: Tensor, height: Tensor, angle: Tensor) -> Tensor:
    """How opaque plates are: [N, 52, 52] float32, 0..1, windows begin at `corner(centre, PLATE_WINDOW)`.

    centre [N, 2]: y, x of the numbers' middles; count [N]: their digits; height [N] of a digit; angle [N]."""
    begin = corner(centre, PLATE_WINDOW)
    line = torch.arange(PLATE_WINDOW, device=centre.device) + 0.5
    y = (line - (centre[:, :1] - begin[:, :1]))[:, :, None]
    x = (line - (centre[:, 1:] - begin[:, 1:]))[:, None, :]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    x, y = cos * x + sin * y, cos * y - sin * x
    half = torch.stack([((count - 1) * spacing(height) + WIDTH * height) / 2 + 2, 0.5 * height + 2], 1)[..., None, None]
    radius = 3.0
    out_x, out_y = x.abs() - half[:, 0] + radius, y.abs() - half[:, 1] + radius
    away = (out_x.clamp(min=0) ** 2 + out_y.clamp(min=0) ** 2).sqrt() - radius
    away = away + torch.maximum(out_x, out_y).clamp(max=0)
    return (0.5 - away).clamp(0, 1)


def corner(centre: Tensor, side: int) -> Tensor:
    """First row and column, whole numbers, of the window of `side` pixels around `centre` [N, 2]."""
    return (centre - side / 2).round()


def spacing(height: Tensor) -> Tensor:
    """Pixels between the middles of a number's digits [N], which are `height` [N] tall: more than a patch, so that each
    has one of its own."""
    return (0.9 * height).clamp(min=14.8)


def offsets(count: int, height: float) -> list[float]:
    """Of a number's digits how far each is from the number's middle, in pixels along its line."""
    apart = float(spacing(torch.tensor(height)))
    return [(index - (count - 1) / 2) * apart for index in range(count)]


@lru_cache(maxsize=4)
def _blur(device: torch.device) -> Tensor:
    distance = torch.arange(WINDOW)[:, None] - torch.arange(WINDOW)
    line = torch.exp(-(distance**2) / (2 * HALO**2)) / (HALO * math.sqrt(2 * math.pi))
    return line.to(device)


@lru_cache(maxsize=4)
def _seen(device: torch.device) -> Tensor:
    """[3, 38, 38]: projections onto what the low-res reduction sees of 38 pixels that begin at 0, 1, 2 mod 3."""
    size = 8 * WINDOW * ZOOM
    centre = (torch.arange(size // ZOOM) + 0.5) * ZOOM
    weights = (1 - (torch.arange(size) + 0.5 - centre[:, None]).abs() / ZOOM).clamp(min=0)  # runtime/preprocess.py
    weights /= weights.sum(1, keepdim=True)
    result = []
    for phase in range(ZOOM):
        begin = size // 2 - size // 2 % ZOOM + phase
        part = weights[:, begin : begin + WINDOW].double()
        part = part[part.abs().sum(1) > 0]
        result.append((torch.linalg.pinv(part) @ part).float())
    return torch.stack(result).to(device)
