"""Tiles full of numbers, many more than scenes have: what the tower learns digits from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from export.default_model import digits
from export.default_model.digits import PLATE_WINDOW, WIDTH, WINDOW, Hand, Pens
from export.default_model.learning.pool import FIRST, LOWRES, NOTHING, SECOND, SINGLE
from export.default_model.scenes import BORDER, ENOUGH, INK, PATCH, PLATE, TILE, TILT

LATTICE = 31, 46  # pixels, height and width of the cells that numbers stand in: they do not touch
EDGE = PLATE_WINDOW  # pixels around a tile on which numbers begin, that its border cuts
SIZES = 0.65, 1.3  # of digits, times digits.HEIGHT: smaller ones than scenes have, which other people draw
HAND = Hand(warp=0.5, bend=0.5)
PLAIN, BARE = 0.3, 0.35  # shares of numbers in plain ink, and of those without a plate


def write_numbers(tiles: Tensor, digit: Tensor, place: Tensor, generator: torch.Generator) -> Tensor:
    """Tiles [N, 168, 168, 3] float with numbers all over; changes the labels `digit`, `place` [N, 144] in place.

    What stands there already stays, with room around it. Numbers stand anywhere, turned and sized as in scenes; plates,
    ink and what is hidden from the low-res view vary.
    """
    count, device = len(tiles), tiles.device

    def uniform(*size: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*size, generator=generator, device=device)

    rows, columns = (TILE // side + 2 for side in LATTICE)
    shift = uniform(count, 1, 1, 2) * torch.tensor(LATTICE, device=device)
    lines = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    centre = torch.stack(lines, -1).view(1, -1, 1, 2) * torch.tensor(LATTICE, device=device) - 15 + shift[:, :, :1]
    centre = centre[:, :, 0] + uniform(count, rows * columns, 2, low=-2, high=2)
    taken = ((place > 0).float()).view(count, 1, LOWRES, LOWRES)
    taken = F.max_pool2d(taken, (5, 7), 1, (2, 3)).view(count, -1)
    patch = centre.clamp(0, TILE - 1).long() // PATCH
    free = taken.gather(1, patch[..., 0] * LOWRES + patch[..., 1]) == 0
    free &= ((centre > -EDGE / 2) & (centre < TILE + EDGE / 2)).all(-1)
    tile, cell = (free & (uniform(count, rows * columns) < 0.92)).nonzero().T
    centre = centre[tile, cell]  # [M, 2] of numbers
    many = len(tile)
    length = 1 + (uniform(many) < 0.6).long()
    height, angle = digits.HEIGHT * uniform(many, low=SIZES[0], high=SIZES[1]), uniform(many, low=-TILT, high=TILT)
    plain = uniform(many) < PLAIN
    bright = uniform(many) < 0.5
    strong, usual = uniform(many, low=90, high=170) * (1 - 2.0 * bright), INK * uniform(many, low=0.8, high=1.1)
    ink = torch.where(plain, strong, usual)
    plate = torch.where(
        plain, torch.where(bright, uniform(many, low=20, high=100), uniform(many, low=165, high=255)),
        PLATE + uniform(many, low=-15, high=15),
    )  # fmt: skip
    covered = (~(plain & (uniform(many) < BARE))).float()

    side = TILE + 2 * EDGE
    opaque = torch.zeros(count, side, side, device=device)

    def add(plane: Tensor, owner: Tensor, begin: Tensor, windows: Tensor) -> None:
        width = windows.shape[-1]
        line = torch.arange(width, device=device)
        y = (begin[:, 0].long() + EDGE)[:, None, None] + line[:, None]
        x = (begin[:, 1].long() + EDGE)[:, None, None] + line
        plane.view(-1).scatter_add_(0, ((owner[:, None, None] * side + y) * side + x).flatten(), windows.flatten())

    alpha = digits.plates(centre, length, height, angle) * covered[:, None, None]
    corner = digits.corner(centre, PLATE_WINDOW)
    add(opaque, tile, corner, alpha)
    grey, shade = torch.zeros_like(opaque), torch.zeros_like(opaque)
    add(grey, tile, corner, alpha * plate[:, None, None])
    number = torch.repeat_interleave(torch.arange(many, device=device), length)
    index = torch.arange(len(number), device=device) - (length.cumsum(0) - length)[number]
    along = (index - (length[number] - 1) / 2) * digits.spacing(height)[number]
    turn = angle[number]
    middle = centre[number] + along[:, None] * torch.stack([turn.sin(), turn.cos()], 1)
    pens = Pens.of("train", str(device))
    chosen = torch.randint(0, len(pens.digit), (len(number),), generator=generator, device=device)
    hidden = torch.where(plain, 0.0, uniform(many, low=0.7, high=1.05))[number]
    bold = torch.where(plain, uniform(many, low=digits.BOLD[0], high=digits.BOLD[1]), 0.0).exp()[number]
    windows = digits.draw(pens.distance[chosen], middle, height[number], turn, hidden, generator, HAND, bold)
    add(shade, tile[number], digits.corner(middle, WINDOW), windows * ink[number][:, None, None])
    cut = slice(EDGE, EDGE + TILE)
    opaque, grey, shade = (plane[:, cut, cut, None] for plane in (opaque.clamp(0, 1), grey, shade))
    _label(digit, place, tile[number], middle, height[number], pens.digit[chosen], length[number], index)
    return tiles * (1 - opaque) + grey + shade


def _label(
    digit: Tensor, place: Tensor, tile: Tensor, middle: Tensor, height: Tensor, text: Tensor, length: Tensor,
    index: Tensor,
) -> None:  # fmt: skip
    half = torch.stack([0.5 * height, WIDTH / 2 * height], 1)
    inside = ((middle + half).clamp(max=TILE) - (middle - half).clamp(min=0)).clamp(min=0) / (2 * half)
    seen = inside.prod(1) >= ENOUGH
    tile, middle, text, length, index = tile[seen], middle[seen], text[seen], length[seen], index[seen]
    which = torch.where(length == 1, SINGLE, torch.where(index == 0, FIRST, SECOND)).to(torch.uint8)
    text = text.to(torch.uint8)

    def patch(dy: float, dx: float) -> Tensor:
        y, x = ((middle[:, axis] + d).clamp(0, TILE - 1).long() // PATCH for axis, d in ((0, dy), (1, dx)))
        return y * LOWRES + x

    own = patch(0, 0)
    around = ((0, 0), (-BORDER, 0), (BORDER, 0), (0, -BORDER), (0, BORDER))
    beside = torch.stack([patch(dy, dx) for dy, dx in around], 1)
    highest = torch.full(place.shape, -1, device=place.device)
    lowest = torch.full(place.shape, len(own), device=place.device)
    order = torch.arange(len(own), device=place.device)
    where = (tile[:, None] * place.shape[1] + beside).flatten()
    who = order[:, None].expand_as(beside).flatten()
    highest.view(-1).scatter_reduce_(0, where, who, "amax")
    lowest.view(-1).scatter_reduce_(0, where, who, "amin")
    free = place[tile[:, None], beside] == 0
    shared = (highest != lowest)[tile[:, None], beside]
    for label, value in ((digit, text), (place, which)):
        new = torch.where(shared, NOTHING, value[:, None])
        label[tile[:, None], beside] = torch.where(free, new.to(torch.uint8), label[tile[:, None], beside])
        label[tile, own] = value
