"""What aids ask of attention to pages, and of the maps that select them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engines.bundle.pages import page_of_token
from export.default_model.learning.aids import COUNTER, COUNTING, THRESHOLDS, Losses, probes
from export.default_model.learning.packing import Batch, Reads, pack
from export.default_model.model import GEOMETRY as G
from export.default_model.questions import build_tokenizer
from export.default_model.scenes import make_scene

page_of = torch.from_numpy(page_of_token(G))


@pytest.fixture(scope="module")
def batch() -> Batch:
    scenes = [make_scene(np.random.default_rng(seed)) for seed in range(6)]
    return pack(np.random.default_rng(0), [(s.things, s.image.size) for s in scenes], 9, build_tokenizer(), hard=1.0)


def test_reading_is_drawn_to_all_patches_of_a_digit_alike(batch):
    """All of them beat the best one alone, and the one in view where its page is the only one; more beats less."""
    reads = Reads.of(batch)
    parts = reads.of_entries(batch.parts)  # [S, V, PARTS]
    several = int(((parts >= 0).sum(-1) > 1).sum())
    assert several > 20

    def loss(share: torch.Tensor, visible: torch.Tensor) -> float:
        """`share`: of each part, in all heads."""
        weights = torch.zeros(*parts.shape[:2], G.hires_side**2).scatter_add(-1, parts.clamp(min=0), share)
        losses = Losses(probes(G.hidden), batch, reads)
        losses.reading(weights[:, None].expand(-1, G.heads, -1, -1), visible, page_of)
        return float(losses.means()["read"])

    there = (parts >= 0).float()
    alike = there / there.sum(-1, keepdim=True).clamp(min=1)
    best = there * (torch.arange(parts.shape[-1]) == 0)
    everything = torch.ones(*parts.shape[:2], G.pages, dtype=torch.bool)
    assert loss(alike, everything) < loss(0.8 * alike, everything) < loss(best, everything)
    assert loss(alike, everything) < loss(0.7 * alike + 0.3 * best, everything)
    only = torch.zeros_like(everything).scatter(-1, page_of[parts[..., :1].clamp(min=0)], True)
    other_page = (page_of[parts.clamp(min=0)] != page_of[parts[..., :1].clamp(min=0)]) & (parts >= 0)
    seen = there * ~other_page
    alike_seen = seen / seen.sum(-1, keepdim=True).clamp(min=1)
    assert other_page.any() and loss(alike_seen, only) < loss(alike, only)


def test_every_page_of_a_digit_is_to_pass_any_threshold(batch):
    """Nothing is asked beyond the largest one, and the page that is furthest from it counts."""
    reads = Reads.of(batch)
    parts = reads.of_entries(batch.parts)
    pages = page_of[parts.clamp(min=0)]
    assert ((pages != pages[..., :1]) & (parts >= 0)).sum() > 10, "digits on several pages"

    def loss(share: torch.Tensor) -> float:
        """`share` [PARTS]: scores of the pages of each part, of the largest threshold; of two parts of a page the
        larger one."""
        each = (share * THRESHOLDS[1] / 255).expand(parts.shape) * (parts >= 0)
        scores = torch.zeros(*parts.shape[:2], G.pages).scatter_reduce(-1, pages, each, "amax")
        losses = Losses(probes(G.hidden), batch, reads)
        losses.selection(scores, page_of)
        return float(losses.means()["selects"])

    one = torch.ones(parts.shape[-1])
    first = (torch.arange(parts.shape[-1]) == 0).float()
    assert loss(one) == loss(1.5 * one) == 0
    assert 0 < loss(first + 0.9 * (1 - first)) < loss(first + 0.5 * (1 - first)) < loss(first) < loss(0 * one)
    assert loss(0.5 * one) > loss(first + 0.5 * (1 - first)), "digits on one page count, too"


def test_what_is_counted_besides_costs_as_much_of_a_thing_however_many_there_are(batch):
    """Each thing has its share; then something that is no thing has a part of one, and the answer is off by it."""
    reads = Reads.of(batch)
    counts = [int(n) for n in batch.count.flatten() if n > 0]
    assert max(counts) >= 4 > min(counts)
    begin, span = 3, 3 + G.image_tokens
    middles = [set(row[row >= 0].tolist()) for row in batch.near.flatten(2).flatten(0, 1)]

    def loss(besides: float) -> float:
        """`besides`: of a thing, on an image token that has no middle."""

        def rows(positions: torch.Tensor) -> torch.Tensor:
            weights = torch.zeros(*positions.shape[:2], G.heads, positions.shape[2], span + batch.ids.shape[2])
            for index, count in enumerate(batch.count.flatten().tolist()):
                row = weights.flatten(0, 1)[index]
                empty = next(token for token in range(G.image_tokens) if token not in middles[index])
                for head, rest in COUNTING.items():
                    row[head, :, 0] = rest
                    for thing in batch.near.flatten(0, 1)[index][: max(count, 0)]:
                        row[head, :, begin + thing[thing >= 0]] += 1 / (thing >= 0).sum()
                    row[head, :, begin + empty] = besides
                    row[head] /= row[head].sum(-1, keepdim=True)
            return weights

        losses = Losses(probes(G.hidden), batch, reads)
        losses.attention(COUNTER, rows, span, begin)
        return float(losses.means()["even"])

    def expected(besides: float, exact: float = 0.3) -> float:
        off = [(math.log(1 + besides / n), exact / n) for n in counts]
        return 2 * float(np.mean([d * d / (2 * e) if d < e else d - e / 2 for d, e in off]))

    assert loss(0.0) < 1e-4
    for besides in (0.2, 0.5, 2.0):
        assert abs(loss(besides) - expected(besides)) < 1e-3 * expected(besides) + 1e-4
