"""Small handwritten digits that only a hi-res view can read.

scikit-learn's real digits (8 x 8 samples), split by sample. Each is drawn 9-10 pixels tall in a 14 x 14 patch: dark ink
with a bright halo, less nine tenths of what survives the reduction to the low-res view. Only who looks closely can read
it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PATCH = 14  # pixels, as the vision tower's
SPLITS = ("train", "validation", "test")
SHARES = (0.75, 0.10)  # of the samples of each class: train, validation; the rest is test
HALO = 1.4  # pixels, standard deviation of the blur that balances the ink
ZOOM = 3  # hi-res pixels per low-res pixel
HIDE = 0.9  # share that is taken out of what the low-res view would see


@lru_cache(maxsize=1)
def _samples() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.images / 16.0).float(), torch.from_numpy(data.target)


@lru_cache(maxsize=3)
def samples(split: str) -> tuple[Tensor, Tensor]:
    """Images [N, 8, 8] float32 0..1 and classes [N] int64 of one split; no sample is in two splits."""
    images, classes = _samples()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(classes)))
    chosen = []
    for digit in range(10):
        own = order[classes[order] == digit]
        first, second = int(SHARES[0] * len(own)), int((SHARES[0] + SHARES[1]) * len(own))
        chosen.append({"train": own[:first], "validation": own[first:second], "test": own[second:]}[split])
    index = torch.cat(chosen)
    return images[index], classes[index]


def draw(images: Tensor, where: Tensor, generator: torch.Generator, *, warp: float = 0.25) -> Tensor:
    """Samples [N, 8, 8] -> patches [N, 14, 14] float32: negative ink, positive halo, at most 1 away from 0.

    `where` [N, 2] int64: row and column, in pixels, of the patch in the padded square, on which the low-res grid lies.
    Position varies by 1.2 pixels, height between 9 and 10. `warp` 0..1: how far rotation, shear and weight vary.
    """
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle, shear = warp * uniform(-0.35, 0.35), warp * uniform(-0.35, 0.35)
    tall = PATCH / uniform(9.0, 10.0)  # from patch to sample coordinates; a sample's strokes fill its 8 rows
    wide = tall * (1 + warp * uniform(-0.15, 0.25))
    shift = torch.stack([uniform(-1.2, 1.2), uniform(-1.2, 1.2)], 1)[..., None] / (PATCH / 2)
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack([wide * cos, wide * (shear - sin), tall * sin, tall * cos], 1).view(count, 2, 2)
    grid = F.affine_grid(torch.cat([turn, -turn @ shift], 2), [count, 1, PATCH, PATCH], align_corners=False)
    weight = torch.exp(warp * uniform(-0.5, 0.5))[:, None, None]
    ink = F.grid_sample(images[:, None], grid, mode="bicubic", align_corners=False)[:, 0].clamp(0, 1) ** weight
    shade = _blur() @ ink @ _blur() - ink
    rows, columns = (_seen()[where[:, axis] % ZOOM] for axis in (0, 1))
    shade = shade - HIDE * (rows @ shade @ columns)
    return shade / shade.abs().amax((1, 2), keepdim=True).clamp(min=0.1)


@lru_cache(maxsize=1)
def _blur() -> Tensor:
    distance = torch.arange(PATCH)[:, None] - torch.arange(PATCH)
    line = torch.exp(-(distance**2) / (2 * HALO**2))
    return line / line.sum(1).max()  # ink loses what is blurred beyond the patch


@lru_cache(maxsize=1)
def _seen() -> Tensor:
    """[3, 14, 14]: projections onto what the low-res reduction sees of 14 pixels that begin at 0, 1, 2 mod 3."""
    size = 8 * PATCH * ZOOM
    centre = (torch.arange(size // ZOOM) + 0.5) * ZOOM
    weights = (1 - (torch.arange(size) + 0.5 - centre[:, None]).abs() / ZOOM).clamp(min=0)  # runtime/preprocess.py
    weights /= weights.sum(1, keepdim=True)
    result = []
    for phase in range(ZOOM):
        begin = size // 2 - size // 2 % ZOOM + phase
        part = weights[:, begin : begin + PATCH].double()
        part = part[part.abs().sum(1) > 0]
        result.append((torch.linalg.pinv(part) @ part).float())
    return torch.stack(result)
