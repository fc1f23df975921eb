"""flex::select_pages in PyTorch. Inputs and outputs: see the package docstring."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("flex::select_pages", mutates_args=())
def select_pages(
    map: Tensor, margins: Tensor, page_budget: Tensor, grid: int, cells: int, threshold: int
) -> tuple[Tensor, Tensor]:
    """The official selection, with a page budget on top (official: modeling_llama.py, `need_to_get_hd_feature_mask`).

    The pooled score decides twice: a cell is eligible when any token under its window passes the threshold, which is
    when the window's maximum passes; and of the eligible cells the best `page_budget` stay. Eligibility grows with the
    score, so the selected cells are always a prefix of the order by score.
    """
    score, flat = scores(map, margins, grid, cells)
    pages = torch.sort(score, dim=1, descending=True, stable=True).indices
    eligible = ((score * 255 > threshold) & ~flat).sum(1)
    return pages, torch.minimum(eligible, page_budget)


def scores(map: Tensor, margins: Tensor, grid: int, cells: int) -> tuple[Tensor, Tensor]:
    """Of every cell the largest normalised attention under its window [B, cells * cells] float32 0..1, and [B, 1]:
    whether a map is flat, of which nothing is selected (official: 0/0 = NaN, and NaN > threshold is false)."""
    index = torch.arange(grid, device=map.device)
    inside = (index >= margins[..., None]) & (index < grid - margins[..., None])  # [B, 2, G]
    map = torch.where(inside[:, 0, :, None] & inside[:, 1, None, :], map, 0.0)
    low, high = map.amin((1, 2), keepdim=True), map.amax((1, 2), keepdim=True)
    score = F.adaptive_max_pool2d((map - low) / (high - low).where(high != low, 1.0), cells).flatten(1)
    return score, (high == low).flatten(1)


@select_pages.register_fake
def _(
    map: Tensor, margins: Tensor, page_budget: Tensor, grid: int, cells: int, threshold: int
) -> tuple[Tensor, Tensor]:
    return margins.new_empty(map.shape[0], cells * cells), margins.new_empty(map.shape[0])
