"""Which page slot each page has, where a layer's store has room for fewer pages than there are.

A *slot* is one of pages in this file; elsewhere that is a row of an engine's steps, and these are page slots. A *table*
says who has which, [B, 2, N] int64, zeros to begin with: of each of the N pages 1 + its slot, 0 where no slot has it;
and when it was last selected, counted in the layer's steps, 0 for never. The op that projects pages writes a new page
to its slot, and the op that reads them takes slots for pages.

Comparisons and sums alone, whose shapes are known: ONNX Runtime and TensorRT have them, and each layer's are tiny.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Assignment(NamedTuple):
    """held: 1 for each page that a slot had before, [B, N] int64. slots: that of each page, now, [B, N] int64; of those
    that have none, -1. listed: every slot, [B, K] int64; the first `count` [B] int64 are those of the wanted pages, in
    the order of their list. table: now. turnover: how many pages lost their slot, and how many of the new ones had lost
    theirs before, [B, 2] int64."""

    held: Tensor
    slots: Tensor
    listed: Tensor
    count: Tensor
    table: Tensor
    turnover: Tensor


def assign(table: Tensor, pages: Tensor, page_count: Tensor, slots: int) -> Assignment:
    """Give a slot to each wanted page, the first page_count [B] of `pages` [B, N], which lists every page once.

    A page keeps the slot it has. Others take free slots, then those whose pages were selected longest ago: of equally
    old ones the lower slot, for the lower page first. Of more pages than slots the first are taken: whoever asked for
    more must be told.
    """
    place, used = table[:, 0], table[:, 1]
    page = torch.arange(table.shape[2], device=table.device)
    slot = torch.arange(slots, device=table.device)
    count = torch.minimum(page_count, torch.full_like(page_count, slots))
    position = torch.where(pages[:, None, :] == page[:, None], page, 0).sum(2)  # of each page in the list
    wanted = position < count[:, None]
    new = wanted & (place == 0)
    last = torch.where(wanted, used.amax(1, keepdim=True) + 1, used)

    holds = place[:, :, None] == slot + 1  # [B, N, K]
    age = torch.where(holds, last[:, :, None], 0).amax(1)  # the pages that are wanted come last
    turn = _rank(age * slots + slot)
    before = (new[:, None, :] & (page < page[:, None])).sum(2)  # new pages below each
    given = torch.where(turn[:, None, :] == before[:, :, None], slot + 1, 0).sum(2)
    lost = (holds & (turn < new.sum(1, keepdim=True))[:, None, :]).sum(2) > 0
    after = torch.where(new, given, torch.where(lost, 0, place))

    # A list of slots that is whole, with those of no wanted page behind the others, as lists of pages are.
    wait = torch.where(after[:, :, None] == slot + 1, table.shape[2] - position[:, :, None], 0).amax(1)
    rank = _rank(slot - wait * slots)
    listed = torch.where(rank[:, None, :] == slot[:, None], slot, 0).sum(2)
    turnover = torch.stack((lost.sum(1), (new & (used > 0)).sum(1)), 1)
    return Assignment((place > 0).long(), after - 1, listed, count, torch.stack((after, last), 1), turnover)


def _rank(keys: Tensor) -> Tensor:
    """How many of a row's keys [B, K], which all differ, are smaller than each."""
    return (keys[:, None, :] < keys[:, :, None]).sum(2)
