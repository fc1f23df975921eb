"""The precisions a bundle may have, as data."""

from __future__ import annotations

# Name on the command line -> dtype of what is not quantised: of activations, and of the other weights.
PRECISIONS = {
    "fp16": "float16",
    "fp32": "float32",
    "bf16": "bfloat16",
    "int8": "float16",
    "int4": "float16",
    "fp8": "float16",
}
BITS = {"int8": 8, "int4": 4, "fp8": 8}  # of the decoder's linear weights, in these precisions; fp8 is E4M3
BLOCK_SIZES = (16, 32, 64, 128)  # values along K that share a scale; 16 is for small models only it divides
COLUMN = 0  # as a block size: one scale for each output column, whatever K is
# Block sizes of each precision. int4 with one scale for a column would lose too much; fp8 in blocks, like int8 in
# blocks, TensorRT-RTX 1.7 unpacks in every step.
BLOCKS = {"int8": (*BLOCK_SIZES, COLUMN), "int4": BLOCK_SIZES, "fp8": (COLUMN,)}
# The CPU has no bfloat16 arithmetic, and float16 is no faster there than float32: graphs for ONNX Runtime then widen.
WIDENED = ("bf16", *BITS)


def block_name(size: int) -> str:
    """A block size as the command line has it: "128", "column"."""
    return "column" if size == COLUMN else str(size)
