"""flex::hierarchical_attention in PyTorch. Inputs and outputs: see the package docstring."""

from __future__ import annotations

import torch
from torch import Tensor

from plugins.cached_attention import MASKED
from plugins.cached_attention.reference import fake, low_attention


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    image_begin: Tensor,
    page_key: Tensor,
    page_value: Tensor,
    page_lengths: Tensor,
    pages: Tensor,
    page_count: Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    grid: int,
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both ops; `scales`: of the key and the value pages, where they are int8."""
    context, present_key, present_value, map, turned, low = low_attention(
        query, key, value, past_key, past_value, positions, cos, sin, image_begin, heads, kv_heads, head_dim, grid
    )
    batch = page_key.shape[0]
    most = int(page_count.max())
    listed = pages[:, :most]  # [B, most]
    row = torch.arange(batch, device=query.device)[:, None]
    kind = query.dtype if scales is None else torch.float32

    def gather(store: Tensor, scale: Tensor | None) -> Tensor:
        found = store[row, :, listed]  # advanced indices apart from each other lead: [B, most, Hkv, P, hd]
        if scale is not None:
            found = found.float() * scale[row, :, listed][..., None]
        return found.transpose(1, 2).reshape(batch, kv_heads, most * page_size, head_dim)

    key_scale, value_scale = scales or (None, None)
    last = turned[:, :, -1:].reshape(batch, kv_heads, -1, head_dim).to(kind)
    high = (last @ gather(page_key, key_scale).transpose(2, 3)).float().view(batch, heads, 1, most * page_size)
    used = (torch.arange(most, device=query.device) < page_count[:, None])[..., None] & (
        torch.arange(page_size, device=query.device) < page_lengths[listed][..., None]
    )  # [B, most, P]
    high = high.where(used.view(batch, 1, 1, most * page_size), MASKED)
    weights = torch.cat((low, high), dim=-1).softmax(-1)[..., low.shape[-1] :]
    # The ordinary context is already there: the joint softmax only scales it by the share the pages leave over.
    share = 1.0 - weights.sum(-1, keepdim=True)
    shared = weights.to(kind).view(batch, kv_heads, heads // kv_heads, most * page_size)
    read = shared @ gather(page_value, value_scale)
    joint = share * context[:, :, -1:].float() + read.view(batch, heads, 1, head_dim).float()
    context = torch.cat((context[:, :, :-1], joint.to(context.dtype)), dim=2)
    return context.transpose(1, 2).reshape(query.shape), present_key, present_value, map


@torch.library.custom_op("flex::hierarchical_attention", mutates_args=())
def hierarchical_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    image_begin: Tensor,
    page_key: Tensor,
    page_value: Tensor,
    page_lengths: Tensor,
    pages: Tensor,
    page_count: Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    grid: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Joint softmax over low-res and selected hi-res tokens (paper: hierarchical self-attention)."""
    return _attention(
        query, key, value, past_key, past_value, positions, cos, sin, image_begin, page_key, page_value, page_lengths,
        pages, page_count, heads, kv_heads, head_dim, page_size, grid,
    )  # fmt: skip


@torch.library.custom_op("flex::hierarchical_attention_int8", mutates_args=())
def hierarchical_attention_int8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    image_begin: Tensor,
    page_key: Tensor,
    page_value: Tensor,
    page_lengths: Tensor,
    pages: Tensor,
    page_count: Tensor,
    page_key_scale: Tensor,
    page_value_scale: Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    grid: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same over int8 pages."""
    return _attention(
        query, key, value, past_key, past_value, positions, cos, sin, image_begin, page_key, page_value, page_lengths,
        pages, page_count, heads, kv_heads, head_dim, page_size, grid,
        (page_key_scale, page_value_scale),
    )  # fmt: skip


hierarchical_attention.register_fake(fake)
hierarchical_attention_int8.register_fake(fake)
