"""flex::hierarchical_attention in PyTorch. Inputs and outputs: see the package docstring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from plugins.cached_attention import MASKED
from plugins.cached_attention.reference import TENSORS as CACHED
from plugins.cached_attention.reference import attention_op, low_attention, results
from plugins.op import CACHE_SCALES, PAGE_SCALES

TENSORS = *CACHED, "page_key", "page_value", "page_lengths", "pages", "page_count"
SIZES = "heads", "kv_heads", "head_dim", "page_size", "grid"


def _attention(
    inputs: Sequence[Any], page_scales: Sequence[Tensor], cache_scales: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Joint softmax over low-res and selected hi-res tokens (paper: hierarchical self-attention).

    inputs: of the op that has neither int8 pages nor an int8 cache. page_scales, cache_scales: the others of an op that
    has, each of keys and values.
    """
    given = dict(zip((*TENSORS, *SIZES), inputs, strict=True))
    heads, kv_heads, head_dim, page_size = (given[name] for name in SIZES[:4])
    page_lengths, pages, page_count = given["page_lengths"], given["pages"], given["page_count"]
    low = low_attention([given[name] for name in (*CACHED, "heads", "kv_heads", "head_dim", "grid")], cache_scales)
    batch, device = page_count.shape[0], page_count.device
    most = int(page_count.max())
    listed = pages[:, :most]  # [B, most]
    row = torch.arange(batch, device=device)[:, None]
    kind = torch.float32 if page_scales else low.query.dtype
    key_scale, value_scale = page_scales or (None, None)

    def gather(store: Tensor, scale: Tensor | None) -> Tensor:
        found = store[row, :, listed]  # advanced indices apart from each other lead: [B, most, Hkv, P, hd]
        if scale is not None:
            found = found.float() * scale[row, :, listed][..., None]
        return found.to(kind).transpose(1, 2).reshape(batch, kv_heads, most * page_size, head_dim)

    last = low.query[:, :, -1:].reshape(batch, kv_heads, -1, head_dim).to(kind)
    keys = gather(given["page_key"], key_scale).transpose(2, 3)
    high = (last @ keys).float().view(batch, heads, 1, most * page_size)
    used = (torch.arange(most, device=device) < page_count[:, None])[..., None] & (
        torch.arange(page_size, device=device) < page_lengths[listed][..., None]
    )  # [B, most, P]
    high = high.where(used.view(batch, 1, 1, most * page_size), MASKED)
    weights = torch.cat((low.scores, high), dim=-1).softmax(-1)[..., low.scores.shape[-1] :]
    # The ordinary context is already there: the joint softmax only scales it by the share the pages leave over.
    share = 1.0 - weights.sum(-1, keepdim=True)
    shared = weights.to(kind).view(batch, kv_heads, heads // kv_heads, most * page_size)
    read = shared @ gather(given["page_value"], value_scale)
    joint = share * low.context[:, :, -1:].float() + read.view(batch, heads, 1, head_dim).float()
    return results(low, torch.cat((low.context[:, :, :-1], joint.to(low.context.dtype)), dim=2))


def _variant(name: str, *, int8_pages: bool = False, int8_cache: bool = False) -> Callable[..., tuple[Tensor, ...]]:
    """The torch op for one way of storing pages and cache: the scales of the pages follow the other tensors, then those
    of the cache."""
    page_scales = PAGE_SCALES if int8_pages else ()
    cache_scales = CACHE_SCALES if int8_cache else ()
    count, pages, cache = len(TENSORS), len(page_scales), len(cache_scales)

    def body(*inputs: Any) -> tuple[Tensor, ...]:
        scales = inputs[count : count + pages + cache]
        return _attention((*inputs[:count], *inputs[count + pages + cache :]), scales[:pages], scales[pages:])

    return attention_op(name, (*TENSORS, *page_scales, *cache_scales), SIZES, 4 + cache, body)


hierarchical_attention = _variant("hierarchical_attention")
hierarchical_attention_int8 = _variant("hierarchical_attention_int8", int8_pages=True)
hierarchical_attention_int8_cache = _variant("hierarchical_attention_int8_cache", int8_cache=True)
hierarchical_attention_int8_both = _variant("hierarchical_attention_int8_both", int8_pages=True, int8_cache=True)
