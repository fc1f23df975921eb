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
    page_key, page_value, page_lengths, pages, page_count,
    heads: int, kv_heads: int, head_dim: int, page_size: int, grid: int,
):  # fmt: skip
    context, present_key, present_value, map, last_query, last_scores = LowAttention(
        query, key, value, past_key, past_value, positions, cos, sin, image_begin,
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, grid=grid,
    )  # fmt: skip
    keep = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    rest = op.Constant(value_ints=[-1])
    two = op.Constant(value_ints=[2])
    three = op.Constant(value_ints=[3])
    end = op.Constant(value_ints=[9223372036854775807])
    zero = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    size = op.Constant(value_int=page_size)
    all_heads = op.Unsqueeze(op.Constant(value_int=heads), keep)
    key_heads = op.Unsqueeze(op.Constant(value_int=kv_heads), keep)
    group = op.Div(all_heads, key_heads)

    # Gather the listed pages, as many as the fullest row of the batch needs: [B, Hkv, most * P, hd].
    most = op.ReduceMax(page_count, keepdims=1)
    slots = op.Mul(most, size)
    listed = op.Slice(pages, keep, most, one)  # [B, most]
    per_head = op.Unsqueeze(listed, op.Constant(value_ints=[1, 3]))
    every_head = op.Expand(per_head, op.Concat(one, key_heads, one, one, axis=0))
    to_slots = op.Concat(keep, key_heads, slots, op.Unsqueeze(op.Constant(value_int=head_dim), keep), axis=0)
    keys = op.Reshape(op.GatherND(page_key, every_head, batch_dims=2), to_slots)
    values = op.Reshape(op.GatherND(page_value, every_head, batch_dims=2), to_slots)

    # Slots past the end of a short page, or of the row's own list, are masked.
    own = op.Less(op.Range(zero, op.Squeeze(most), step), op.Unsqueeze(page_count, one))  # [B, most]
    valid = op.Unsqueeze(op.Where(own, op.Gather(page_lengths, listed), zero), two)
    inside = op.Less(op.Range(zero, size, step), valid)  # [B, most, P]
    used = op.Reshape(inside, op.Concat(keep, one, one, slots, axis=0))

    # One softmax over [ordinary keys | page keys] for the last query.
    last = op.Reshape(last_query, op.Concat(keep, key_heads, group, rest, axis=0))
    grouped = op.MatMul(last, op.Transpose(keys, perm=[0, 1, 3, 2]))
    scores = op.Cast(op.Reshape(grouped, op.Concat(keep, all_heads, one, slots, axis=0)), to=1)
    page_scores = op.Where(used, scores, op.Constant(value_float=-60000.0))
    joint = op.Softmax(op.Concat(last_scores, page_scores, axis=3), axis=-1)
    weights = op.Slice(joint, op.Shape(past_key, start=2, end=3), end, three)
    by_group = op.Reshape(op.CastLike(weights, query), op.Concat(keep, key_heads, group, slots, axis=0))
    read = op.Reshape(op.MatMul(by_group, values), op.Concat(keep, all_heads, one, rest, axis=0))

    # The ordinary context is already there: the joint softmax only scales it by the share the pages leave over.
    share = op.Sub(op.Constant(value_float=1.0), op.ReduceSum(weights, three, keepdims=1))
    plain = op.Cast(op.Slice(context, rest, end, two), to=1)
    merged = op.CastLike(op.Add(op.Mul(share, plain), op.Cast(read, to=1)), query)
    joined = op.Concat(op.Slice(context, keep, rest, two), merged, axis=2)
    by_token = op.Reshape(op.Transpose(joined, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
    return by_token, present_key, present_value, map


FUNCTIONS = (LowAttention, HierarchicalAttention)
