"""flex::HierarchicalAttention as an ONNX function for ONNX Runtime: gathers the selected pages, or masks the others.

Inputs and outputs: see the package docstring. `0` in a Reshape keeps the dimension.

No operator reads pages through a list: they are copied first. Where pages are large, a Scan does that for a few heads
of one row of the batch at a time, so that what is read next is still in the processor's cache: a step of four rows with
22 pages each, at 7B's width in int4, takes 78 ms instead of 101 to 114. For small pages it is a few operators too many:
a step of four rows of the default model would take 2.3 ms instead of 2.0 (measured on the CPU).
"""

from __future__ import annotations

from onnxscript import graph, script

from plugins.cached_attention import MASKED
from plugins.cached_attention import onnx_int8 as int8_cache
from plugins.cached_attention.onnx_body import LOW, LowAttention, Scores, flex, once, op
from plugins.cached_attention.onnx_groups import GROUPS, ByGroup, ForGroups, HeadGroups, JoinGroups
from plugins.hierarchical_attention import onnx_op
from plugins.hierarchical_attention.onnx_op import over_float_cache, over_int8_cache

LARGE = 1 << 17  # numbers in a page, of all heads


@script(flex, default_opset=op)
def JoinPages(context, weights, read):
    """Context of one softmax over ordinary keys and pages: what pages give, `read` [B, Hkv, R, hd], beside the ordinary
    `context`, which is scaled by the share that their `weights` [B, Hkv, R, n] float32 leave over."""
    one = op.Constant(value_float=1.0)
    share = op.Sub(one, op.ReduceSum(weights, op.Constant(value_ints=[-1]), keepdims=1))
    return op.CastLike(op.Add(op.Mul(share, op.Cast(context, to=1)), op.Cast(read, to=1)), context)


@script(flex, default_opset=op)
def PageAttention(rows, low_scores, context, page_key, page_value, used, capacity):
    """Context [B, Hkv, R, hd] of `rows` [B, Hkv, R, hd] from one softmax over their ordinary keys, of which they have
    the masked scores [B, Hkv, R, L] float32 and the `context`, and the page keys [B, Hkv, n, hd]; `page_value`
    likewise. `used`: which page tokens they see, bool, broadcast to [B, Hkv, R, n]. `capacity`: [L].
    """
    three = op.Constant(value_ints=[3])
    scores = op.Where(used, Scores(rows, page_key), op.Constant(value_float=MASKED))
    joint = op.Softmax(op.Concat(low_scores, scores, axis=3), axis=-1)
    weights = op.Slice(joint, capacity, op.Constant(value_ints=[9223372036854775807]), three)
    return JoinPages(context, weights, op.MatMul(op.CastLike(weights, rows), page_value))


@script(flex, default_opset=op)
def PageList(page_lengths, pages, page_count, page_size: int):
    """Each row's own list [B, C*C]; which slots of each page are tokens [C*C + 1, P]; the pages of the fullest row of
    the batch [1]."""
    keep = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    rest = op.Constant(value_ints=[-1])
    zero = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    # What follows a row's own list becomes -1: the last page where pages are gathered, but of all its tokens none.
    own = op.Less(op.Range(zero, op.Squeeze(op.Shape(page_lengths)), step), op.Unsqueeze(page_count, one))
    listed = op.Where(own, pages, rest)
    token = op.Range(zero, op.Constant(value_int=page_size), step)
    inside = op.Less(token, op.Unsqueeze(op.Concat(page_lengths, keep, axis=0), one))
    return listed, inside, op.ReduceMax(page_count, keepdims=1)


@script(flex, default_opset=op)
def GatheredAttention(
    rows, low_scores, context, page_key, page_value, some, inside, capacity, kv_heads: int, head_dim: int
):  # fmt: skip
    """PageAttention with the pages `some` [B, n] of a store [B, Hkv, C*C, P, hd]. `inside`: which slots of a
    page are tokens [C*C + 1, P]."""
    keep = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    key_heads = op.Unsqueeze(op.Constant(value_int=kv_heads), keep)
    width = op.Unsqueeze(op.Constant(value_int=head_dim), keep)
    to_tokens = op.Concat(keep, key_heads, op.Constant(value_ints=[-1]), width, axis=0)
    used = op.Reshape(op.Gather(inside, some), op.Constant(value_ints=[0, 1, 1, -1]))
    index = op.Expand(op.Unsqueeze(some, op.Constant(value_ints=[1, 3])), op.Concat(one, key_heads, one, one, axis=0))
    keys = op.Reshape(op.GatherND(page_key, index, batch_dims=2), to_tokens)
    values = op.Reshape(op.GatherND(page_value, index, batch_dims=2), to_tokens)
    return PageAttention(rows, low_scores, context, keys, values, used, capacity)


@script(flex, default_opset=op)
def Listed(store, pages, shape):
    """Those pages [n] of what the heads of a group have of each [group, C*C, ...], in another `shape`."""
    return op.Reshape(op.Gather(store, pages, axis=1), shape)


@script(flex, default_opset=op)
def GroupedAttention(
    rows, low_scores, context, page_key, page_value, some, inside, capacity, kv_heads: int, head_dim: int
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
    def OfGroup(few_rows, few_scores, few_context, keys, values, listed):
        those = op.Reshape(listed, rest)
        few = PageAttention(
            few_rows, few_scores, few_context, Listed(keys, those, to_tokens), Listed(values, those, to_tokens),
            op.Reshape(op.Gather(inside, those), to_used), capacity,
        )  # fmt: skip
        return few

    joint = op.Scan(
        ByGroup(rows, group), ByGroup(low_scores, group), ByGroup(context, group),
        op.Reshape(page_key, to_stores), op.Reshape(page_value, to_stores),
        ForGroups(op.Unsqueeze(some, op.Constant(value_ints=[1, 2])), groups),
        num_scan_inputs=6, body=OfGroup,
    )  # fmt: skip
    return JoinGroups(joint, kv_heads=kv_heads)


@script(flex, default_opset=op)
def FloatPages(
    last, low_scores, low_context, past_key,
    page_key, page_value, page_key_scale, page_value_scale, page_lengths, pages, page_count,
    kv_heads: int, head_dim: int, page_size: int,
):  # fmt: skip
    """`Pages` of onnx_op.py where pages are not int8."""
    keep = op.Constant(value_ints=[0])
    rest = op.Constant(value_ints=[-1])
    key_heads = op.Unsqueeze(op.Constant(value_int=kv_heads), keep)
    width = op.Unsqueeze(op.Constant(value_int=head_dim), keep)
    to_tokens = op.Concat(keep, key_heads, rest, width, axis=0)
    listed, inside, most = PageList(page_lengths, pages, page_count, page_size=page_size)

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
                last, low_scores, low_context, page_key, page_value, some, inside, capacity,
                kv_heads=kv_heads, head_dim=head_dim,
            )  # fmt: skip
        else:
            context = GatheredAttention(
                last, low_scores, low_context, page_key, page_value, some, inside, capacity,
                kv_heads=kv_heads, head_dim=head_dim,
            )  # fmt: skip
    else:
        if few:
            context = op.Identity(low_context)
        else:
            # Single pages are gathered and read at half the speed of the whole store in place (measured on the CPU).
            by_page = op.ScatterElements(op.Expand(rest, op.Shape(pages)), pages, listed, axis=1)
            used = op.Reshape(op.Gather(inside, by_page), op.Constant(value_ints=[0, 1, 1, -1]))
            context = PageAttention(
                last, low_scores, low_context, op.Reshape(page_key, to_tokens), op.Reshape(page_value, to_tokens),
                used, capacity,
            )  # fmt: skip
    return context


SHARED = *onnx_op.SHARED, PageList, Scores, JoinPages, PageAttention
FLOAT_PAGES = *SHARED, *GROUPS, Listed, GatheredAttention, GroupedAttention, FloatPages
FUNCTIONS = once(*LOW, *FLOAT_PAGES, over_float_cache(LowAttention, FloatPages))
INT8_CACHE = once(*int8_cache.LOW, *FLOAT_PAGES, over_int8_cache(int8_cache.ByGroups, FloatPages))
