"""flex::CachedAttention as an ONNX function for TensorRT without plugins.

Inputs and outputs: see the package docstring. `0` in a Reshape keeps the dimension.
No shape depends on data. Written in the patterns TensorRT-RTX builds into good kernels, as its list of layers shows:

- TensorScatter, when past_* is an input of the network and present_* an output, writes the cache in place.
- MatMul, Where, Softmax, MatMul become one attention kernel, whatever the masking, as long as nobody else reads the
  weights; where there is no such kernel (float32, small heads), they still build. (The ONNX op `Attention` does not
  build there, and copies the keys once more where it does.)
- That kernel first copies keys and values into a layout of its own, the whole cache. So the last query, whose weights
  the map needs anyway, goes another way, which reads the cache where it is; and in a decode step, where there is no
  other query, the kernel gets a single key. The last query's scores and weights stay float32 throughout.
"""

from __future__ import annotations

from onnxscript import script

from plugins.cached_attention import MASKED
from plugins.cached_attention.onnx_body import ImageMap, JoinLast, Turn, TurnAndStore, flex, op


@script(flex, default_opset=op)
def StaticAttention(
    query, key, value, past_key, past_value, positions, cos, sin, image_begin,
    heads: int, kv_heads: int, head_dim: int, grid: int,
):  # fmt: skip
    """What both attention ops share: context [B, H, S, hd] of all queries but the last, whose row means nothing, the
    present cache, the map; and of the last query: itself, rotated and scaled [B, H, 1, hd], its masked scores
    [B, H, 1, L] float32 and its context [B, H, 1, hd] float32.
    """
    rotated, present_key, present_value = TurnAndStore(
        query, key, value, past_key, past_value, positions, cos, sin, cos, sin, head_dim=head_dim
    )
    scale = op.Sqrt(op.Cast(op.Constant(value_int=head_dim), to=1))
    turned = op.CastLike(op.Div(op.Cast(rotated, to=1), scale), query)
    keep = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    rest = op.Constant(value_ints=[-1])
    two = op.Constant(value_ints=[2])
    three = op.Constant(value_ints=[3])
    end = op.Constant(value_ints=[9223372036854775807])
    all_heads = op.Unsqueeze(op.Constant(value_int=heads), keep)
    key_heads = op.Unsqueeze(op.Constant(value_int=kv_heads), keep)
    group = op.Div(all_heads, key_heads)
    masked = op.Constant(value_float=MASKED)
    capacity = op.Shape(past_key, start=2, end=3)
    slot = op.Range(op.Constant(value_int=0), op.Squeeze(capacity), op.Constant(value_int=1))
    visible = op.LessOrEqual(slot, op.Unsqueeze(positions, op.Constant(value_ints=[1, 3])))  # [B, 1, S, L]

    # All queries, in the pattern of the attention kernel; `some` is L keys, or 1 when there is only the last query.
    before = op.Sub(op.Shape(query, start=1, end=2), one)
    some = op.Min(op.Add(op.Mul(before, capacity), one), capacity)
    per_group = op.Concat(one, one, group, one, one, axis=0)
    from_groups = op.Concat(keep, all_heads, rest, op.Unsqueeze(op.Constant(value_int=head_dim), keep), axis=0)
    each_key = op.Expand(op.Unsqueeze(op.Slice(present_key, keep, some, two), two), per_group)
    each_value = op.Expand(op.Unsqueeze(op.Slice(present_value, keep, some, two), two), per_group)
    keys = op.Transpose(op.Reshape(each_key, from_groups), perm=[0, 1, 3, 2])  # [B, H, hd, some]
    all_scores = op.Cast(op.MatMul(turned, keys), to=1)
    all_weights = op.Softmax(op.Where(op.Slice(visible, keep, some, three), all_scores, masked), axis=-1)
    context = op.MatMul(op.CastLike(all_weights, query), op.Reshape(each_value, from_groups))

    # The last query: products and sums in float32; as MatMul they would copy the cache first.
    last_query = op.Slice(turned, rest, end, two)
    by_group = op.Reshape(op.Cast(last_query, to=1), op.Concat(keep, key_heads, group, one, rest, axis=0))
    key_product = op.Mul(by_group, op.Cast(op.Unsqueeze(present_key, two), to=1))  # [B, Hkv, group, L, hd]
    to_last = op.Concat(keep, all_heads, one, rest, axis=0)  # [B, H, 1, ...]
    by_head = op.Reshape(op.ReduceSum(key_product, rest, keepdims=0), to_last)
    scores = op.Where(op.Slice(visible, rest, end, two), by_head, masked)
    weights = op.Softmax(scores, axis=-1)
    shared = op.Reshape(weights, op.Concat(keep, key_heads, group, rest, one, axis=0))  # [B, Hkv, group, L, 1]
    value_product = op.Mul(shared, op.Cast(op.Unsqueeze(present_value, two), to=1))
    summed = op.ReduceSum(value_product, three, keepdims=0)  # [B, Hkv, group, hd]
    last_context = op.Reshape(summed, to_last)
    map = ImageMap(op.Squeeze(weights, two), image_begin, grid=grid)
    return context, present_key, present_value, map, last_query, scores, last_context


@script(flex, default_opset=op)
def CachedAttention(
    query, key, value, past_key, past_value, positions, cos, sin, image_begin,
    heads: int, kv_heads: int, head_dim: int, grid: int,
):  # fmt: skip
    context, present_key, present_value, map, last_query, last_scores, last_context = StaticAttention(
        query, key, value, past_key, past_value, positions, cos, sin, image_begin,
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, grid=grid,
    )  # fmt: skip
    return JoinLast(context, last_context, positions), present_key, present_value, map


FUNCTIONS = (Turn, TurnAndStore, ImageMap, StaticAttention, JoinLast, CachedAttention)
