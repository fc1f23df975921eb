"""Scenes as training arrays: pixels as the model gets them, and what stands on every patch."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from engines.bundle.pages import margins
from export.default_model.model import CLIP_MEAN, CLIP_STD
from export.default_model.scenes import CANVAS, COLOURS, PATCH, SHAPES, Scene, Style, Thing, make_scene, varied

HIRES, LOWRES = CANVAS // PATCH, CANVAS // PATCH // 3  # patches per side of the two views
SIDE = CANVAS // LOWRES  # pixels of the padded square along a side of a low-res token
NOTHING = 255  # label of a patch that belongs half to a shape: not trained on
SINGLE, FIRST, SECOND = 1, 2, 3  # place of a digit in its number; 0: no digit
BESIDE = 6.0  # pixels: nearer to the border of two low-res tokens than this, a thing's middle is shared by both
WHOLE = 255  # label of a low-res patch that has the whole middle of a thing


@dataclass(frozen=True)
class Labels:
    """Of one scene, uint8 per patch: [36, 36] hi-res, [12, 12] low-res. Last class = none, unless said otherwise."""

    digit: np.ndarray  # hi-res, 0..9, 10
    place: np.ndarray  # hi-res, 0 = none, SINGLE, FIRST, SECOND
    hires_colour: np.ndarray  # hi-res, 0..7, 8
    hires_shape: np.ndarray  # hi-res, 0..6, 7
    colour: np.ndarray  # low-res, 0..7, 8
    shape: np.ndarray  # low-res, 0..6, 7
    centre: np.ndarray  # low-res, what the patch has of the middle of a thing, 0 .. WHOLE


def padded(image: Image.Image) -> np.ndarray:
    """RGB image with a long side of CANVAS -> uint8 [CANVAS, CANVAS, 3], padded as the runtime does."""
    square = Image.new("RGB", (CANVAS, CANVAS), tuple(int(channel * 255) for channel in CLIP_MEAN))
    square.paste(image, ((CANVAS - image.width) // 2, (CANVAS - image.height) // 2))
    return np.asarray(square)


def normalised(pixels: Tensor) -> Tensor:
    """uint8 or float 0..255 [..., H, W, 3] -> normalised float32 [..., 3, H, W]."""
    scaled = (pixels.float() / 255 - pixels.new_tensor(CLIP_MEAN, dtype=torch.float32)) / pixels.new_tensor(
        CLIP_STD, dtype=torch.float32
    )
    return scaled.movedim(-1, -3).contiguous()


def lowres(pixels: Tensor) -> Tensor:
    """[..., 504, 504, 3] uint8 -> [..., 168, 168, 3] float 0..255: the reduction of runtime/preprocess.py."""
    planes = pixels.float().movedim(-1, -3)
    half = F.interpolate(planes, size=(CANVAS // 3,) * 2, mode="bilinear", antialias=True, align_corners=False)
    return half.movedim(-3, -1)


def margins_of(sizes: list[tuple[int, int]]) -> Tensor:
    """(width, height) of images -> rows, columns of the low-res map that are padding at each end: [N, 2] int64."""
    return torch.tensor([margins(width, height, LOWRES) for width, height in sizes])


def labels(scene: Scene) -> Labels:
    """What stands on every patch of a scene."""
    digit, place = np.full(HIRES * HIRES, 10, np.uint8), np.zeros(HIRES * HIRES, np.uint8)
    centre = np.zeros(LOWRES * LOWRES)
    for thing in scene.things:
        for index, text in enumerate(thing.number):
            for part in reversed(thing.parts(index)):
                digit[part] = int(text)
                place[part] = SINGLE if len(thing.number) == 1 else (FIRST, SECOND)[index]
        for token, share in lowres_shares(*thing.centre).items():
            centre[token] += share
    fine = _owner(scene.things, HIRES, 4)
    coarse = _owner(scene.things, LOWRES, 12)
    colours = [list(COLOURS).index(thing.colour) for thing in scene.things] + [NOTHING, len(COLOURS)]
    shapes = [SHAPES.index(thing.shape) for thing in scene.things] + [NOTHING, len(SHAPES)]
    look = [np.array(values, np.uint8) for values in (colours, shapes)]
    square = (HIRES, HIRES)
    return Labels(
        digit.reshape(square), place.reshape(square), look[0][fine], look[1][fine], look[0][coarse], look[1][coarse],
        (WHOLE * centre.clip(0, 1)).round().astype(np.uint8).reshape(LOWRES, LOWRES),
    )  # fmt: skip


def lowres_token(x: float, y: float) -> int:
    """The low-res token (row * 12 + column) at a place of the padded square."""
    return _line(y) * LOWRES + _line(x)


def lowres_shares(x: float, y: float) -> dict[int, float]:
    """Low-res tokens that have a place of the padded square, and how much of it: all of it, or, nearer than BESIDE to a
    border, what falls to each token as the place goes over it. The first is the one it is on; they add up to 1."""
    return {row * LOWRES + column: of_y * of_x for row, of_y in _across(y) for column, of_x in _across(x)}


def _line(at: float) -> int:
    """Row, or column, that a place on that axis is in."""
    return min(max(int(at // SIDE), 0), LOWRES - 1)


def _across(at: float) -> list[tuple[int, float]]:
    """Rows, or columns, that have a place on that axis, the one it is in first, and their shares."""
    line, border = _line(at), round(at / SIDE)
    away = abs(at - border * SIDE)
    if away >= BESIDE or border in (0, LOWRES):
        return [(line, 1.0)]
    share = 0.5 + away / (2 * BESIDE)
    return [(line, share), (border if line < border else border - 1, 1 - share)]


def _owner(things: tuple[Thing, ...], side: int, detail: int) -> np.ndarray:
    """int [side, side]: index of the thing that covers most of a patch, -1 = none, -2 = undecided (wraps around)."""
    scale = side * detail / CANVAS
    canvas = Image.new("L", (side * detail, side * detail), 0)
    pen = ImageDraw.Draw(canvas)
    for index, thing in enumerate(things):
        pen.polygon([(scale * x, scale * y) for x, y in thing.corners], index + 1)
    tiles = np.asarray(canvas).reshape(side, detail, side, detail).swapaxes(1, 2).reshape(side, side, -1)
    share = np.stack([(tiles == index + 1).mean(-1) for index in range(len(things))], -1)
    best = share.argmax(-1)
    return np.where(share.max(-1) >= 0.4, best, np.where(share.sum(-1) < 0.1, -1, -2))


def _one(job: tuple[int, str, bool]) -> tuple[Scene, np.ndarray, Labels]:
    seed, split, vary = job
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    scene = make_scene(rng, split, varied(rng) if vary else Style())
    return scene, padded(scene.image), labels(scene)


class Pool:
    """Many scenes in memory. `things`: list of tuples; `pixels` uint8 [N, 504, 504, 3]; `labels`: uint8 tensors.

    `vary`: styles as training sees them, else as evaluations do. `first`: the number of the first scene; scenes of a
    seed are the same in one pool as in several that go on where another ends."""

    def __init__(self, count: int, seed: int, split: str = "train", *, vary: bool = True, first: int = 0) -> None:
        jobs = [(seed * 1_000_000 + first + index, split, vary) for index in range(count)]
        self.pixels = torch.empty(count, CANVAS, CANVAS, 3, dtype=torch.uint8)
        self.things: list[tuple[Thing, ...]] = []
        self.sizes: list[tuple[int, int]] = []  # width, height before padding
        rows: list[Labels] = []
        with multiprocessing.get_context("spawn").Pool() as workers:
            for index, (scene, pixels, row) in enumerate(workers.imap(_one, jobs, chunksize=8)):
                self.pixels[index] = torch.from_numpy(pixels)
                self.things.append(scene.things)
                self.sizes.append(scene.image.size)
                rows.append(row)
        self.labels = {
            name: torch.from_numpy(np.stack([getattr(row, name) for row in rows])) for name in Labels.__annotations__
        }

    def to(self, device: str) -> Pool:
        """This pool, its arrays on a device."""
        self.pixels = self.pixels.to(device)
        self.labels = {name: label.to(device) for name, label in self.labels.items()}
        return self

    def __len__(self) -> int:
        return len(self.things)
