"""flex::HierarchicalAttention as an ONNX function, made of two steps: ordinary attention and that to the pages. One
function for each way of storing the cache and the pages: each has other inputs.

`Low`: LowAttention of plugins/cached_attention/onnx_body.py, or over an int8 cache that of onnx_int8.py there. `Pages`
gives the context of the last query, who alone sees pages [B, Hkv, group, hd]: from itself, its masked scores and its
context without pages, from what is stored in pages, their scales, which nobody reads unless pages are int8, and the
lists of pages. Of a prompt, scores of all queries and pages would take hundreds of megabytes.
"""

from __future__ import annotations

from onnxscript import OnnxFunction, script

from plugins.cached_attention.onnx_body import JoinLast, LastInGroups, flex, op


@script(flex, default_opset=op)
def JoinQueries(context, last, positions, heads: int):
    """The op's context [B, S, H*hd]: of rows [B, Hkv, R, hd], that of the last query replaced by `last`
    [B, Hkv, group, hd]."""
    keep = op.Constant(value_ints=[0])
    rest = op.Constant(value_ints=[-1])
    all_heads = op.Unsqueeze(op.Constant(value_int=heads), keep)
    of_all = op.Reshape(context, op.Concat(keep, all_heads, rest, keep, axis=0))  # [B, H, S, hd]
    of_last = op.Reshape(last, op.Concat(keep, all_heads, op.Constant(value_ints=[1]), rest, axis=0))
    return JoinLast(of_all, of_last, positions)


def over_float_cache(Low: OnnxFunction, Pages: OnnxFunction) -> OnnxFunction:
    """The op whose cache is not int8. A node on pages that are not int8 lacks the last two inputs."""

    @script(flex, default_opset=op)
    def HierarchicalAttention(
        query, key, value, past_key, past_value, positions, cos, sin, image_begin,
        page_key, page_value, page_lengths, pages, page_count, page_key_scale, page_value_scale,
        heads: int, kv_heads: int, head_dim: int, page_size: int, grid: int,
    ):  # fmt: skip
        last, scores, low_context, present_key, present_value, map = Low(
            query, key, value, past_key, past_value, positions, cos, sin, image_begin,
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, grid=grid,
        )  # fmt: skip
        with_pages = Pages(
            last, scores, LastInGroups(low_context, heads=heads, kv_heads=kv_heads), past_key,
            page_key, page_value, page_key_scale, page_value_scale, page_lengths, pages, page_count,
            kv_heads=kv_heads, head_dim=head_dim, page_size=page_size,
        )  # fmt: skip
        context = JoinQueries(low_context, with_pages, positions, heads=heads)
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
        last, scores, low_context, present_key, present_value, present_key_scale, present_value_scale, map = Low(
            query, key, value, past_key, past_value, positions, cos, sin, image_begin, past_key_scale, past_value_scale,
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, grid=grid,
        )  # fmt: skip
        with_pages = Pages(
            last, scores, LastInGroups(low_context, heads=heads, kv_heads=kv_heads), past_key,
            page_key, page_value, page_key, page_value, page_lengths, pages, page_count,
            kv_heads=kv_heads, head_dim=head_dim, page_size=page_size,
        )  # fmt: skip
        context = JoinQueries(low_context, with_pages, positions, heads=heads)
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
        last, scores, low_context, present_key, present_value, present_key_scale, present_value_scale, map = Low(
            query, key, value, past_key, past_value, positions, cos, sin, image_begin, past_key_scale, past_value_scale,
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, grid=grid,
        )  # fmt: skip
        with_pages = Pages(
            last, scores, LastInGroups(low_context, heads=heads, kv_heads=kv_heads), past_key,
            page_key, page_value, page_key_scale, page_value_scale, page_lengths, pages, page_count,
            kv_heads=kv_heads, head_dim=head_dim, page_size=page_size,
        )  # fmt: skip
        context = JoinQueries(low_context, with_pages, positions, heads=heads)
        return context, present_key, present_value, map, present_key_scale, present_value_scale

    return HierarchicalAttention


SHARED = LastInGroups, JoinLast, JoinQueries
