"""flex::CachedAttention as an ONNX function for ONNX Runtime. Inputs and outputs: see the package docstring.

Opset 24, for TensorScatter: with past_* and present_* bound to one buffer it writes the new rows in place.
`0` in a Reshape keeps the dimension.
"""

from __future__ import annotations

from onnxscript import script
from onnxscript.values import Opset

from plugins.cached_attention import MASKED

op = Opset("", 24)
flex = Opset("flex", 1)


@script(flex, default_opset=op)
def TurnAndStore(query, key, value, past_key, past_value, positions, cos, sin, head_dim: int):
    """Rotary embedding and cache update: the rotated and scaled query [B, H, S, hd], and the present cache."""
    keep = op.Constant(value_ints=[0])
    width = op.Constant(value_int=head_dim)
    rest = op.Constant(value_ints=[-1])
    to_heads = op.Concat(keep, keep, rest, op.Unsqueeze(width, keep), axis=0)  # [B, S, heads, hd]

    # Rotary in float32; the query takes the softmax scale along.
    q = op.Transpose(op.Reshape(op.Cast(query, to=1), to_heads), perm=[0, 2, 1, 3])
    k = op.Transpose(op.Reshape(op.Cast(key, to=1), to_heads), perm=[0, 2, 1, 3])
    v = op.Transpose(op.Reshape(value, to_heads), perm=[0, 2, 1, 3])
    scaled = op.Div(op.RotaryEmbedding(q, cos, sin, positions), op.Sqrt(op.Cast(width, to=1)))
    turned = op.CastLike(scaled, query)
    turned_key = op.CastLike(op.RotaryEmbedding(k, cos, sin, positions), key)
    first = op.Gather(positions, op.Constant(value_int=0), axis=1)
    present_key = op.TensorScatter(past_key, turned_key, first, axis=2)
    present_value = op.TensorScatter(past_value, v, first, axis=2)
    return turned, present_key, present_value


@script(flex, default_opset=op)
def ImageMap(weights, image_begin, grid: int):
    """The map [B, G, G]: `weights` of the last query [B, H, L] on the image tokens, summed over heads."""
    keep = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    side = op.Constant(value_int=grid)
    summed = op.ReduceSum(weights, one, keepdims=0)  # [B, L]
    order = op.Range(op.Constant(value_int=0), op.Mul(side, side), op.Constant(value_int=1))
    token = op.Add(op.Unsqueeze(image_begin, one), order)
    square = op.Unsqueeze(side, keep)
    return op.Reshape(op.GatherElements(summed, token, axis=1), op.Concat(keep, square, square, axis=0))


@script(flex, default_opset=op)
def LowAttention(
    query, key, value, past_key, past_value, positions, cos, sin, image_begin,
    heads: int, kv_heads: int, head_dim: int, grid: int,
):  # fmt: skip
    """What both attention ops share: context [B, H, S, hd], the present cache and the map, and for the page part the
    last query, rotated and scaled [B, H, 1, hd], with its masked scores [B, H, 1, L] float32.

    What depends on `positions` and `image_begin` alone is the same in every layer, and ONNX Runtime computes it once.
    """
    turned, present_key, present_value = TurnAndStore(
        query, key, value, past_key, past_value, positions, cos, sin, head_dim=head_dim
    )
    keep = op.Constant(value_ints=[0])
    rest = op.Constant(value_ints=[-1])
    two = op.Constant(value_ints=[2])
    end = op.Constant(value_ints=[9223372036854775807])
    zero = op.Constant(value_int=0)
    to_groups = op.Concat(
        keep, op.Unsqueeze(op.Constant(value_int=kv_heads), keep), rest, keep, axis=0
    )  # [B, Hkv, ...]
    from_groups = op.Concat(keep, op.Unsqueeze(op.Constant(value_int=heads), keep), rest, keep, axis=0)  # [B, H, ...]

    # Causal attention over the whole cache; the heads of a group share one key/value head.
    grouped = op.MatMul(op.Reshape(turned, to_groups), op.Transpose(present_key, perm=[0, 1, 3, 2]))
    slot = op.Range(zero, op.Squeeze(op.Shape(past_key, start=2, end=3)), op.Constant(value_int=1))
    visible = op.LessOrEqual(slot, op.Unsqueeze(positions, op.Constant(value_ints=[1, 3])))  # [B, 1, S, L]
    all_scores = op.Cast(op.Reshape(grouped, from_groups), to=1)
    scores = op.Where(visible, all_scores, op.Constant(value_float=MASKED))
    weights = op.Softmax(scores, axis=-1)
    read = op.MatMul(op.Reshape(op.CastLike(weights, query), to_groups), present_value)
    context = op.Reshape(read, from_groups)
    map = ImageMap(op.Gather(weights, op.Constant(value_int=-1), axis=2), image_begin, grid=grid)
    return context, present_key, present_value, map, op.Slice(turned, rest, end, two), op.Slice(scores, rest, end, two)


@script(flex, default_opset=op)
def CachedAttention(
    query, key, value, past_key, past_value, positions, cos, sin, image_begin,
    heads: int, kv_heads: int, head_dim: int, grid: int,
):  # fmt: skip
    context, present_key, present_value, map, last_query, last_scores = LowAttention(
        query, key, value, past_key, past_value, positions, cos, sin, image_begin,
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, grid=grid,
    )  # fmt: skip
    joined = op.Reshape(op.Transpose(context, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
    return joined, present_key, present_value, map


FUNCTIONS = (TurnAndStore, ImageMap, LowAttention, CachedAttention)
