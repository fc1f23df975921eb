"""Shapes of the inputs of every op, as the decoder of a model calls them."""

from __future__ import annotations

from engines.bundle.geometry import Geometry
from engines.bundle.pages import page_size


def sizes(g: Geometry) -> dict[str, int]:
    """The attributes of the ops of a model."""
    names = "hidden", "heads", "kv_heads", "head_dim", "grid", "cells", "threshold"
    stores = {"int8_pages": int(g.int8_pages), "int8_cache": int(g.int8_cache)}
    stores |= {"page_slots": int(g.page_slots is not None)}
    return {name: getattr(g, name) for name in names} | {"page_size": page_size(g)} | stores


def input_shapes(g: Geometry, *, batch: int = 1, steps: int = 1) -> dict[str, dict[str, tuple[int, ...]]]:
    """Op -> shapes of its inputs, by name and in order, for `steps` new tokens and a cache for the whole context."""
    query, new = (batch, steps, g.heads * g.head_dim), (batch, steps, g.kv_heads * g.head_dim)
    cache, turn = (batch, g.kv_heads, g.context, g.head_dim), (g.context, g.head_dim // 2)
    slots = g.pages, page_size(g)
    store = (batch, g.kv_heads, *slots, g.head_dim)
    weight, turned = (g.kv_heads * g.head_dim, g.hidden), (batch, *slots, g.head_dim // 2)
    stores = {"page_key": store, "page_value": store}
    scales = {"page_key_scale": store[:-1], "page_value_scale": store[:-1]} if g.int8_pages else {}
    cache_scales = {"past_key_scale": cache[:-1], "past_value_scale": cache[:-1]} if g.int8_cache else {}
    listed = {"pages": (batch, g.pages), "page_count": (batch,)}
    attention = {
        "query": query,
        "key": new,
        "value": new,
        "past_key": cache,
        "past_value": cache,
        "positions": (batch, steps),
        "cos": turn,
        "sin": turn,
        "image_begin": (batch,),
    }
    projection = {
        "features": (batch, *slots, g.hidden),
        "key_weight": weight,
        "value_weight": weight,
        "cos": turned,
        "sin": turned,
    }
    return {
        "SelectPages": {"map": (batch, g.grid, g.grid), "margins": (batch, 2), "page_budget": (batch,)},
        "CachedAttention": attention | cache_scales,
        "ProjectPages": projection | stores | {"projected": (batch, g.pages)} | listed | scales,
        "HierarchicalAttention": attention | stores | {"page_lengths": (g.pages,)} | listed | scales | cache_scales,
    }
