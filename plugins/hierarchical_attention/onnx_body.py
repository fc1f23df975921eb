"""flex::HierarchicalAttention as an ONNX function for ONNX Runtime: gathers the selected pages, or masks the others.

Inputs and outputs: see the package docstring. `0` in a Reshape keeps the dimension.
"""

from __future__ import annotations

from onnxscript import script

from plugins.cached_attention.onnx_body import ImageMap, JoinHeads, LowAttention, Scores, TurnAndStore, flex, op


@script(flex, default_opset=op)
def PageAttention(rows, low_scores, value, page_key, page_value, used, capacity):
    """Context [B, Hkv, R, hd] of `rows` [B, Hkv, R, hd] from one softmax over their ordinary keys, of which they have
    the masked scores [B, Hkv, R, L] float32, and the page keys [B, Hkv, n, hd]; `value` and `page_value` likewise.
    `used`: which page tokens a row sees, bool, broadcast to [B, Hkv, R, n]. `capacity`: [L].
    """
    three = op.Constant(value_ints=[3])
    scores = op.Concat(low_scores, Scores(rows, page_key, used), axis=3)
    weights = op.CastLike(op.Softmax(scores, axis=-1), rows)
    low = op.MatMul(op.Slice(weights, op.Constant(value_ints=[0]), capacity, three), value)
    end = op.Constant(value_ints=[9223372036854775807])
    return op.Add(low, op.MatMul(op.Slice(weights, capacity, end, three), page_value))


@script(flex, default_opset=op)
def PageList(at, positions, page_lengths, pages, page_count, page_size: int):
    """Which rows see pages [B, 1, R, 1]; each row's own list [B, C*C]; which slots of each page are tokens
    [C*C + 1, P]; the pages of the fullest row of the batch [1]."""
    keep = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    rest = op.Constant(value_ints=[-1])
    end = op.Constant(value_ints=[9223372036854775807])
    zero = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    # Only the rows of the last query see pages.
    last = op.Unsqueeze(op.Equal(at, op.Slice(positions, rest, end, one)), op.Constant(value_ints=[1, 3]))
    # What follows a row's own list becomes -1: the last page where pages are gathered, but of all its tokens none.
    own = op.Less(op.Range(zero, op.Squeeze(op.Shape(page_lengths)), step), op.Unsqueeze(page_count, one))
    listed = op.Where(own, pages, rest)
    token = op.Range(zero, op.Constant(value_int=page_size), step)
    inside = op.Less(token, op.Unsqueeze(op.Concat(page_lengths, keep, axis=0), one))
    return last, listed, inside, op.ReduceMax(page_count, keepdims=1)


@script(flex, default_opset=op)
def Gathered(page_key, page_value, listed, inside, most, kv_heads: int, head_dim: int):
    """Keys and values of the first `most` listed pages, page by page [B, Hkv, n, hd]; which of them are tokens
    [B, 1, 1, n]; and where their pages are in a store, below the batch [B, Hkv, most, 1]."""
    keep = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    key_heads = op.Unsqueeze(op.Constant(value_int=kv_heads), keep)
    width = op.Unsqueeze(op.Constant(value_int=head_dim), keep)
    to_tokens = op.Concat(keep, key_heads, op.Constant(value_ints=[-1]), width, axis=0)
    some = op.Slice(listed, keep, most, one)
    used = op.Reshape(op.Gather(inside, some), op.Constant(value_ints=[0, 1, 1, -1]))
    around = op.Constant(value_ints=[1, 3])
    index = op.Expand(op.Unsqueeze(some, around), op.Concat(one, key_heads, one, one, axis=0))
    keys = op.Reshape(op.GatherND(page_key, index, batch_dims=2), to_tokens)
    values = op.Reshape(op.GatherND(page_value, index, batch_dims=2), to_tokens)
    return keys, values, used, index


@script(flex, default_opset=op)
def HierarchicalAttention(
    query, key, value, past_key, past_value, positions, cos, sin, image_begin,
    page_key, page_value, page_lengths, pages, page_count,
    heads: int, kv_heads: int, head_dim: int, page_size: int, grid: int,
):  # fmt: skip
    rows, at, present_key, present_value, scores, weights, map = LowAttention(
        query, key, value, past_key, past_value, positions, cos, sin, image_begin,
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, grid=grid,
    )  # fmt: skip
    keep = op.Constant(value_ints=[0])
    rest = op.Constant(value_ints=[-1])
    key_heads = op.Unsqueeze(op.Constant(value_int=kv_heads), keep)
    width = op.Unsqueeze(op.Constant(value_int=head_dim), keep)
    to_tokens = op.Concat(keep, key_heads, rest, width, axis=0)
    last, listed, inside, most = PageList(at, positions, page_lengths, pages, page_count, page_size=page_size)

    # The branches assign one value: onnxscript puts several in no certain order. The common case comes first: each If
    # costs as much as a few operators.
    capacity = op.Shape(past_key, start=2, end=3)
    few = op.LessOrEqual(most, op.Div(op.Shape(page_lengths), op.Constant(value_int=2)))
    if op.And(op.Greater(most, op.Constant(value_int=0)), few):
        keys, values, used, index = Gathered(
            page_key, page_value, listed, inside, most, kv_heads=kv_heads, head_dim=head_dim
        )
        context = PageAttention(rows, scores, present_value, keys, values, op.And(used, last), capacity)
    else:
        if few:
            context = op.MatMul(op.CastLike(weights, query), present_value)
        else:
            # Single pages are gathered and read at half the speed of the whole store in place (measured on the CPU).
            by_page = op.ScatterElements(op.Expand(rest, op.Shape(pages)), pages, listed, axis=1)
            used = op.Reshape(op.Gather(inside, by_page), op.Constant(value_ints=[0, 1, 1, -1]))
            context = PageAttention(
                rows, scores, present_value, op.Reshape(page_key, to_tokens), op.Reshape(page_value, to_tokens),
                op.And(used, last), capacity,
            )  # fmt: skip
    return JoinHeads(context, heads=heads), present_key, present_value, map


SHARED = TurnAndStore, ImageMap, Scores, LowAttention, JoinHeads, PageList, Gathered
FUNCTIONS = (*SHARED, PageAttention, HierarchicalAttention)
