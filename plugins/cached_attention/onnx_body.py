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
def TurnAndStore(
    query, key, value, past_key, past_value, positions, query_cos, query_sin, cos, sin, head_dim: int,
):  # fmt: skip
    """Rotary embedding and cache update: the rotated query [B, H, S, hd], and the present cache."""
    keep = op.Constant(value_ints=[0])
    rest = op.Constant(value_ints=[-1])
    width = op.Unsqueeze(op.Constant(value_int=head_dim), keep)
    to_heads = op.Concat(keep, keep, rest, width, axis=0)  # [B, S, heads, hd]

    # Rotary in float32.
    q = op.Transpose(op.Reshape(op.Cast(query, to=1), to_heads), perm=[0, 2, 1, 3])
    k = op.Transpose(op.Reshape(op.Cast(key, to=1), to_heads), perm=[0, 2, 1, 3])
    v = op.Transpose(op.Reshape(value, to_heads), perm=[0, 2, 1, 3])
    turned = op.CastLike(op.RotaryEmbedding(q, query_cos, query_sin, positions), query)
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
def Scores(rows, keys, visible):
    """Masked scores [B, Hkv, R, n] float32 of scaled `rows` [B, Hkv, R, hd] and `keys` [B, Hkv, n, hd]."""
    products = op.MatMul(rows, op.Transpose(keys, perm=[0, 1, 3, 2]))
    return op.Where(visible, op.Cast(products, to=1), op.Constant(value_float=MASKED))


@script(flex, default_opset=op)
def LowAttention(
    query, key, value, past_key, past_value, positions, cos, sin, image_begin,
    heads: int, kv_heads: int, head_dim: int, grid: int,
):  # fmt: skip
    """What both attention ops share. The heads of a group share one key/value head, and their queries lie one after the
    other in R = group*S rows. Returns those, rotated and scaled [B, Hkv, R, hd]; the position of each row [B, R]; the
    present cache; masked scores and weights [B, Hkv, R, L] float32; and the map.

    What depends on `positions` and `image_begin` alone is the same in every layer, and ONNX Runtime computes it once.
    """
    # The query takes the softmax scale along, from tables that ONNX Runtime scales when it loads them: next to a MatMul
    # it would become that operator's factor, with which single rows are multiplied at half the speed (on the CPU).
    scale = op.Div(op.Constant(value_float=1.0), op.Sqrt(op.Cast(op.Constant(value_int=head_dim), to=1)))
    turned, present_key, present_value = TurnAndStore(
        query, key, value, past_key, past_value, positions, op.Mul(cos, scale), op.Mul(sin, scale), cos, sin,
        head_dim=head_dim,
    )  # fmt: skip
    keep = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    rest = op.Constant(value_ints=[-1])
    zero = op.Constant(value_int=0)
    all_heads = op.Unsqueeze(op.Constant(value_int=heads), keep)
    key_heads = op.Unsqueeze(op.Constant(value_int=kv_heads), keep)
    group = op.Div(all_heads, key_heads)

    # Causal attention over the whole cache.
    rows = op.Reshape(turned, op.Concat(keep, key_heads, rest, keep, axis=0))
    at = op.Tile(positions, op.Concat(one, group, axis=0))
    slot = op.Range(zero, op.Squeeze(op.Shape(past_key, start=2, end=3)), op.Constant(value_int=1))
    visible = op.LessOrEqual(slot, op.Unsqueeze(at, op.Constant(value_ints=[1, 3])))  # [B, 1, R, L]
    scores = Scores(rows, present_key, visible)
    weights = op.Softmax(scores, axis=-1)

    by_head = op.Reshape(weights, op.Concat(keep, all_heads, rest, keep, axis=0))
    map = ImageMap(op.Gather(by_head, op.Constant(value_int=-1), axis=2), image_begin, grid=grid)
    return rows, at, present_key, present_value, scores, weights, map


@script(flex, default_opset=op)
def JoinHeads(context, heads: int):
    """context [B, Hkv, R, hd] -> [B, S, H*hd]."""
    keep = op.Constant(value_ints=[0])
    all_heads = op.Unsqueeze(op.Constant(value_int=heads), keep)
    by_head = op.Reshape(context, op.Concat(keep, all_heads, op.Constant(value_ints=[-1]), keep, axis=0))
    return op.Reshape(op.Transpose(by_head, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))


@script(flex, default_opset=op)
def CachedAttention(
    query, key, value, past_key, past_value, positions, cos, sin, image_begin,
    heads: int, kv_heads: int, head_dim: int, grid: int,
):  # fmt: skip
    rows, at, present_key, present_value, scores, weights, map = LowAttention(
        query, key, value, past_key, past_value, positions, cos, sin, image_begin,
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, grid=grid,
    )  # fmt: skip
    context = op.MatMul(op.CastLike(weights, query), present_value)
    return JoinHeads(context, heads=heads), present_key, present_value, map


FUNCTIONS = (TurnAndStore, ImageMap, Scores, LowAttention, JoinHeads, CachedAttention)
