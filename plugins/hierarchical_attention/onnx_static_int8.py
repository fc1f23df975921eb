"""flex::HierarchicalAttention of int8 pages as an ONNX function for TensorRT without plugins.

Inputs and outputs: see the package docstring; the way: onnx_static.py. Integers are cast inside the sums over them, so
that no float copy of the store is made.
"""

from __future__ import annotations

from onnxscript import script

from plugins.cached_attention.onnx_body import flex, op
from plugins.cached_attention.onnx_static import JoinLast, StaticAttention
from plugins.hierarchical_attention.onnx_static import SHARED, PageBias, PageProducts, PageValues, PageWeights


@script(flex, default_opset=op)
def HierarchicalAttention(
    query, key, value, past_key, past_value, positions, cos, sin, image_begin,
    page_key, page_value, page_lengths, pages, page_count, page_key_scale, page_value_scale,
    heads: int, kv_heads: int, head_dim: int, page_size: int, grid: int,
):  # fmt: skip
    context, present_key, present_value, map, last_query, last_scores, last_context = StaticAttention(
        query, key, value, past_key, past_value, positions, cos, sin, image_begin,
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, grid=grid,
    )  # fmt: skip
    bias = PageBias(page_lengths, pages, page_count, page_size=page_size)
    products = op.Mul(
        PageProducts(last_query, page_key, heads=heads, kv_heads=kv_heads),
        op.Unsqueeze(page_key_scale, op.Constant(value_ints=[2])),
    )
    weights, shared = PageWeights(
        products, bias, last_scores, past_key, heads=heads, kv_heads=kv_heads, page_size=page_size
    )
    steps = op.Mul(shared, op.Unsqueeze(page_value_scale, op.Constant(value_ints=[2, 5])))
    mixed = PageValues(last_context, weights, steps, page_value, heads=heads)
    return JoinLast(context, mixed, positions), present_key, present_value, map


FUNCTIONS = (*SHARED, HierarchicalAttention)
