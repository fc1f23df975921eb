"""flex::HierarchicalAttention as an ONNX function for ONNX Runtime: a dynamic gather of the selected pages only.

Inputs and outputs: see the package docstring. `0` in a Reshape keeps the dimension; with no page selected the page
tensors have zero rows, and every dimension that is then 0 stands where the input has its zero too.
"""

from __future__ import annotations

from onnxscript import script

from plugins.cached_attention.onnx_body import LowAttention, flex, op


@script(flex, default_opset=op)
def HierarchicalAttention(
    query, key, value, past_key, past_value, positions, cos, sin, image_begin,
    page_key, page_value, page_lengths, pages, page_count, grid: int,
):  # fmt: skip
    context, present_key, present_value, map, last_query, last_scores = LowAttention(
        query, key, value, past_key, past_value, positions, cos, sin, image_begin, grid=grid
    )
    keep = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    three = op.Constant(value_ints=[3])
    end = op.Constant(value_ints=[9223372036854775807])
    zero = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    kv_heads = op.Shape(page_key, start=1, end=2)
    size = op.Shape(page_key, start=3, end=4)
    head_dim = op.Shape(page_key, start=4, end=5)
    heads = op.Shape(context, start=1, end=2)
    group = op.Div(heads, kv_heads)

    # Gather the listed pages, as many as the fullest row of the batch needs: [B, Hkv, most * P, hd].
    most = op.ReduceMax(page_count, keepdims=1)
    slots = op.Mul(most, size)
    listed = op.Slice(pages, keep, most, one)  # [B, most]
    every_head = op.Expand(
        op.Unsqueeze(listed, op.Constant(value_ints=[1, 3])), op.Concat(one, kv_heads, one, one, axis=0)
    )
    to_slots = op.Concat(keep, kv_heads, slots, head_dim, axis=0)
    keys = op.Reshape(op.GatherND(page_key, every_head, batch_dims=2), to_slots)
    values = op.Reshape(op.GatherND(page_value, every_head, batch_dims=2), to_slots)

    # Slots of another row's pages, or past the end of a short page, are masked.
    own = op.Less(op.Range(zero, op.Squeeze(most), step), op.Unsqueeze(page_count, one))  # [B, most]
    inside = op.Less(
        op.Range(zero, op.Squeeze(size), step),
        op.Unsqueeze(op.Gather(page_lengths, listed), op.Constant(value_ints=[2])),
    )
    used = op.Unsqueeze(
        op.Reshape(op.And(op.Unsqueeze(own, op.Constant(value_ints=[2])), inside), op.Concat(keep, slots, axis=0)),
        op.Constant(value_ints=[1, 2]),
    )

    # One softmax over [ordinary keys | page keys] for the last query.
    to_groups = op.Concat(keep, kv_heads, group, head_dim, axis=0)
    scores = op.Cast(op.MatMul(op.Reshape(last_query, to_groups), op.Transpose(keys, perm=[0, 1, 3, 2])), to=1)
    page_scores = op.Where(
        used, op.Reshape(scores, op.Concat(keep, heads, one, slots, axis=0)), op.Constant(value_float=-60000.0)
    )
    joint = op.Softmax(op.Concat(last_scores, page_scores, axis=3), axis=-1)
    weights = op.Slice(joint, op.Shape(last_scores, start=3, end=4), end, three)
    grouped = op.Reshape(op.CastLike(weights, query), op.Concat(keep, kv_heads, group, slots, axis=0))
    read = op.Cast(op.Reshape(op.MatMul(grouped, values), op.Concat(keep, heads, one, head_dim, axis=0)), to=1)

    # The ordinary context is already there: the joint softmax only scales it by the share the pages leave over.
    share = op.Sub(op.Constant(value_float=1.0), op.ReduceSum(weights, three, keepdims=1))
    last = op.Cast(op.Slice(context, op.Constant(value_ints=[-1]), end, op.Constant(value_ints=[2])), to=1)
    others = op.Slice(context, keep, op.Constant(value_ints=[-1]), op.Constant(value_ints=[2]))
    merged = op.CastLike(op.Add(op.Mul(share, last), read), query)
    joined = op.Transpose(op.Concat(others, merged, axis=2), perm=[0, 2, 1, 3])
    return op.Reshape(joined, op.Constant(value_ints=[0, 0, -1])), present_key, present_value, map


FUNCTIONS = (LowAttention, HierarchicalAttention)
