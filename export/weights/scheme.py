"""Weights in codes (int8, int4, fp8) as a bundle stores them, and which a model admits.

A linear layer's weight [N, K] is stored as codes [K, N] with one scale for each block of `block` values along K, or
for each column, both read by a DequantizeLinear right before the MatMul (axis 0 with blocks, 1 with columns:
export/graph/quantize.py). A code is an integer, or in fp8 a float of 8 bits (E4M3); a value is code * scale, symmetric,
without zero points: TensorRT takes no other, nor a scale that is not positive. Embeddings stay [N, K], a scale for each
row: a gather takes the rows of both that it needs.

ONNX Runtime fuses all integers to MatMulNBits, and unpacks fp8 in every step. TensorRT-RTX 1.7 unpacks int4 blocks, and
int8 and fp8 columns, inside the product that reads them; int8 or fp8 in blocks it unpacks in kernels of their own
(tests/engines/trt/test_weights.py), so that fp8 is made in columns only.
"""

from __future__ import annotations

import onnx_ir as ir

from engines.bundle.geometry import Geometry
from engines.bundle.precision import BLOCK_SIZES, COLUMN, FP8, INT4, INT8, Scheme, block_name
from engines.bundle.tensors import EMBEDDINGS, HEAD, Coding, fitting_blocks
from engines.errors import OptionError

# What no other initializer is -> the precision whose codes these are.
CODES = {ir.DataType.INT4: INT4, ir.DataType.INT8: INT8, ir.DataType.FLOAT8E4M3FN: FP8}
SCALE_SUFFIX = ".scale"


def code_dtype(scheme: Scheme) -> ir.DataType:
    """Of the codes, in ONNX."""
    return next(dtype for dtype, precision in CODES.items() if precision == scheme.precision)


def stored_shape(scheme: Scheme, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the codes and of the scales of a weight [N, K]."""
    n, k = shape
    if scheme.rows:
        return (n, k), (n,)
    return (k, n), ((n,) if scheme.block == COLUMN else (k // scheme.block, n))


def scheme_of(name: str, codes: ir.DataType, shape: tuple[int, ...], scales: tuple[int, ...]) -> Scheme:
    """The inverse: how the weight `name` is stored whose codes and scales have these shapes."""
    block = COLUMN if len(scales) == 1 else shape[0] // scales[0]
    return Scheme(CODES[codes], block, rows=name == EMBEDDINGS)


def require_blocks(g: Geometry, coding: Coding) -> None:
    """OptionError unless the blocks divide the K of every weight that is to be quantised, and none is two at once."""
    head = "--quantize-head, or --head" if coding.head == coding.linear else "--head"
    for kind, what, option in (
        ("head", "lm_head cannot be quantised: it shares its weight with the embeddings", head),
        ("embeddings", "embeddings cannot be quantised: they share their weight with lm_head", "--embeddings"),
    ):
        if getattr(coding, kind) and g.tied_embeddings:
            raise OptionError(what, fix=f"leave out {option}")
    shapes, schemes = coding.tensors(g), coding.schemes(g)
    wrong = {name: k for name, (_, k) in shapes.items() if k % schemes[name].span(k)}
    if wrong:
        name, k = next(iter(wrong.items()))
        fits = fitting_blocks(shape for name, shape in shapes.items() if schemes[name].block != COLUMN)
        raise OptionError(
            f"blocks of {schemes[name].block} do not divide {name} with its {k} inputs ({len(wrong)} such weights)",
            expected=f"a block size that divides them all: {' or '.join(map(str, fits)) or f'none of {BLOCK_SIZES}'}",
            fix=f"--block-size {fits[-1]}" if fits else _without_blocks(name, schemes[name], coding),
        )


def _without_blocks(name: str, scheme: Scheme, coding: Coding) -> str:
    """What to build instead where no block size divides the weights."""
    if scheme != coding.linear:
        return f"--{'head' if name == HEAD else 'vision'} {INT8}"
    other = "" if COLUMN in scheme.precision.block_sizes else "--int8 "
    return f"{other}--block-size {block_name(COLUMN)}, or --fp16"
