"""flex::HierarchicalAttention as an ONNX function for ONNX Runtime's CUDA provider: reads every page, where it is, and
masks the unselected.

Inputs and outputs: see the package docstring. `0` in a Reshape keeps the dimension. Nothing branches, and no shape
depends on data: the condition of an If, the number of selected pages and the state of a Scan would each be copied to
the host, which waits for the device, in every layer. The price is memory traffic: all C*C pages are read in every step,
at 7B 2 GB of float16, where the weights take 13. Copying the selected pages first would read and write each of them
before it is read once more. A bias of MASKED gives a key the softmax weight 0 exactly, so the result is that of the
selected pages alone; weight 0 times NaN is NaN, so the whole store must hold finite numbers, as zeros are.
"""

from __future__ import annotations

from onnxscript import OnnxFunction, script

from plugins.cached_attention import MASKED
from plugins.cached_attention import onnx_int8 as int8_cache
from plugins.cached_attention.onnx_body import LOW, LowAttention, Scores, flex, once, op
from plugins.hierarchical_attention import onnx_op
from plugins.hierarchical_attention.onnx_body import JoinPages, PageAttention
from plugins.hierarchical_attention.onnx_op import over_float_cache, over_int8_both, over_int8_cache


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
def FloatReads(rows, low_scores, context, page_key, page_value, page_key_scale, page_value_scale, used, capacity):
    """PageAttention with whole stores [B, Hkv, C*C, P, hd]; no scale is read."""
    to_tokens = op.Concat(op.Constant(value_ints=[0, 0, -1]), op.Shape(page_key, start=4, end=5), axis=0)
    return PageAttention(
        rows, low_scores, context, op.Reshape(page_key, to_tokens), op.Reshape(page_value, to_tokens), used, capacity
    )


@script(flex, default_opset=op)
def Int8Reads(rows, low_scores, context, page_key, page_value, page_key_scale, page_value_scale, used, capacity):
    """FloatReads for int8 stores and their steps [B, Hkv, C*C, P]; both are cast as a whole. In float32 whatever the
    model's dtype: products of int8 keys are larger than scores, float16 might not hold them."""
    three = op.Constant(value_ints=[3])
    to_tokens = op.Concat(op.Constant(value_ints=[0, 0, -1]), op.Shape(page_key, start=4, end=5), axis=0)
    to_steps = op.Constant(value_ints=[0, 0, 1, -1])
    keys = op.Transpose(op.Cast(op.Reshape(page_key, to_tokens), to=1), perm=[0, 1, 3, 2])
    products = op.Mul(op.MatMul(op.Cast(rows, to=1), keys), op.Reshape(page_key_scale, to_steps))
    scores = op.Where(used, products, op.Constant(value_float=MASKED))
    joint = op.Softmax(op.Concat(low_scores, scores, axis=3), axis=-1)
    weights = op.Slice(joint, capacity, op.Constant(value_ints=[9223372036854775807]), three)
    shared = op.Mul(weights, op.Reshape(page_value_scale, to_steps))
    return JoinPages(context, weights, op.MatMul(shared, op.Cast(op.Reshape(page_value, to_tokens), to=1)))


def whole_store(Reads: OnnxFunction) -> OnnxFunction:
    """`Pages` of onnx_op.py; `Reads` depends on how pages are stored."""

    @script(flex, default_opset=op)
    def WholeStore(
        last, low_scores, low_context, past_key,
        page_key, page_value, page_key_scale, page_value_scale, page_lengths, pages, page_count,
        kv_heads: int, head_dim: int, page_size: int,
    ):  # fmt: skip
        return Reads(
            last, low_scores, low_context, page_key, page_value, page_key_scale, page_value_scale,
            SelectedTokens(page_lengths, pages, page_count, page_size=page_size),
            op.Shape(past_key, start=2, end=3),
        )  # fmt: skip

    return WholeStore


FloatStore, Int8Store = whole_store(FloatReads), whole_store(Int8Reads)
SHARED = *onnx_op.SHARED, Scores, JoinPages, PageAttention, SelectedTokens
FLOAT_PAGES = *SHARED, FloatReads, FloatStore
INT8_PAGES = *SHARED, Int8Reads, Int8Store
FUNCTIONS = once(*LOW, *FLOAT_PAGES, over_float_cache(LowAttention, FloatStore))
INT8_FUNCTIONS = once(*LOW, *INT8_PAGES, over_float_cache(LowAttention, Int8Store))
INT8_CACHE = once(*int8_cache.CUDA_LOW, *FLOAT_PAGES, over_int8_cache(int8_cache.Whole, FloatStore))
INT8_BOTH = once(*int8_cache.CUDA_LOW, *INT8_PAGES, over_int8_both(int8_cache.Whole, Int8Store))
