"""Inputs of the attention ops at any size, with poison wherever an op must not look."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sizes:
    """Rows of `steps` new tokens after `past` cached ones; `counts` pages listed of `pages` of `page_size` tokens."""

    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 16
    grid: int = 6
    pages: int = 9
    page_size: int = 4
    capacity: int = 60
    steps: int = 1
    past: tuple[int, ...] = (41,)
    counts: tuple[int, ...] = (2,)
    begin: tuple[int, ...] = (3,)
    short_pages: bool = False

    def attributes(self, paged: bool) -> dict[str, int]:
        """Those of flex::HierarchicalAttention (paged) or flex::CachedAttention, in the order of their arguments."""
        sizes = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        return sizes | ({"page_size": self.page_size} if paged else {}) | {"grid": self.grid}


def attention_inputs(sizes: Sizes, seed: int = 0, poison: float = np.nan) -> list[np.ndarray]:
    """Inputs of flex::HierarchicalAttention, in order, float32; the first nine are those of flex::CachedAttention.

    `poison` fills cache slots after the new tokens, pages that are not listed, and the ends of short pages.
    """
    rng, s = np.random.default_rng(seed), sizes
    batch, past = len(s.past), np.array(s.past, np.int64)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    cache = [normal(batch, s.kv_heads, s.capacity, s.head_dim) for _ in range(2)]
    store = [normal(batch, s.kv_heads, s.pages, s.page_size, s.head_dim) for _ in range(2)]
    lengths = np.full(s.pages, s.page_size, np.int64)
    if s.short_pages:
        lengths[::2] = s.page_size - 1
    listed = np.stack([rng.permutation(s.pages) for _ in range(batch)]).astype(np.int64)
    for half, pages in zip(cache, store, strict=True):
        for row in range(batch):
            half[row, :, past[row] + s.steps :] = poison
            pages[row, :, listed[row, s.counts[row] :]] = poison
        for page, length in enumerate(lengths):
            pages[:, :, page, length:] = poison
    angle = np.outer(np.arange(s.capacity), 1 / 10000 ** (np.arange(0, s.head_dim, 2) / s.head_dim))
    return [
        normal(batch, s.steps, s.heads * s.head_dim),
        normal(batch, s.steps, s.kv_heads * s.head_dim),
        normal(batch, s.steps, s.kv_heads * s.head_dim),
        *cache,
        past[:, None] + np.arange(s.steps),
        np.cos(angle).astype(np.float32),
        np.sin(angle).astype(np.float32),
        np.array(s.begin, np.int64),
        *store,
        lengths,
        listed,
        np.array(s.counts, np.int64),
    ]
