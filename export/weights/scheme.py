"""Weight-only int8, int4 and fp8: which weights are quantised, and how a bundle stores them.

A linear layer's weight [N, K] is stored as codes [K, N] with one scale for each block of `block` values along K, or
for each column, both read by a DequantizeLinear right before the MatMul (axis 0 with blocks, 1 with columns:
export/graph/quantize.py). A code is an integer, or in fp8 a float of 8 bits (E4M3); a value is code * scale, symmetric,
without zero points: TensorRT takes no other, nor a scale that is not positive.

ONNX Runtime fuses all integers to MatMulNBits, and unpacks fp8 in every step. TensorRT-RTX 1.7 unpacks int4 blocks, and
int8 and fp8 columns, inside the product that reads them; int8 or fp8 in blocks it unpacks in kernels of their own
(tests/engines/trt/test_weights.py), so that fp8 is made in columns only.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from engines.bundle.geometry import Geometry
from engines.bundle.precision import BLOCK_SIZES, COLUMN, Precision, block_name
from engines.bundle.tensors import fitting_blocks, quantised_tensors
from engines.errors import OptionError

CODES = ir.DataType.INT4, ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN  # what no other initializer is
SCALE_SUFFIX = ".scale"


@dataclass(frozen=True)
class Scheme:
    """How weights are quantised. precision: one that quantises. block: of its block sizes, how many values share a
    scale (COLUMN: all of a column). head: lm_head, too. floats: names of weights that are not quantised though others
    of their kind are."""

    precision: Precision
    block: int
    head: bool = False
    floats: tuple[str, ...] = ()

    @property
    def bits(self) -> int:
        """Of a code."""
        assert self.precision.bits is not None, f"{self.precision} does not quantise"
        return self.precision.bits

    @property
    def e4m3(self) -> bool:
        """Whether codes are 8-bit floats."""
        return self.precision.e4m3

    @property
    def dtype(self) -> ir.DataType:
        """Of the codes."""
        integers = ir.DataType.INT4 if self.bits == 4 else ir.DataType.INT8
        return ir.DataType.FLOAT8E4M3FN if self.e4m3 else integers

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest code stored. int4 uses -8 as well; in int8 one more code would make no difference."""
        if self.e4m3:
            return (-448, 448)  # E4M3 has no infinities, only NaN beyond
        return (-8, 7) if self.bits == 4 else (-127, 127)

    def span(self, k: int) -> int:
        """How many of a weight's K inputs share a scale."""
        return k if self.block == COLUMN else self.block

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a quantised weight [N, K] with its float16 scales."""
        count = prod(shape)
        return count * self.bits // 8 + count // self.span(shape[-1]) * 2

    def tensors(self, g: Geometry) -> dict[str, tuple[int, ...]]:
        """Name and checkpoint shape [N, K] of every weight that is quantised."""
        return quantised_tensors(g, self.head, self.floats)


def require_blocks(g: Geometry, scheme: Scheme) -> None:
    """OptionError unless the blocks divide the K of every weight that is to be quantised."""
    if scheme.head and g.tied_embeddings:
        raise OptionError(
            "lm_head cannot be quantised: it shares its weight with the embeddings", fix="leave out --quantize-head"
        )
    weights = scheme.tensors(g)
    wrong = {name: shape for name, shape in weights.items() if shape[1] % scheme.span(shape[1])}
    if wrong:
        name, shape = next(iter(wrong.items()))
        fits = fitting_blocks(weights.values())
        raise OptionError(
            f"blocks of {scheme.block} do not divide {name} with its {shape[1]} inputs ({len(wrong)} such weights)",
            expected=f"a block size that divides them all: {' or '.join(map(str, fits)) or f'none of {BLOCK_SIZES}'}",
            fix=f"--block-size {fits[-1]}" if fits else _without_blocks(scheme),
        )


def _without_blocks(scheme: Scheme) -> str:
    """What to build instead where no block size divides the weights."""
    other = "" if COLUMN in scheme.precision.block_sizes else "--int8 "
    return f"{other}--block-size {block_name(COLUMN)}, or --fp16"
