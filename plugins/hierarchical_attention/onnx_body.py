"""flex::HierarchicalAttention as an ONNX function for ONNX Runtime: gathers the selected pages, or masks the others.

Inputs and outputs: see the package docstring. `0` in a Reshape keeps the dimension; with no page selected the page
tensors have zero rows, and every dimension that is then 0 stands where the input has its zero too.
"""

from __future__ import annotations

from onnxscript import script

from plugins.cached_attention import MASKED
from plugins.cached_attention.onnx_body import ImageMap, LowAttention, TurnAndStore, flex, op


@script(flex, default_opset=op)
def PageAttention(
    last_query, last_scores, last_context, page_key, page_value, lengths,
    heads: int, kv_heads: int, head_dim: int, page_size: int,
):  # fmt: skip
    """The last query's context [B, H, 1, hd] float32 from one softmax over its ordinary keys, whose own context is
    `last_context`, and the pages. Of page n of [B, Hkv, n, P, hd] the first lengths[b, n] tokens are visible.
    """
    keep = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    rest = op.Constant(value_ints=[-1])
    two = op.Constant(value_ints=[2])
    three = op.Constant(value_ints=[3])
    end = op.Constant(value_ints=[9223372036854775807])
    size = op.Constant(value_int=page_size)
    all_heads = op.Unsqueeze(op.Constant(value_int=heads), keep)
    key_heads = op.Unsqueeze(op.Constant(value_int=kv_heads), keep)
    group = op.Div(all_heads, key_heads)
    slots = op.Mul(op.Shape(lengths, start=1, end=2), size)
    to_slots = op.Concat(keep, key_heads, slots, op.Unsqueeze(op.Constant(value_int=head_dim), keep), axis=0)
    keys = op.Reshape(page_key, to_slots)
    values = op.Reshape(page_value, to_slots)
    token = op.Range(op.Constant(value_int=0), size, op.Constant(value_int=1))
    inside = op.Less(token, op.Unsqueeze(lengths, two))  # [B, n, P]
    used = op.Reshape(inside, op.Concat(keep, one, one, slots, axis=0))

    # One softmax over [ordinary keys | page keys].
    last = op.Reshape(last_query, op.Concat(keep, key_heads, group, rest, axis=0))
    grouped = op.MatMul(last, op.Transpose(keys, perm=[0, 1, 3, 2]))
    scores = op.Cast(op.Reshape(grouped, op.Concat(keep, all_heads, one, slots, axis=0)), to=1)
    page_scores = op.Where(used, scores, op.Constant(value_float=MASKED))
    joint = op.Softmax(op.Concat(last_scores, page_scores, axis=3), axis=-1)
    weights = op.Slice(joint, op.Shape(last_scores, start=3, end=4), end, three)
    by_group = op.Reshape(op.CastLike(weights, last_query), op.Concat(keep, key_heads, group, slots, axis=0))
    read = op.Reshape(op.MatMul(by_group, values), op.Concat(keep, all_heads, one, rest, axis=0))
    # The ordinary context is already there: the joint softmax only scales it by the share the pages leave over.
    share = op.Sub(op.Constant(value_float=1.0), op.ReduceSum(weights, three, keepdims=1))
    return op.Add(op.Mul(share, op.Cast(last_context, to=1)), op.Cast(read, to=1))


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
    end = op.Constant(value_ints=[9223372036854775807])
    zero = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    key_heads = op.Unsqueeze(op.Constant(value_int=kv_heads), keep)

    # Visible tokens of each listed page: none after the end of the row's own list.
    every = op.Shape(page_lengths)
    own = op.Less(op.Range(zero, op.Squeeze(every), step), op.Unsqueeze(page_count, one))
    lengths = op.Where(own, op.Gather(page_lengths, pages), zero)  # [B, pages], in the order of the list

    last_context = op.Slice(context, rest, end, two)

    # A gather copies a page before it is read: as slow as reading two in place (measured on the CPU). All unlisted
    # pages have length 0 in `by_page`. The branches assign one value: onnxscript puts several in no certain order.
    most = op.ReduceMax(page_count, keepdims=1)  # of the fullest row of the batch
    if op.Squeeze(op.Greater(op.Mul(most, op.Constant(value_int=2)), every)):
        by_page = op.ScatterElements(pages, pages, lengths, axis=1)
        joint = PageAttention(
            last_query, last_scores, last_context, page_key, page_value, by_page,
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size,
        )  # fmt: skip
    else:
        per_head = op.Unsqueeze(op.Slice(pages, keep, most, one), op.Constant(value_ints=[1, 3]))
        every_head = op.Expand(per_head, op.Concat(one, key_heads, one, one, axis=0))
        some_keys = op.GatherND(page_key, every_head, batch_dims=2)
        some_values = op.GatherND(page_value, every_head, batch_dims=2)
        joint = PageAttention(
            last_query, last_scores, last_context, some_keys, some_values, op.Slice(lengths, keep, most, one),
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size,
        )  # fmt: skip

    joined = op.Concat(op.Slice(context, keep, rest, two), op.CastLike(joint, query), axis=2)
    by_token = op.Reshape(op.Transpose(joined, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
    return by_token, present_key, present_value, map


FUNCTIONS = (TurnAndStore, ImageMap, LowAttention, PageAttention, HierarchicalAttention)
