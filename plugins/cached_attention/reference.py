"""flex::cached_attention in PyTorch. Inputs and outputs: see the package docstring."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from plugins.cached_attention import MASKED


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, heads, S, hd] by cos, sin [B, 1, S, hd/2] float32 (half-split layout); float32 result."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def low_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    image_begin: Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    grid: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What both attention ops share. Arguments as in the package docstring.

    Returns context [B, H, S, hd] T, present_key, present_value, map, rotated and scaled query [B, H, S, hd] T, and the
    masked scores of the last query [B, H, 1, L] float32.
    """
    batch, steps, _ = query.shape
    capacity = past_key.shape[2]

    def split_heads(x: Tensor) -> Tensor:
        return x.view(batch, steps, -1, head_dim).transpose(1, 2)

    turn = cos[positions][:, None], sin[positions][:, None]
    query = (rotary(split_heads(query), *turn) / math.sqrt(head_dim)).to(key.dtype)
    key = rotary(split_heads(key), *turn).to(key.dtype)
    slot = positions[:, None, :, None].expand_as(key)
    present_key = past_key.scatter(2, slot, key)
    present_value = past_value.scatter(2, slot, split_heads(value))

    grouped = query.reshape(batch, kv_heads, -1, head_dim)  # the group's heads share one key/value head
    scores = (grouped @ present_key.transpose(2, 3)).float().view(batch, heads, steps, capacity)
    visible = torch.arange(capacity, device=query.device) <= positions[:, None, :, None]
    scores = scores.where(visible, MASKED)
    weights = scores.softmax(-1)
    context = (weights.to(key.dtype).view(batch, kv_heads, -1, capacity) @ present_value).view_as(query)

    token = image_begin[:, None] + torch.arange(grid * grid, device=query.device)
    map = weights[:, :, -1].sum(1).gather(1, token).view(batch, grid, grid)
    return context, present_key, present_value, map, query, scores[:, :, -1:]


@torch.library.custom_op("flex::cached_attention", mutates_args=())
def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    image_begin: Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    grid: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ordinary causal attention over the cache, and its map (paper: low-resolution self-attention)."""
    context, present_key, present_value, map, _, _ = low_attention(
        query, key, value, past_key, past_value, positions, cos, sin, image_begin, heads, kv_heads, head_dim, grid
    )
    return context.transpose(1, 2).reshape(query.shape), present_key, present_value, map


def fake(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """Shapes and dtypes of both attention ops' results, for tracing; `grid` is their last argument."""
    map = torch.empty(query.shape[0], rest[-1], rest[-1], dtype=torch.float32, device=query.device)
    return torch.empty_like(query), torch.empty_like(past_key), torch.empty_like(past_value), map


cached_attention.register_fake(fake)
