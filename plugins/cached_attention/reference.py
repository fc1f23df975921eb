"""flex::cached_attention in PyTorch. Inputs and outputs: see the package docstring."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plugins.cached_attention import LEAST, MASKED, STEPS
from plugins.op import CACHE_SCALES


@torch.library.custom_op("flex::to_int8", mutates_args=())
def to_int8(x: Tensor) -> Tensor:
    """x, float32 within -127 .. 127, rounded to nearest even: int8. An op because ONNX has one for it, QuantizeLinear,
    which every TensorRT knows; a cast to int8 is not among what TensorRT 10.3's parser lists."""
    return x.round().to(torch.int8)


@to_int8.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys or values [..., hd] -> int8 [..., hd] and the steps they are counted in [...] float32."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    step = torch.where(largest < LEAST, LEAST, largest) / STEPS  # NaN stays NaN
    return to_int8(x / step), step[..., 0]


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, heads, S, hd] by cos, sin [B, 1, S, hd/2] float32 (half-split layout); float32 result."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class LowAttention(NamedTuple):
    """What `low_attention` finds: of all queries the context [B, H, S, hd] T and themselves, rotated and scaled
    [B, H, S, hd] T; the present cache, keys and values, then the steps of both if it is int8; the map; and the masked
    scores of the last query [B, H, 1, L] float32."""

    context: Tensor
    query: Tensor
    present: tuple[Tensor, ...]
    map: Tensor
    scores: Tensor


def low_attention(inputs: Sequence[Any], scales: Sequence[Tensor] = ()) -> LowAttention:
    """What both attention ops share.

    inputs: the tensors of a cache that is not int8, then heads, kv_heads, head_dim and grid, as the package docstring
    has them. scales: past_key_scale and past_value_scale, where the cache is int8.
    """
    query, key, value, past_key, past_value, positions, cos, sin, image_begin, heads, kv_heads, head_dim, grid = inputs
    batch, steps, _ = query.shape
    capacity, kind = past_key.shape[2], query.dtype

    def split_heads(x: Tensor) -> Tensor:
        return x.view(batch, steps, -1, head_dim).transpose(1, 2)

    turn = cos[positions][:, None], sin[positions][:, None]
    query = (rotary(split_heads(query), *turn) / math.sqrt(head_dim)).to(kind)
    new = rotary(split_heads(key), *turn), split_heads(value)
    slot = positions[:, None, :].expand(batch, kv_heads, steps)

    def stored(past: Tensor, rows: Tensor) -> Tensor:
        index = slot if past.dim() == 3 else slot[..., None].expand_as(rows)
        return past.scatter(2, index, rows.to(past.dtype))

    present: tuple[Tensor, ...]
    if scales:
        (keys, key_step), (values, value_step) = quantise(new[0]), quantise(new[1])
        pasts = past_key, past_value, *scales
        present = tuple(map(stored, pasts, (keys, values, key_step, value_step)))
        read_key, read_value = (present[half].float() * present[half + 2][..., None] for half in (0, 1))
    else:
        present = stored(past_key, new[0]), stored(past_value, new[1])
        read_key, read_value = present

    grouped = query.reshape(batch, kv_heads, -1, head_dim)  # the group's heads share one key/value head
    scores = (grouped.to(read_key.dtype) @ read_key.transpose(2, 3)).float().view(batch, heads, steps, capacity)
    visible = torch.arange(capacity, device=query.device) <= positions[:, None, :, None]
    scores = scores.where(visible, MASKED)
    weights = scores.softmax(-1)
    context = weights.to(read_value.dtype).view(batch, kv_heads, -1, capacity) @ read_value

    token = image_begin[:, None] + torch.arange(grid * grid, device=query.device)
    image = weights[:, :, -1].sum(1).gather(1, token).view(batch, grid, grid)
    return LowAttention(context.view_as(query).to(kind), query, present, image, scores[:, :, -1:])


def results(low: LowAttention, context: Tensor) -> tuple[Tensor, ...]:
    """The outputs of an attention op, in order. context: [B, H, S, hd]."""
    key, value, *scales = low.present
    return context.transpose(1, 2).flatten(2), key, value, low.map, *scales


def attention_op(
    name: str, tensors: Sequence[str], sizes: Sequence[str], outputs: int, body: Callable[..., tuple[Tensor, ...]]
) -> Callable[..., tuple[Tensor, ...]]:
    """`body` as the torch op flex::NAME. tensors, sizes: names of its arguments, in order."""
    arguments = ", ".join([f"Tensor {each}" for each in tensors] + [f"int {each}" for each in sizes])
    schema = f"({arguments}) -> ({', '.join(['Tensor'] * outputs)})"
    op = torch.library.custom_op(f"flex::{name}", body, mutates_args=(), schema=schema)

    @op.register_fake
    def _(*arguments: Any) -> tuple[Tensor, ...]:
        given = dict(zip((*tensors, *sizes), arguments, strict=True))
        query, like, side = given["query"], torch.empty_like, given["grid"]
        map = torch.empty(query.shape[0], side, side, dtype=torch.float32, device=query.device)
        scales = [like(given[each]) for each in CACHE_SCALES if each in given]
        return like(query), like(given["past_key"]), like(given["past_value"]), map, *scales

    return op


TENSORS = "query", "key", "value", "past_key", "past_value", "positions", "cos", "sin", "image_begin"
SIZES = "heads", "kv_heads", "head_dim", "grid"


def _cached_attention(*inputs: Any) -> tuple[Tensor, ...]:
    """Ordinary causal attention over the cache, and its map (paper: low-resolution self-attention)."""
    low = low_attention(inputs)
    return results(low, low.context)


def _cached_attention_int8_cache(*inputs: Any) -> tuple[Tensor, ...]:
    """The same over an int8 cache."""
    count = len(TENSORS)
    low = low_attention((*inputs[:count], *inputs[count + 2 :]), inputs[count : count + 2])
    return results(low, low.context)


cached_attention = attention_op("cached_attention", TENSORS, SIZES, 4, _cached_attention)
cached_attention_int8_cache = attention_op(
    "cached_attention_int8_cache", (*TENSORS, *CACHE_SCALES), SIZES, 6, _cached_attention_int8_cache
)
