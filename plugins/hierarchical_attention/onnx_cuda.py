"""flex::HierarchicalAttention as an ONNX function for ONNX Runtime's CUDA provider: reads every page, where it is, and
masks the unselected.

Inputs and outputs: see the package docstring. `0` in a Reshape keeps the dimension. Nothing branches, and no shape
depends on data: the condition of an If, the number of selected pages and the state of a Scan would each be copied to
the host, which waits for the device, in every layer. The price is memory traffic: all C*C pages are read in every step,
at 7B 2 GB of float16, where the weights take 13. Copying the selected pages first would read and write each of them
before it is read once more. A bias of MASKED gives a key the softmax weight 0 exactly, so the result is that of the
selected pages alone; weight 0 times NaN is NaN, so the whole store must hold finite numbers, as zeros are.

Only the last query sees pages, and it alone is multiplied with them: in a prefill the scores of all queries and pages
would take hundreds of megabytes.
"""

from __future__ import annotations

from onnxscript import OnnxFunction, script

from plugins.cached_attention.onnx_body import FUNCTIONS as CACHED
from plugins.cached_attention.onnx_body import LowAttention, flex, op
from plugins.cached_attention.onnx_static import JoinLast
from plugins.hierarchical_attention.onnx_body import PageAttention
from plugins.hierarchical_attention.onnx_int8 import Int8PageAttention


@script(flex, default_opset=op)
def SelectedTokens(page_lengths, pages, page_count, page_size: int):
    """Which page tokens the last query sees: [B, 1, 1, C*C*P] bool. `pages` holds every page of a row once."""
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    zero = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    every = op.Range(zero, op.Squeeze(op.Shape(page_lengths)), step)  # [C*C]
    listed = op.Less(every, op.Unsqueeze(page_count, one))  # [B, place in the list]
    chosen = op.ScatterElements(listed, pages, listed, axis=1)  # [B, page]; each is written
    token = op.Range(zero, op.Constant(value_int=page_size), step)
    inside = op.Less(token, op.Unsqueeze(page_lengths, one))
    used = op.And(op.Unsqueeze(chosen, two), inside)  # [B, C*C, P]
    return op.Reshape(used, op.Constant(value_ints=[0, 1, 1, -1]))


@script(flex, default_opset=op)
def FloatPages(rows, low_scores, value, page_key, page_value, page_key_scale, page_value_scale, used):
    """PageAttention with whole stores [B, Hkv, C*C, P, hd]; no scale is read."""
    to_tokens = op.Concat(op.Constant(value_ints=[0, 0, -1]), op.Shape(page_key, start=4, end=5), axis=0)
    return PageAttention(
        rows, low_scores, value, op.Reshape(page_key, to_tokens), op.Reshape(page_value, to_tokens), used,
        op.Shape(value, start=2, end=3),
    )  # fmt: skip


@script(flex, default_opset=op)
def Int8Pages(rows, low_scores, value, page_key, page_value, page_key_scale, page_value_scale, used):
    """FloatPages for int8 stores and their steps [B, Hkv, C*C, P]; both are cast as a whole."""
    to_tokens = op.Concat(op.Constant(value_ints=[0, 0, -1]), op.Shape(page_key, start=4, end=5), axis=0)
    to_steps = op.Constant(value_ints=[0, 0, 1, -1])
    return Int8PageAttention(
        rows, low_scores, value, op.Reshape(page_key, to_tokens), op.Reshape(page_value, to_tokens),
        op.Reshape(page_key_scale, to_steps), op.Reshape(page_value_scale, to_steps), used,
        op.Shape(value, start=2, end=3),
    )  # fmt: skip


def attention(Pages: OnnxFunction) -> OnnxFunction:
    """The op; `Pages` depends on how pages are stored. A node on pages that are not int8 has no scales, and nobody
    reads them."""

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
        keep = op.Constant(value_ints=[0])
        rest = op.Constant(value_ints=[-1])
        all_heads = op.Unsqueeze(op.Constant(value_int=heads), keep)
        key_heads = op.Unsqueeze(op.Constant(value_int=kv_heads), keep)
        group = op.Div(all_heads, key_heads)
        to_heads = op.Concat(keep, all_heads, rest, keep, axis=0)  # [B, H, S, ...]
        to_groups = op.Concat(keep, key_heads, group, rest, axis=0)  # [B, Hkv, group, ...]

        # The rows of the last query, one for each head of a group.
        end = op.Constant(value_int=-1)
        last_rows = op.Reshape(op.Gather(op.Reshape(rows, to_heads), end, axis=2), to_groups)
        last_scores = op.Reshape(op.Gather(op.Reshape(scores, to_heads), end, axis=2), to_groups)
        used = SelectedTokens(page_lengths, pages, page_count, page_size=page_size)
        last = Pages(
            last_rows, last_scores, present_value, page_key, page_value, page_key_scale, page_value_scale, used
        )
        plain = op.MatMul(op.CastLike(weights, query), present_value)  # of all queries
        one = op.Constant(value_ints=[1])
        last_context = op.Reshape(last, op.Concat(keep, all_heads, one, rest, axis=0))
        context = JoinLast(op.Reshape(plain, to_heads), last_context, positions)
        return context, present_key, present_value, map

    return HierarchicalAttention


SHARED = *CACHED[:-1], JoinLast, SelectedTokens
FUNCTIONS = (*SHARED, PageAttention, FloatPages, attention(FloatPages))
INT8_FUNCTIONS = (*SHARED, Int8PageAttention, Int8Pages, attention(Int8Pages))
