"""flex::HierarchicalAttention of int8 pages as an ONNX function for ONNX Runtime: gathers the selected ones, in 8 bits.

Inputs and outputs: see the package docstring. `0` in a Reshape keeps the dimension. All listed pages are gathered,
however many, and made float, of a few heads at a time. That copy is what a step pays: at 22 of 81 pages it takes 1.04
to 1.2 times as long as on float32 pages, at all 81, which those read in place, 1.4 to 1.7 times (measured on the CPU,
tests/bench/int8_kv.py). MatMulInteger, which would need the query in 8 bits, gains little for keys and loses for
values.
"""

from __future__ import annotations

from onnxscript import graph, script

from plugins.cached_attention import onnx_int8 as int8_cache
from plugins.cached_attention.onnx_body import LOW, LowAttention, flex, once, op
from plugins.cached_attention.onnx_groups import GROUPS, ByGroup, ForGroups, HeadGroups, JoinGroups
from plugins.cached_attention.onnx_int8 import Floats
from plugins.hierarchical_attention.onnx_body import SHARED, PageAttention, PageList
from plugins.hierarchical_attention.onnx_op import over_float_cache, over_int8_both


@script(flex, default_opset=op)
def GroupedInt8Attention(
    rows, low_scores, context, page_key, page_value, page_key_scale, page_value_scale, some, inside, capacity,
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
    to_used = op.Constant(value_ints=[1, 1, 1, -1])

    @graph()
    def OfGroup(few_rows, few_scores, few_context, keys, values, key_steps, value_steps, listed):
        # In float32 whatever the model's dtype: products of large int8 keys might be more than float16 holds.
        those = op.Reshape(listed, rest)
        few_keys = op.Reshape(Floats(op.Gather(keys, those, axis=1), op.Gather(key_steps, those, axis=1)), to_tokens)
        few_values = op.Reshape(
            Floats(op.Gather(values, those, axis=1), op.Gather(value_steps, those, axis=1)), to_tokens
        )
        used = op.Reshape(op.Gather(inside, those), to_used)
        few = PageAttention(
            op.Cast(few_rows, to=1), few_scores, op.Cast(few_context, to=1), few_keys, few_values, used, capacity
        )
        return op.CastLike(few, few_rows)

    joint = op.Scan(
        ByGroup(rows, group), ByGroup(low_scores, group), ByGroup(context, group),
        op.Reshape(page_key, to_stores), op.Reshape(page_value, to_stores),
        op.Reshape(page_key_scale, to_scales), op.Reshape(page_value_scale, to_scales),
        ForGroups(op.Unsqueeze(some, op.Constant(value_ints=[1, 2])), groups),
        num_scan_inputs=8, body=OfGroup,
    )  # fmt: skip
    return JoinGroups(joint, kv_heads=kv_heads)


@script(flex, default_opset=op)
def Int8Pages(
    last, low_scores, low_context, past_key,
    page_key, page_value, page_key_scale, page_value_scale, page_lengths, pages, page_count,
    kv_heads: int, head_dim: int, page_size: int,
):  # fmt: skip
    """`Pages` of onnx_op.py where pages are int8."""
    listed, inside, most = PageList(page_lengths, pages, page_count, page_size=page_size)
    # The branches assign one value: onnxscript puts several in no certain order.
    if op.Equal(most, op.Constant(value_int=0)):
        context = op.Identity(low_context)
    else:
        some = op.Slice(listed, op.Constant(value_ints=[0]), most, op.Constant(value_ints=[1]))
        context = GroupedInt8Attention(
            last, low_scores, low_context, page_key, page_value, page_key_scale, page_value_scale, some, inside,
            op.Shape(past_key, start=2, end=3), kv_heads=kv_heads, head_dim=head_dim,
        )  # fmt: skip
    return context


INT8_PAGES = *SHARED, *GROUPS, Floats, GroupedInt8Attention, Int8Pages
FUNCTIONS = once(*LOW, *INT8_PAGES, over_float_cache(LowAttention, Int8Pages))
INT8_CACHE = once(*int8_cache.LOW, *INT8_PAGES, over_int8_both(int8_cache.ByGroups, Int8Pages))
