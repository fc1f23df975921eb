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
from export.default_model.digits import PATCH
from export.default_model.model import CLIP_MEAN, CLIP_STD
from export.default_model.scenes import CANVAS, COLOURS, SHAPES, Scene, Thing, make_scene, outline

HIRES, LOWRES = CANVAS // PATCH, CANVAS // PATCH // 3  # patches per side of the two views
NOTHING = 255  # label of a patch that belongs half to a shape: not trained on
SINGLE, FIRST, SECOND = 1, 2, 3  # place of a digit in its number; 0: no digit


@dataclass(frozen=True)
class Labels:
    """Of one scene, uint8 per patch: [36, 36] hi-res, [12, 12] low-res. Last class = none, unless said otherwise."""

    digit: np.ndarray  # hi-res, 0..9, 10
    place: np.ndarray  # hi-res, 0 = none, SINGLE, FIRST, SECOND
    hires_colour: np.ndarray  # hi-res, 0..7, 8
    colour: np.ndarray  # low-res, 0..7, 8
    shape: np.ndarray  # low-res, 0..4, 5
    plate: np.ndarray  # low-res, 1 where a digit stands


def padded(image: Image.Image) -> np.ndarray:
    """RGB image with a long side of CANVAS -> uint8 [CANVAS, CANVAS, 3], padded as the runtime does."""
    square = Image.new("RGB", (CANVAS, CANVAS), tuple(int(channel * 255) for channel in CLIP_MEAN))
    square.paste(image, ((CANVAS - image.width) // 2, (CANVAS - image.height) // 2))
    return np.asarray(square)


def normalised(pixels: Tensor) -> Tensor:
    """uint8 or float 0..255 [..., H, W, 3] -> normalised float32 [..., 3, H, W]."""
    scaled = (pixels.float() / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
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
    digit, place = np.full((HIRES, HIRES), 10, np.uint8), np.zeros((HIRES, HIRES), np.uint8)
    plate = np.zeros((LOWRES, LOWRES), np.uint8)
    for thing in scene.things:
        for index, ((row, column), text) in enumerate(zip(thing.cells, thing.number, strict=True)):
            digit[row, column] = int(text)
            place[row, column] = SINGLE if len(thing.number) == 1 else (FIRST, SECOND)[index]
            plate[row // 3, column // 3] = 1
    fine = _owner(scene.things, HIRES, 4)
    coarse = _owner(scene.things, LOWRES, 12)
    colours = [list(COLOURS).index(thing.colour) for thing in scene.things] + [NOTHING, len(COLOURS)]
    shapes = [SHAPES.index(thing.shape) for thing in scene.things] + [NOTHING, len(SHAPES)]
    look = [np.array(values, np.uint8) for values in (colours, shapes)]
    return Labels(digit, place, look[0][fine], look[0][coarse], look[1][coarse], plate)


def _owner(things: tuple[Thing, ...], side: int, detail: int) -> np.ndarray:
    """int [side, side]: index of the thing that covers most of a patch, -1 = none, -2 = undecided (wraps around)."""
    scale = side * detail / CANVAS
    canvas = Image.new("L", (side * detail, side * detail), 0)
    pen = ImageDraw.Draw(canvas)
    for index, thing in enumerate(things):
        corners = outline(thing.shape, *thing.centre, thing.radius)
        pen.polygon([(scale * x, scale * y) for x, y in corners], index + 1)
    tiles = np.asarray(canvas).reshape(side, detail, side, detail).swapaxes(1, 2).reshape(side, side, -1)
    share = np.stack([(tiles == index + 1).mean(-1) for index in range(len(things))], -1)
    best = share.argmax(-1)
    return np.where(share.max(-1) >= 0.4, best, np.where(share.sum(-1) < 0.1, -1, -2))


def _one(job: tuple[int, str, dict]) -> tuple[Scene, np.ndarray, Labels]:
    seed, split, options = job
    torch.set_num_threads(1)
    scene = make_scene(np.random.default_rng(seed), split, **options)
    return scene, padded(scene.image), labels(scene)


class Pool:
    """Many scenes in memory. `things`: list of tuples; `pixels` uint8 [N, 504, 504, 3]; `labels`: uint8 tensors."""

    def __init__(self, count: int, seed: int, split: str = "train", **options: object) -> None:
        jobs = [(seed * 1_000_000 + index, split, options) for index in range(count)]
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

    def __len__(self) -> int:
        return len(self.things)
