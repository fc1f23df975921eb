"""flex::HierarchicalAttention as an ONNX function for ONNX Runtime: gathers the selected pages, or masks the others.

Inputs and outputs: see the package docstring. `0` in a Reshape keeps the dimension.

No operator reads pages through a list: they are copied first. Where pages are large, a Scan does that for a few heads
of one row of the batch at a time, so that what is read next is still in the processor's cache: a step of four rows with
22 pages each, at 7B's width in int4, takes 78 ms instead of 101 to 114. For small pages it is a few operators too many:
a step of four rows of the default model would take 2.3 ms instead of 2.0 (measured on the CPU).
"""

from __future__ import annotations

from onnxscript import graph, script

from plugins.cached_attention.onnx_body import ImageMap, JoinHeads, LowAttention, Scores, TurnAndStore, flex, op

LARGE = 1 << 17  # numbers in a page, of all heads
HEADS = 8  # whose pages are copied at a time: 5.8 MB of keys for 22 pages of 64 tokens, head size 128, float32


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
def GatheredAttention(
    rows, low_scores, value, page_key, page_value, some, inside, last, capacity, kv_heads: int, head_dim: int
):  # fmt: skip
    """PageAttention with the pages `some` [B, n] of a store [B, Hkv, C*C, P, hd] for those rows that are `last`
    [B, 1, R, 1]. `inside`: which slots of a page are tokens [C*C + 1, P]."""
    keep = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    key_heads = op.Unsqueeze(op.Constant(value_int=kv_heads), keep)
    width = op.Unsqueeze(op.Constant(value_int=head_dim), keep)
    to_tokens = op.Concat(keep, key_heads, op.Constant(value_ints=[-1]), width, axis=0)
    used = op.Reshape(op.Gather(inside, some), op.Constant(value_ints=[0, 1, 1, -1]))
    index = op.Expand(op.Unsqueeze(some, op.Constant(value_ints=[1, 3])), op.Concat(one, key_heads, one, one, axis=0))
    keys = op.Reshape(op.GatherND(page_key, index, batch_dims=2), to_tokens)
    values = op.Reshape(op.GatherND(page_value, index, batch_dims=2), to_tokens)
    return PageAttention(rows, low_scores, value, keys, values, op.And(used, last), capacity)


@script(flex, default_opset=op)
def HeadGroups(kv_heads: int):
    """How many key/value heads go together [1], the largest power of two up to HEADS that divides them, and how many
    groups that makes [1]."""
    heads = op.Constant(value_int=kv_heads)
    several = op.BitwiseOr(heads, op.Constant(value_int=HEADS))
    group = op.Unsqueeze(op.BitwiseAnd(several, op.Neg(several)), op.Constant(value_ints=[0]))
    return group, op.Div(heads, group)


@script(flex, default_opset=op)
def ByGroup(each, group):
    """What each head has, [B, Hkv, X, Y], by groups of heads: [B*Hkv/group, 1, group, X, Y]."""
    to_groups = op.Concat(op.Constant(value_ints=[-1, 1]), group, op.Constant(value_ints=[0, 0]), axis=0)
    return op.Reshape(op.Unsqueeze(each, op.Constant(value_ints=[1])), to_groups)


@script(flex, default_opset=op)
def ForGroups(once, groups):
    """What a row of the batch has once, [B, 1, X, Y], for each of its groups of heads: [B*groups, 1, X, Y]."""
    one = op.Constant(value_ints=[1])
    repeated = op.Expand(once, op.Concat(one, groups, one, one, axis=0))
    return op.Reshape(repeated, op.Constant(value_ints=[-1, 1, 0, 0]))


@script(flex, default_opset=op)
def Listed(store, pages, shape):
    """Those pages [n] of what the heads of a group have of each [group, C*C, ...], in another `shape`."""
    return op.Reshape(op.Gather(store, pages, axis=1), shape)


@script(flex, default_opset=op)
def JoinGroups(context, kv_heads: int):
    """context [B*groups, 1, group, R, hd] -> [B, Hkv, R, hd]."""
    heads = op.Unsqueeze(op.Constant(value_int=kv_heads), op.Constant(value_ints=[0]))
    to_heads = op.Concat(op.Constant(value_ints=[-1]), heads, op.Constant(value_ints=[0, 0]), axis=0)
    return op.Reshape(op.Squeeze(context, op.Constant(value_ints=[1])), to_heads)


@script(flex, default_opset=op)
def GroupedAttention(
    rows, low_scores, value, page_key, page_value, some, inside, last, capacity, kv_heads: int, head_dim: int
):  # fmt: skip
    """GatheredAttention, a few heads of one row of the batch at a time."""
    keep = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    rest = op.Constant(value_ints=[-1])
    width = op.Unsqueeze(op.Constant(value_int=head_dim), keep)
    group, groups = HeadGroups(kv_heads=kv_heads)
    to_stores = op.Concat(rest, group, keep, keep, keep, axis=0)
    to_tokens = op.Concat(one, group, rest, width, axis=0)
    to_used = op.Constant(value_ints=[1, 1, 1, -1])

    @graph()
    def OfGroup(few_rows, few_scores, few_values, keys, values, listed, seen):
        those = op.Reshape(listed, rest)
        few = PageAttention(
            few_rows, few_scores, few_values, Listed(keys, those, to_tokens), Listed(values, those, to_tokens),
            op.And(op.Reshape(op.Gather(inside, those), to_used), seen), capacity,
        )  # fmt: skip
        return few

    context = op.Scan(
        ByGroup(rows, group), ByGroup(low_scores, group), ByGroup(value, group),
        op.Reshape(page_key, to_stores), op.Reshape(page_value, to_stores),
        ForGroups(op.Unsqueeze(some, op.Constant(value_ints=[1, 2])), groups), ForGroups(last, groups),
        num_scan_inputs=7, body=OfGroup,
    )  # fmt: skip
    return JoinGroups(context, kv_heads=kv_heads)


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

    # Known when a graph is bound, which then has one branch of the two.
    page = op.Constant(value_int=kv_heads) * op.Constant(value_int=head_dim) * op.Constant(value_int=page_size)
    large = op.GreaterOrEqual(page, op.Constant(value_int=LARGE))

    # The branches assign one value: onnxscript puts several in no certain order. The common case comes first: each If
    # costs as much as a few operators.
    capacity = op.Shape(past_key, start=2, end=3)
    few = op.LessOrEqual(most, op.Div(op.Shape(page_lengths), op.Constant(value_int=2)))
    if op.And(op.Greater(most, op.Constant(value_int=0)), few):
        some = op.Slice(listed, keep, most, op.Constant(value_ints=[1]))
        if large:
            context = GroupedAttention(
                rows, scores, present_value, page_key, page_value, some, inside, last, capacity,
                kv_heads=kv_heads, head_dim=head_dim,
            )  # fmt: skip
        else:
            context = GatheredAttention(
                rows, scores, present_value, page_key, page_value, some, inside, last, capacity,
                kv_heads=kv_heads, head_dim=head_dim,
            )  # fmt: skip
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


GROUPS = HeadGroups, ByGroup, ForGroups, Listed, JoinGroups
SHARED = TurnAndStore, ImageMap, Scores, LowAttention, JoinHeads, PageList, *GROUPS
FUNCTIONS = (*SHARED, PageAttention, GatheredAttention, GroupedAttention, HierarchicalAttention)
