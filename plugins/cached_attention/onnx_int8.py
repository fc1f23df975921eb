"""flex::CachedAttention over an int8 cache as ONNX functions: for ONNX Runtime's CPU, and for its CUDA provider.

Inputs and outputs: see the package docstring. `0` in a Reshape keeps the dimension. TensorScatter writes integers and
their steps in place, as it does floats.

The CPU reads a few heads at a time: their keys and values are made float, met by the queries, and dropped. With a step
for each slice of an axis, DequantizeLinear is as quick as a cast; with blocks it takes ten times as long. CUDA, where a
Scan would wait for the host, casts the cache of a layer as a whole.
"""

from __future__ import annotations

from onnxscript import OnnxFunction, graph, script

from plugins.cached_attention import LEAST, STEPS
from plugins.cached_attention import onnx_body as body
from plugins.cached_attention.onnx_body import (
    ImageMap,
    JoinHeads,
    LastInGroups,
    LastOfHeads,
    QueryTables,
    Rows,
    Scores,
    Turn,
    flex,
    op,
)
from plugins.cached_attention.onnx_groups import GROUPS, ByGroup, ForGroups, HeadGroups, JoinGroups


@script(flex, default_opset=op)
def InSteps(x):
    """x [..., hd] float32 in 8 bits: int8, and the steps it is counted in [..., 1] float32."""
    largest = op.Max(op.ReduceMax(op.Abs(x), op.Constant(value_ints=[-1]), keepdims=1), op.Constant(value_float=LEAST))
    step = op.Div(largest, op.Constant(value_float=float(STEPS)))
    return op.Cast(op.Round(op.Div(x, step)), to=3), step  # to the nearest, ties to even


@script(flex, default_opset=op)
def Floats(store, step):
    """An int8 store [..., hd] and its steps [...]: the values [n, hd] float32."""
    rest = op.Constant(value_ints=[-1])
    tokens = op.Reshape(store, op.Concat(rest, op.Shape(store, start=-1), axis=0))
    return op.DequantizeLinear(tokens, op.Reshape(step, rest), axis=0)


@script(flex, default_opset=op)
def Kept(past, past_scale, new, first):
    """An int8 cache and its steps, with `new` [B, Hkv, S, hd] float32 written from `first` [B] on."""
    whole, step = InSteps(new)
    steps = op.Squeeze(step, op.Constant(value_ints=[3]))
    return op.TensorScatter(past, whole, first, axis=2), op.TensorScatter(past_scale, steps, first, axis=2)


@script(flex, default_opset=op)
def GroupedRead(rows, bias, key, value, key_scale, value_scale, heads: int, kv_heads: int, head_dim: int):
    """Masked scores of the last query [B, Hkv, group, L] float32 and context [B, Hkv, R, hd] of all `rows`
    [B, Hkv, R, hd] over an int8 cache, a few heads of one row of the batch at a time. `bias`: of Rows."""
    keep = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    rest = op.Constant(value_ints=[-1])
    group, groups = HeadGroups(kv_heads=kv_heads)
    width = op.Unsqueeze(op.Constant(value_int=head_dim), keep)
    to_scales = op.Concat(rest, group, keep, axis=0)
    to_stores = op.Concat(to_scales, keep, axis=0)
    to_tokens = op.Concat(one, group, rest, width, axis=0)
    sharing = op.Unsqueeze(op.Div(op.Constant(value_int=heads), op.Constant(value_int=kv_heads)), keep)
    to_queries = op.Concat(keep, keep, sharing, rest, op.Shape(bias, start=3), axis=0)

    @graph()
    def OfGroup(few_rows, few_bias, keys, values, key_steps, value_steps):
        few_scores = op.Add(Scores(op.Cast(few_rows, to=1), op.Reshape(Floats(keys, key_steps), to_tokens)), few_bias)
        weights = op.Softmax(few_scores, axis=-1)
        few = op.CastLike(op.MatMul(weights, op.Reshape(Floats(values, value_steps), to_tokens)), few_rows)
        last = op.Gather(op.Reshape(few_scores, to_queries), op.Constant(value_int=-1), axis=3)
        return last, few

    scores, context = op.Scan(
        ByGroup(rows, group), ForGroups(bias, groups),
        op.Reshape(key, to_stores), op.Reshape(value, to_stores),
        op.Reshape(key_scale, to_scales), op.Reshape(value_scale, to_scales),
        num_scan_inputs=6, body=OfGroup,
    )  # fmt: skip
    return JoinGroups(scores, kv_heads=kv_heads), JoinGroups(context, kv_heads=kv_heads)


@script(flex, default_opset=op)
def WholeRead(rows, bias, key, value, key_scale, value_scale, heads: int, kv_heads: int, head_dim: int):
    """GroupedRead without a loop. In float32 whatever the model's dtype: products of int8 keys are larger than scores,
    float16 might not hold them."""
    two = op.Constant(value_ints=[2])
    products = op.MatMul(op.Cast(rows, to=1), op.Transpose(op.Cast(key, to=1), perm=[0, 1, 3, 2]))
    scores = op.Add(op.Mul(products, op.Unsqueeze(key_scale, two)), bias)
    shared = op.Mul(op.Softmax(scores, axis=-1), op.Unsqueeze(value_scale, two))
    context = op.CastLike(op.MatMul(shared, op.Cast(value, to=1)), rows)
    return LastInGroups(scores, heads=heads, kv_heads=kv_heads), context


def low_attention(Read: OnnxFunction) -> OnnxFunction:
    """LowAttention of plugins/cached_attention/onnx_body.py over an int8 cache, which `Read` reads."""

    @script(flex, default_opset=op)
    def Int8LowAttention(
        query, key, value, past_key, past_value, positions, cos, sin, image_begin, past_key_scale, past_value_scale,
        heads: int, kv_heads: int, head_dim: int, grid: int,
    ):  # fmt: skip
        query_cos, query_sin = QueryTables(cos, sin, head_dim=head_dim)
        turned, turned_key, v, first = Turn(
            query, key, value, positions, query_cos, query_sin, cos, sin, head_dim=head_dim
        )
        present_key, present_key_scale = Kept(past_key, past_key_scale, turned_key, first)
        present_value, present_value_scale = Kept(past_value, past_value_scale, op.Cast(v, to=1), first)
        rows, bias = Rows(turned, past_key, positions, heads=heads, kv_heads=kv_heads)
        last_scores, context = Read(
            rows, bias, present_key, present_value, present_key_scale, present_value_scale,
            heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        )  # fmt: skip
        weights = op.Softmax(LastOfHeads(last_scores, heads=heads), axis=-1)
        map = ImageMap(weights, image_begin, grid=grid)
        last_query = LastInGroups(rows, heads=heads, kv_heads=kv_heads)
        return (
            last_query, last_scores, context, present_key, present_value, present_key_scale, present_value_scale, map
        )  # fmt: skip

    return Int8LowAttention


def attention(Low: OnnxFunction) -> OnnxFunction:
    """The op over an int8 cache. Low: of `low_attention`."""

    @script(flex, default_opset=op)
    def CachedAttention(
        query, key, value, past_key, past_value, positions, cos, sin, image_begin, past_key_scale, past_value_scale,
        heads: int, kv_heads: int, head_dim: int, grid: int,
    ):  # fmt: skip
        last, scores, context, present_key, present_value, present_key_scale, present_value_scale, map = Low(
            query, key, value, past_key, past_value, positions, cos, sin, image_begin, past_key_scale, past_value_scale,
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, grid=grid,
        )  # fmt: skip
        joined = JoinHeads(context, heads=heads)
        return joined, present_key, present_value, map, present_key_scale, present_value_scale

    return CachedAttention


ByGroups, Whole = low_attention(GroupedRead), low_attention(WholeRead)
SHARED = *body.STEPS, InSteps, Kept
LOW = *SHARED, *GROUPS, Scores, Floats, GroupedRead, ByGroups
CUDA_LOW = *SHARED, WholeRead, Whole
FUNCTIONS = (*LOW, attention(ByGroups))
CUDA_FUNCTIONS = (*CUDA_LOW, attention(Whole))
