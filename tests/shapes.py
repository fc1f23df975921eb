"""Shapes of the inputs of every op, as the decoder of a model calls them."""

from __future__ import annotations

from engines.bundle.geometry import Geometry
from engines.bundle.pages import page_size


def sizes(g: Geometry) -> dict[str, int]:
    """The attributes of the ops of a model."""
    names = "hidden", "heads", "kv_heads", "head_dim", "grid", "cells", "threshold"
    return {name: getattr(g, name) for name in names} | {"page_size": page_size(g), "int8_pages": int(g.int8_pages)}


def input_shapes(g: Geometry, *, batch: int = 1, steps: int = 1) -> dict[str, list[tuple[int, ...]]]:
    """Op -> shapes of its inputs, in order, for `steps` new tokens and a cache for the whole context."""
    query, new = (batch, steps, g.heads * g.head_dim), (batch, steps, g.kv_heads * g.head_dim)
    cache, turn = (batch, g.kv_heads, g.context, g.head_dim), (g.context, g.head_dim // 2)
    attention = [query, new, new, cache, cache, (batch, steps), turn, turn, (batch,)]
    slots = g.pages, page_size(g)
    store = (batch, g.kv_heads, *slots, g.head_dim)
    listed = [(batch, g.pages), (batch,)]
    weight, turned = (g.kv_heads * g.head_dim, g.hidden), (batch, *slots, g.head_dim // 2)
    return {
        "SelectPages": [(batch, g.grid, g.grid), (batch, 2), (batch,)],
        "CachedAttention": attention,
        "ProjectPages": [
            (batch, *slots, g.hidden), weight, weight, turned, turned, store, store, (batch, g.pages), *listed,
        ],
        "HierarchicalAttention": [*attention, store, store, (g.pages,), *listed],
    }  # fmt: skip
