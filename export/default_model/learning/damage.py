"""What cameras and JPEG do to tiles, in torch: many at once, where training runs."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLURRED, COMPRESSED = 0.1, 0.1  # shares of tiles
# Annex K of the JPEG standard: steps of the luma coefficients at quality 50.
STEPS = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51,
    87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip


def damaged(tiles: Tensor, generator: torch.Generator) -> Tensor:
    """Tiles [N, H, W, 3] float 0..255, some of them blurred, some compressed; H and W are multiples of 8."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(tiles), generator=generator, device=tiles.device)

    x = tiles.movedim(3, 1).clone(memory_format=torch.contiguous_format)
    sigma, chosen = uniform(0.3, 0.7), uniform(0, 1) < BLURRED
    if chosen.any():
        x[chosen] = _blur(x[chosen], sigma[chosen])
    chosen, quality = uniform(0, 1) < COMPRESSED, uniform(45, 95)
    if chosen.any():
        x[chosen] = _compress(x[chosen], quality[chosen])
    return x.movedim(1, 3)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """[N, 3, H, W], N > 0 -> the same, blurred by a Gaussian of 5 x 5 pixels. sigma [N]: its deviation, pixels."""
    line = torch.exp(-(torch.arange(-2, 3, device=x.device) ** 2) / (2 * sigma[:, None] ** 2))
    line = line / line.sum(1, keepdim=True)
    kernel = (line[:, :, None] * line[:, None, :]).repeat_interleave(3, 0)[:, None]
    flat = F.pad(x.reshape(1, -1, *x.shape[2:]), (2, 2, 2, 2), mode="replicate")
    return F.conv2d(flat, kernel, groups=len(kernel)).view_as(x)


def _compress(x: Tensor, quality: Tensor) -> Tensor:
    """[N, 3, H, W] -> the same after JPEG's rounding of luma's cosine coefficients; chroma keeps its low third."""
    scale = torch.where(quality < 50, 50 / quality, 2 - quality / 50)
    steps = (torch.tensor(STEPS, device=x.device).float().view(8, 8) * scale[:, None, None]).clamp(min=1)
    colours, back = _colours(str(x.device))
    planes = torch.einsum("ij,njhw->nihw", colours, x)
    height, width = x.shape[2:]
    blocks = planes.unflatten(3, (width // 8, 8)).unflatten(2, (height // 8, 8)).transpose(3, 4)
    cosines = _cosines(str(x.device))
    terms = cosines @ blocks @ cosines.T
    steps = torch.stack([steps, 1.7 * steps, 1.7 * steps], 1)[:, :, None, None]
    terms = (terms / steps).round() * steps
    planes = (cosines.T @ terms @ cosines).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return torch.einsum("ij,njhw->nihw", back, planes)


@lru_cache(maxsize=4)
def _cosines(device: str) -> Tensor:
    index = torch.arange(8).float()
    rows = torch.cos(math.pi / 8 * (index + 0.5) * index[:, None]) / 2
    rows[0] /= math.sqrt(2)
    return rows.to(device)


@lru_cache(maxsize=4)
def _colours(device: str) -> tuple[Tensor, Tensor]:
    matrix = torch.tensor([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
    return matrix.to(device), torch.linalg.inv(matrix).to(device)
