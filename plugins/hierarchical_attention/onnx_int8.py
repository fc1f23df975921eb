"""flex::HierarchicalAttention of int8 pages as an ONNX function for ONNX Runtime: gathers the selected ones, in 8 bits.

Inputs and outputs: see the package docstring. `0` in a Reshape keeps the dimension. All listed pages are gathered,
however many, and cast in float32: what ONNX Runtime is quickest at. Its blocked DequantizeLinear takes ten times as
long as the cast, and MatMulInteger, which would need the query in 8 bits, gains little for keys and loses for values.
The float copy of what was selected, of a few heads at a time, is what a step pays: at 22 of 81 pages it takes 0.96
times as long as on float32 pages, at all 81, which those read in place, 1.4 times (measured on the CPU,
tests/bench/int8_pages.py).
"""

from __future__ import annotations

from onnxscript import graph, script

from plugins.cached_attention import MASKED
from plugins.cached_attention.onnx_body import JoinHeads, LowAttention, flex, op
from plugins.hierarchical_attention.onnx_body import (
    SHARED,
    ByGroup,
    ForGroups,
    HeadGroups,
    JoinGroups,
    Listed,
    PageList,
)


@script(flex, default_opset=op)
def Int8PageAttention(rows, low_scores, value, page_key, page_value, key_scale, value_scale, used, capacity):
    """PageAttention of plugins/hierarchical_attention/onnx_body.py for int8 page_key, page_value [B, Hkv, n, hd] and
    their steps [B, Hkv, 1, n] float32."""
    three = op.Constant(value_ints=[3])
    # In float32 whatever the model's dtype: products of int8 keys are larger than scores, float16 might not hold them.
    keys = op.Transpose(op.Cast(page_key, to=1), perm=[0, 1, 3, 2])
    products = op.Mul(op.MatMul(op.Cast(rows, to=1), keys), key_scale)
    scores = op.Concat(low_scores, op.Where(used, products, op.Constant(value_float=MASKED)), axis=3)
    weights = op.Softmax(scores, axis=-1)
    low = op.MatMul(op.CastLike(op.Slice(weights, op.Constant(value_ints=[0]), capacity, three), rows), value)
    end = op.Constant(value_ints=[9223372036854775807])
    shared = op.Mul(op.Slice(weights, capacity, end, three), value_scale)
    return op.Add(low, op.CastLike(op.MatMul(shared, op.Cast(page_value, to=1)), rows))


@script(flex, default_opset=op)
def GroupedInt8Attention(
    rows, low_scores, value, page_key, page_value, page_key_scale, page_value_scale, some, inside, last, capacity,
    kv_heads: int, head_dim: int,
):  # fmt: skip
    """GroupedAttention of plugins/hierarchical_attention/onnx_body.py for int8 stores and their steps."""
    keep = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    rest = op.Constant(value_ints=[-1])
    width = op.Unsqueeze(op.Constant(value_int=head_dim), keep)
    group, groups = HeadGroups(kv_heads=kv_heads)
    to_scales = op.Concat(rest, group, keep, keep, axis=0)
    to_stores = op.Concat(to_scales, keep, axis=0)
    to_tokens = op.Concat(one, group, rest, width, axis=0)
    to_steps = op.Concat(one, group, one, rest, axis=0)
    to_used = op.Constant(value_ints=[1, 1, 1, -1])

    @graph()
    def OfGroup(few_rows, few_scores, few_values, keys, values, key_scales, value_scales, listed, seen):
        those = op.Reshape(listed, rest)
        few = Int8PageAttention(
            few_rows, few_scores, few_values,
            Listed(keys, those, to_tokens), Listed(values, those, to_tokens),
            Listed(key_scales, those, to_steps), Listed(value_scales, those, to_steps),
            op.And(op.Reshape(op.Gather(inside, those), to_used), seen), capacity,
        )  # fmt: skip
        return few

    context = op.Scan(
        ByGroup(rows, group), ByGroup(low_scores, group), ByGroup(value, group),
        op.Reshape(page_key, to_stores), op.Reshape(page_value, to_stores),
        op.Reshape(page_key_scale, to_scales), op.Reshape(page_value_scale, to_scales),
        ForGroups(op.Unsqueeze(some, op.Constant(value_ints=[1, 2])), groups), ForGroups(last, groups),
        num_scan_inputs=9, body=OfGroup,
    )  # fmt: skip
    return JoinGroups(context, kv_heads=kv_heads)


@script(flex, default_opset=op)
def HierarchicalAttention(
    query, key, value, past_key, past_value, positions, cos, sin, image_begin,
    page_key, page_value, page_lengths, pages, page_count, page_key_scale, page_value_scale,
    heads: int, kv_heads: int, head_dim: int, page_size: int, grid: int,
):  # fmt: skip
    rows, at, present_key, present_value, scores, weights, map = LowAttention(
        query, key, value, past_key, past_value, positions, cos, sin, image_begin,
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, grid=grid,
    )  # fmt: skip
    last, listed, inside, most = PageList(at, positions, page_lengths, pages, page_count, page_size=page_size)
    # The branches assign one value: onnxscript puts several in no certain order.
    if op.Equal(most, op.Constant(value_int=0)):
        context = op.MatMul(op.CastLike(weights, query), present_value)
    else:
        some = op.Slice(listed, op.Constant(value_ints=[0]), most, op.Constant(value_ints=[1]))
        context = GroupedInt8Attention(
            rows, scores, present_value, page_key, page_value, page_key_scale, page_value_scale, some, inside, last,
            op.Shape(past_key, start=2, end=3), kv_heads=kv_heads, head_dim=head_dim,
        )  # fmt: skip
    return JoinHeads(context, heads=heads), present_key, present_value, map


FUNCTIONS = (*SHARED, Int8PageAttention, GroupedInt8Attention, HierarchicalAttention)
