"""flex::HierarchicalAttention as an ONNX function, made of two steps: ordinary attention and that to the pages. One
function for each way of storing the cache and the pages: each has other inputs.

`Low`: LowAttention of plugins/cached_attention/onnx_body.py, or over an int8 cache that of onnx_int8.py there. `Pages`
gives the op's context [B, S, H*hd]: from the queries in rows, the position of each, masked scores and context of all,
as `Low` gives them, from what is stored in pages, their scales, which nobody reads unless pages are int8, and the lists
of pages.
"""

from __future__ import annotations

from onnxscript import OnnxFunction, script

from plugins.cached_attention.onnx_body import flex, op


def over_float_cache(Low: OnnxFunction, Pages: OnnxFunction) -> OnnxFunction:
    """The op whose cache is not int8. A node on pages that are not int8 lacks the last two inputs."""

    @script(flex, default_opset=op)
    def HierarchicalAttention(
        query, key, value, past_key, past_value, positions, cos, sin, image_begin,
        page_key, page_value, page_lengths, pages, page_count, page_key_scale, page_value_scale,
        heads: int, kv_heads: int, head_dim: int, page_size: int, grid: int,
    ):  # fmt: skip
        rows, at, present_key, present_value, scores, low_context, map = Low(
            query, key, value, past_key, past_value, positions, cos, sin, image_begin,
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, grid=grid,
        )  # fmt: skip
        context = Pages(
            rows, at, scores, low_context, positions, past_key,
            page_key, page_value, page_key_scale, page_value_scale, page_lengths, pages, page_count,
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size,
        )  # fmt: skip
        return context, present_key, present_value, map

    return HierarchicalAttention


def over_int8_cache(Low: OnnxFunction, Pages: OnnxFunction) -> OnnxFunction:
    """The op whose cache is int8, and whose pages are not."""

    @script(flex, default_opset=op)
    def HierarchicalAttention(
        query, key, value, past_key, past_value, positions, cos, sin, image_begin,
        page_key, page_value, page_lengths, pages, page_count, past_key_scale, past_value_scale,
        heads: int, kv_heads: int, head_dim: int, page_size: int, grid: int,
    ):  # fmt: skip
        rows, at, present_key, present_value, present_key_scale, present_value_scale, scores, low_context, map = Low(
            query, key, value, past_key, past_value, positions, cos, sin, image_begin, past_key_scale, past_value_scale,
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, grid=grid,
        )  # fmt: skip
        context = Pages(
            rows, at, scores, low_context, positions, past_key,
            page_key, page_value, page_key, page_value, page_lengths, pages, page_count,
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size,
        )  # fmt: skip
        return context, present_key, present_value, map, present_key_scale, present_value_scale

    return HierarchicalAttention


def over_int8_both(Low: OnnxFunction, Pages: OnnxFunction) -> OnnxFunction:
    """The op whose cache and pages are int8."""

    @script(flex, default_opset=op)
    def HierarchicalAttention(
        query, key, value, past_key, past_value, positions, cos, sin, image_begin,
        page_key, page_value, page_lengths, pages, page_count, page_key_scale, page_value_scale,
        past_key_scale, past_value_scale,
        heads: int, kv_heads: int, head_dim: int, page_size: int, grid: int,
    ):  # fmt: skip
        rows, at, present_key, present_value, present_key_scale, present_value_scale, scores, low_context, map = Low(
            query, key, value, past_key, past_value, positions, cos, sin, image_begin, past_key_scale, past_value_scale,
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, grid=grid,
        )  # fmt: skip
        context = Pages(
            rows, at, scores, low_context, positions, past_key,
            page_key, page_value, page_key_scale, page_value_scale, page_lengths, pages, page_count,
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size,
        )  # fmt: skip
        return context, present_key, present_value, map, present_key_scale, present_value_scale

    return HierarchicalAttention
