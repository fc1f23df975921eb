"""flex::CachedAttention as an ONNX function for ONNX Runtime. Inputs and outputs: see the package docstring.

Opset 24, for TensorScatter: with past_* and present_* bound to one buffer it writes the new rows in place.
`0` in a Reshape keeps the dimension.
"""

from __future__ import annotations

from onnxscript import script
from onnxscript.values import Opset

op = Opset("", 24)
flex = Opset("flex", 1)


@script(flex, default_opset=op)
def LowAttention(query, key, value, past_key, past_value, past_length, cos, sin, image_begin, grid: int):
    """What both attention ops share: context [B, H, S, hd], the present cache and the map, and for the page part the
    last query, rotated and scaled [B, H, 1, hd], with its masked scores [B, H, 1, L] float32."""
    keep = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    rest = op.Constant(value_ints=[-1])
    two = op.Constant(value_ints=[2])
    zero = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    kv_heads = op.Shape(past_key, start=1, end=2)
    capacity = op.Shape(past_key, start=2, end=3)
    head_dim = op.Shape(past_key, start=3, end=4)
    to_heads = op.Concat(keep, keep, rest, head_dim, axis=0)  # [B, S, heads, hd]
    to_groups = op.Concat(keep, kv_heads, rest, head_dim, axis=0)  # [B, Hkv, group * S, hd]

    # Rotary in float32; the query takes the softmax scale along.
    new = op.Range(zero, op.Squeeze(op.Shape(query, start=1, end=2)), step)
    position = op.Add(op.Unsqueeze(past_length, one), new)  # [B, S]
    q = op.Transpose(op.Reshape(op.Cast(query, to=1), to_heads), perm=[0, 2, 1, 3])
    k = op.Transpose(op.Reshape(op.Cast(key, to=1), to_heads), perm=[0, 2, 1, 3])
    v = op.Transpose(op.Reshape(value, to_heads), perm=[0, 2, 1, 3])
    scaled = op.Div(op.RotaryEmbedding(q, cos, sin, position), op.Sqrt(op.Cast(head_dim, to=1)))
    turned = op.CastLike(scaled, query)
    turned_key = op.CastLike(op.RotaryEmbedding(k, cos, sin, position), key)
    present_key = op.TensorScatter(past_key, turned_key, past_length, axis=2)
    present_value = op.TensorScatter(past_value, v, past_length, axis=2)

    # Causal attention over the whole cache; the heads of a group share one key/value head.
    grouped = op.MatMul(op.Reshape(turned, to_groups), op.Transpose(present_key, perm=[0, 1, 3, 2]))
    heads = op.Shape(turned, start=1, end=2)
    all_scores = op.Reshape(op.Cast(grouped, to=1), op.Concat(keep, heads, rest, capacity, axis=0))
    slot = op.Range(zero, op.Squeeze(capacity), step)
    visible = op.LessOrEqual(slot, op.Unsqueeze(position, op.Constant(value_ints=[1, 3])))  # [B, 1, S, L]
    scores = op.Where(visible, all_scores, op.Constant(value_float=-60000.0))
    weights = op.Softmax(scores, axis=-1)
    to_weights = op.Concat(keep, kv_heads, rest, capacity, axis=0)
    read = op.MatMul(op.Reshape(op.CastLike(weights, query), to_weights), present_value)
    context = op.Reshape(read, op.Concat(keep, heads, rest, head_dim, axis=0))

    # The map: weights of the last query on the image tokens, summed over heads.
    summed = op.ReduceSum(op.Gather(weights, op.Constant(value_int=-1), axis=2), one, keepdims=0)  # [B, L]
    side = op.Constant(value_int=grid)
    offset = op.Range(zero, op.Mul(side, side), step)
    token = op.Min(op.Add(op.Unsqueeze(image_begin, one), offset), op.Sub(capacity, one))
    side_shape = op.Unsqueeze(side, keep)
    map = op.Reshape(op.GatherElements(summed, token, axis=1), op.Concat(keep, side_shape, side_shape, axis=0))

    last_query = op.Slice(turned, rest, op.Constant(value_ints=[9223372036854775807]), two)
    last_scores = op.Slice(scores, rest, op.Constant(value_ints=[9223372036854775807]), two)
    return context, present_key, present_value, map, last_query, last_scores


@script(flex, default_opset=op)
def CachedAttention(query, key, value, past_key, past_value, past_length, cos, sin, image_begin, grid: int):
    context, present_key, present_value, map, last_query, last_scores = LowAttention(
        query, key, value, past_key, past_value, past_length, cos, sin, image_begin, grid=grid
    )
    joined = op.Reshape(op.Transpose(context, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
    return joined, present_key, present_value, map


FUNCTIONS = (LowAttention, CachedAttention)
