"""The ONNX operators of traced graphs in torch, on whatever device their inputs are; nothing here waits for a GPU.

Each takes a node's inputs (None for one that is left out) and its attributes by name, and returns a tensor, or one for
each output. What says how large a result is has to be on the host: HOST_OPERANDS.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {  # by their number in ONNX
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float16,
    16: torch.bfloat16, 17: torch.float8_e4m3fn,
}  # fmt: skip
# Inputs, by their index, whose values are needed to know the shape of the result.
HOST_OPERANDS = {
    "ConstantOfShape": (0,), "Expand": (1,), "Range": (0, 1, 2), "ReduceMax": (1,), "ReduceMean": (1,),
    "ReduceSum": (1,), "Reshape": (1,), "Slice": (1, 2, 3, 4), "Split": (1,), "Squeeze": (1,), "Unsqueeze": (1,),
}  # fmt: skip


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise NotImplementedError(f"{what}: no traced graph had that; add it to tests/emulator/operators.py")


def _argmax(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    _require(not select_last_index, "ArgMax of the last index")
    return x.argmax(axis, keepdim=bool(keepdims))


def _constant_of_shape(shape: Tensor, *, value: Tensor | None = None) -> Tensor:
    fill = torch.zeros(1) if value is None else value
    return torch.full(shape.tolist(), fill.item(), dtype=fill.dtype)


def _dequantize(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    _require(not output_dtype, "DequantizeLinear to another dtype than its scales'")
    scale, zero = (None if each is None else _spread(each, x, axis, block_size) for each in (scale, zero))
    wide = x.to(scale.dtype)
    return (wide if zero is None else wide - zero.to(scale.dtype)) * scale


def _quantize(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    saturate: int = 1,
    precision: int = 0,
) -> Tensor:
    kind = zero.dtype if zero is not None else DTYPES[output_dtype or 2]
    _require(kind in (torch.int8, torch.uint8), f"QuantizeLinear to {kind}")
    scale, zero = (None if each is None else _spread(each, x, axis, block_size) for each in (scale, zero))
    whole = (x / scale).round() + (0 if zero is None else zero.to(x.dtype))
    limits = torch.iinfo(kind)
    return whole.clamp(limits.min, limits.max).to(kind)


def _spread(each: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """Scales or zero points, one for each block of `x`, or one for each index of an axis, or one: as they broadcast."""
    if block:
        return each.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return each.reshape([-1 if index == axis % x.ndim else 1 for index in range(x.ndim)]) if each.ndim == 1 else each


def _divide(x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _expand(x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(shape.tolist())))


def _flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    return x.reshape(math.prod(x.shape[: axis % x.ndim if x.ndim else 0]), -1)


def _from_the_end(indices: Tensor, size: int) -> Tensor:
    return torch.where(indices < 0, indices + size, indices)


def _gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    axis %= x.ndim  # not x[..., indices]: a single index would be read on the host
    found = x.index_select(axis, _from_the_end(indices, x.shape[axis]).reshape(-1))
    return found.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    _require(not batch_dims, "GatherND in batches")
    *rows, depth = indices.shape
    return x[tuple(indices.reshape(-1, depth).unbind(-1))].reshape(*rows, *x.shape[depth:])


def _gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1, beta: float = 1, transA: int = 0,
    transB: int = 0,
) -> Tensor:  # fmt: skip
    product = (a.T if transA else a) @ (b.T if transB else b)
    product = product if alpha == 1 else product * alpha
    return product if c is None else product + (c if beta == 1 else c * beta)


def _layer_normalization(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    return F.layer_norm(x, x.shape[axis % x.ndim :], scale, bias, epsilon)


def _reduced(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduce(x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        chosen = [] if axes is None else axes.tolist()
        if not chosen and noop_with_empty_axes:
            return x
        return function(x, tuple(chosen or range(x.ndim)), keepdim=bool(keepdims))

    return reduce


def _reshape(x: Tensor, shape: Tensor, *, allowzero: int = 0) -> Tensor:
    sizes = shape.tolist()
    return x.reshape([x.shape[axis] if not size and not allowzero else size for axis, size in enumerate(sizes)])


def _shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


def _slice(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
    given = [None if each is None else each.tolist() for each in (starts, ends, axes, steps)]
    begins, limits = given[:2]
    chosen, strides = given[2] or range(len(begins)), given[3] or [1] * len(begins)
    _require(min(strides) > 0, "Slice backwards")
    where = [slice(None)] * x.ndim
    for axis, *place in zip(chosen, begins, limits, strides, strict=True):
        where[axis] = slice(*place)
    return x[tuple(where)]


def _split(
    x: Tensor, sizes: Tensor | None = None, *, axis: int = 0, num_outputs: int | None = None
) -> tuple[Tensor, ...]:
    return x.split(-(-x.shape[axis] // num_outputs) if sizes is None else sizes.tolist(), axis)


def _squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes.tolist()))


def _unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    rank = x.ndim + axes.numel()
    for axis in sorted(axis % rank for axis in axes.tolist()):
        x = x.unsqueeze(axis)
    return x


def _repeated(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def fold(first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = function(first, other)
        return first

    return fold


OPERATORS: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "Abs": torch.abs,
    "Add": torch.add,
    "And": torch.logical_and,
    "ArgMax": _argmax,
    "Cast": lambda x, *, to, saturate=1, round_mode="up": x.to(DTYPES[to]),
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "Constant": lambda *, value: value,
    "ConstantOfShape": _constant_of_shape,
    "Cos": torch.cos,
    "DequantizeLinear": _dequantize,
    "Div": _divide,
    "Equal": torch.eq,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": lambda x, indices, *, axis=0: x.gather(axis, _from_the_end(indices, x.shape[axis])),
    "GatherND": _gather_nd,
    "Gelu": lambda x, *, approximate="none": F.gelu(x, approximate=approximate),
    "Gemm": _gemm,
    "Greater": torch.gt,
    "Identity": lambda x: x,
    "LayerNormalization": _layer_normalization,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "MatMul": torch.matmul,
    "Max": _repeated(torch.maximum),
    "Min": _repeated(torch.minimum),
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Pow": lambda x, exponent: x.pow(exponent).to(x.dtype),
    "QuantizeLinear": _quantize,
    "Range": lambda start, limit, delta: torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype),
    "Reciprocal": torch.reciprocal,
    "ReduceMax": _reduced(torch.amax),
    "ReduceMean": _reduced(torch.mean),
    "ReduceSum": _reduced(torch.sum),
    "Reshape": _reshape,
    "Shape": _shape,
    "Sigmoid": torch.sigmoid,
    "Sin": torch.sin,
    "Slice": _slice,
    "Softmax": lambda x, *, axis=-1: x.softmax(axis),
    "Split": _split,
    "Sqrt": torch.sqrt,
    "Squeeze": _squeeze,
    "Sub": torch.sub,
    "Tanh": torch.tanh,
    "Transpose": lambda x, *, perm=None: x.permute(perm or tuple(range(x.ndim))[::-1]),
    "Unsqueeze": _unsqueeze,
    "Where": torch.where,
}
