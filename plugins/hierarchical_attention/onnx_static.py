"""flex::HierarchicalAttention as an ONNX function for TensorRT without plugins: reads every page, masks the unselected.

Inputs and outputs: see the package docstring. A bias of MASKED gives a key the softmax weight 0 exactly, so the result
is that of the selected pages alone; the price is the memory traffic of all C*C pages, each read once, where it is.
Weight 0 times NaN is NaN: the whole store must hold finite numbers, so every page is projected before the first step.
Of int8 pages the integers are cast inside the sums over them, so that no float copy of the store is made.
"""

from __future__ import annotations

from onnxscript import OnnxFunction, script

from plugins.cached_attention import MASKED
from plugins.cached_attention.onnx_body import ImageMap, JoinLast, Turn, TurnAndStore, flex, op
from plugins.cached_attention.onnx_static import StaticAttention


@script(flex, default_opset=op)
def PageBias(page_lengths, pages, page_count, page_size: int):
    """[B, 1, 1, C*C*P] float32: 0 for the tokens of the selected pages, MASKED for all others.

    The list becomes a mask by comparing every entry with every page: no scatter, no shape that depends on data.
    """
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    zero = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    every = op.Range(zero, op.Squeeze(op.Shape(page_lengths)), step)  # [C*C]
    listed = op.Less(every, op.Unsqueeze(page_count, one))  # [B, place in the list]
    own = op.Where(listed, pages, op.Constant(value_int=-1))
    same = op.Equal(op.Unsqueeze(own, one), op.Unsqueeze(every, one))  # [B, page, place in the list]
    chosen = op.Greater(op.ReduceMax(op.Cast(same, to=1), two, keepdims=1), op.Constant(value_float=0.0))
    token = op.Range(zero, op.Constant(value_int=page_size), step)
    used = op.And(chosen, op.Less(token, op.Unsqueeze(page_lengths, one)))  # [B, C*C, P]
    bias = op.Where(used, op.Constant(value_float=0.0), op.Constant(value_float=MASKED))
    return op.Reshape(bias, op.Constant(value_ints=[0, 1, 1, -1]))


@script(flex, default_opset=op)
def PageProducts(last_query, page_key, page_key_scale, heads: int, kv_heads: int):
    """Products [B, Hkv, group, C*C, P] float32 of the last query [B, H, 1, hd] with all page keys; no scale is read.

    As products and sums, here and in PageValues: a MatMul would copy the pages.
    """
    keep = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    rest = op.Constant(value_ints=[-1])
    key_heads = op.Unsqueeze(op.Constant(value_int=kv_heads), keep)
    group = op.Div(op.Unsqueeze(op.Constant(value_int=heads), keep), key_heads)
    by_group = op.Reshape(op.Cast(last_query, to=1), op.Concat(keep, key_heads, group, one, one, rest, axis=0))
    keys = op.Cast(op.Unsqueeze(page_key, op.Constant(value_ints=[2])), to=1)  # [B, Hkv, 1, C*C, P, hd]
    return op.ReduceSum(op.Mul(by_group, keys), rest, keepdims=0)


@script(flex, default_opset=op)
def Int8PageProducts(last_query, page_key, page_key_scale, heads: int, kv_heads: int):
    """`PageProducts` with int8 keys, each token's times its step."""
    whole = PageProducts(last_query, page_key, page_key_scale, heads=heads, kv_heads=kv_heads)
    return op.Mul(whole, op.Unsqueeze(page_key_scale, op.Constant(value_ints=[2])))


@script(flex, default_opset=op)
def PageWeights(products, bias, last_scores, past_key, page_value_scale, heads: int, kv_heads: int, page_size: int):
    """Weights of the page tokens in one softmax of the last query over [ordinary keys | page keys], float32:
    [B, H, 1, C*C*P], and what page values are multiplied by, here the same by page [B, Hkv, group, C*C, P, 1]; no scale
    is read."""
    keep = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    rest = op.Constant(value_ints=[-1])
    three = op.Constant(value_ints=[3])
    end = op.Constant(value_ints=[9223372036854775807])
    all_heads = op.Unsqueeze(op.Constant(value_int=heads), keep)
    key_heads = op.Unsqueeze(op.Constant(value_int=kv_heads), keep)
    group = op.Div(all_heads, key_heads)
    size = op.Unsqueeze(op.Constant(value_int=page_size), keep)
    page_scores = op.Add(op.Reshape(products, op.Concat(keep, all_heads, one, rest, axis=0)), bias)
    joint = op.Softmax(op.Concat(last_scores, page_scores, axis=3), axis=-1)
    weights = op.Slice(joint, op.Shape(past_key, start=2, end=3), end, three)
    return weights, op.Reshape(weights, op.Concat(keep, key_heads, group, rest, size, one, axis=0))


@script(flex, default_opset=op)
def Int8PageWeights(products, bias, last_scores, past_key, page_value_scale, heads: int, kv_heads: int, page_size: int):
    """`PageWeights`, each token's times the step of its int8 value."""
    weights, shared = PageWeights(
        products, bias, last_scores, past_key, page_value_scale, heads=heads, kv_heads=kv_heads, page_size=page_size
    )
    return weights, op.Mul(shared, op.Unsqueeze(page_value_scale, op.Constant(value_ints=[2, 5])))


@script(flex, default_opset=op)
def PageValues(last_context, weights, shared, page_value, heads: int):
    """The last query's context [B, H, 1, hd] float32: `shared` weights on all page values, the rest on the ordinary."""
    keep = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    rest = op.Constant(value_ints=[-1])
    three = op.Constant(value_ints=[3])
    from_groups = op.Concat(keep, op.Unsqueeze(op.Constant(value_int=heads), keep), one, rest, axis=0)
    values = op.Cast(op.Unsqueeze(page_value, op.Constant(value_ints=[2])), to=1)
    by_page = op.ReduceSum(op.Mul(shared, values), op.Constant(value_ints=[4]), keepdims=0)  # [B, Hkv, group, C*C, hd]
    read = op.Reshape(op.ReduceSum(by_page, three, keepdims=0), from_groups)
    # The ordinary context is already there: the joint softmax only scales it by the share the pages leave over.
    share = op.Sub(op.Constant(value_float=1.0), op.ReduceSum(weights, three, keepdims=1))
    return op.Add(op.Mul(share, last_context), read)


def attention(Products: OnnxFunction, Weights: OnnxFunction) -> OnnxFunction:
    """The op; its steps `Products` and `Weights` depend on how pages are stored. A node on pages that are not int8 has
    no scales, and nobody reads them."""

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
        products = Products(last_query, page_key, page_key_scale, heads=heads, kv_heads=kv_heads)
        weights, shared = Weights(
            products, bias, last_scores, past_key, page_value_scale,
            heads=heads, kv_heads=kv_heads, page_size=page_size,
        )  # fmt: skip
        mixed = PageValues(last_context, weights, shared, page_value, heads=heads)
        return JoinLast(context, mixed, positions), present_key, present_value, map

    return HierarchicalAttention


SHARED = Turn, TurnAndStore, ImageMap, StaticAttention, JoinLast, PageBias, PageProducts, PageWeights, PageValues
FUNCTIONS = (*SHARED, attention(PageProducts, PageWeights))
INT8_FUNCTIONS = (*SHARED, Int8PageProducts, Int8PageWeights, attention(Int8PageProducts, Int8PageWeights))
