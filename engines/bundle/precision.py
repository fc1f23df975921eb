"""The precisions a bundle may have, as data: whatever differs between them is asked of a `Precision`."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from engines.bundle.kinds import TENSORRT
from engines.errors import OptionError
from plugins.op import ITEMSIZE

BLOCK_SIZES = (16, 32, 64, 128)  # values along K that share a scale; 16 is for small models only it divides
COLUMN = 0  # as a block size: one scale for each output column, whatever K is
SCALE_BYTES = 2  # of a scale: float16


@dataclass(frozen=True)
class Precision:
    """How a bundle stores weights and what it computes in; `str()` gives the name on the command line.

    dtype: of activations, and of weights that are not quantised. ort_dtype: what ONNX Runtime's graphs compute in,
    wider where its CPU has no arithmetic of `dtype`, or none that is faster. bits: of each weight of the decoder's
    linear layers, None where these are not quantised. e4m3: those are floats of 8 bits (E4M3), not integers.
    block_sizes: values that may share a scale, some of BLOCK_SIZES and COLUMN. default_block: the one of them that is
    meant when none is named. columns_alone: backends that take one scale for a column and no blocks, and for which that
    is meant. least_sm: the first GPUs that TensorRT has it for (89 is 8.9), None for all. smaller: what to propose
    instead where memory is short, nearest first.
    """

    name: str
    dtype: str
    ort_dtype: str
    bits: int | None = None
    e4m3: bool = False
    block_sizes: tuple[int, ...] = ()
    default_block: int | None = None
    columns_alone: tuple[str, ...] = ()
    least_sm: int | None = None
    smaller: tuple[Precision, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return self.name

    @property
    def quantises(self) -> bool:
        """Whether linear layers are stored as codes with scales."""
        return self.bits is not None

    @property
    def widened(self) -> bool:
        """Whether ONNX Runtime computes in a wider dtype than the weights have."""
        return self.ort_dtype != self.dtype

    @property
    def itemsize(self) -> int:
        """Bytes of an activation, and of a stored weight that is not quantised."""
        return ITEMSIZE[self.dtype]

    def block_size(self, asked: int | None = None, backend: str | None = None) -> int:
        """The block size that is meant, of a precision that quantises: the one asked for, else the default of the
        backend."""
        assert self.default_block is not None, f"{self} does not quantise"
        default = COLUMN if backend in self.columns_alone else self.default_block
        return default if asked is None else asked

    def takes(self, block: int, backend: str) -> bool:
        """Whether a backend takes weights of this precision in such blocks."""
        return block in ((COLUMN,) if backend in self.columns_alone else self.block_sizes)

    def calibrates(self, block: int) -> bool:
        """Whether scales and clips can be searched for (AWQ): for integers in blocks."""
        return self.quantises and not self.e4m3 and block != COLUMN


# TensorRT documents blocks for INT4, never for INT8; TensorRT-RTX builds them.
# int4 with one scale for a column would lose too much; fp8 in blocks, like int8 in blocks, TensorRT-RTX 1.7 unpacks in
# every step. The CPU has no bfloat16 arithmetic, and float16 is no faster there than float32.
INT4 = Precision("int4", "float16", "float32", 4, block_sizes=BLOCK_SIZES, default_block=128)
INT8 = Precision(
    "int8", "float16", "float32", 8, block_sizes=(*BLOCK_SIZES, COLUMN), default_block=128, columns_alone=(TENSORRT,),
    smaller=(INT4,),
)  # fmt: skip
FP8 = Precision(
    "fp8", "float16", "float32", 8, e4m3=True, block_sizes=(COLUMN,), default_block=COLUMN, least_sm=89,
    smaller=(INT4,),
)  # fmt: skip
FP16 = Precision("fp16", "float16", "float16", smaller=(INT8, INT4))
FP32 = Precision("fp32", "float32", "float32", smaller=(FP16, INT8, INT4))
BF16 = Precision("bf16", "bfloat16", "float32", smaller=(INT8, INT4))

PRECISIONS = {each.name: each for each in (FP16, FP32, BF16, INT8, INT4, FP8)}  # in the order of --help
DEFAULT = FP16  # of a checkpoint that holds floats, when none is asked for


@dataclass(frozen=True)
class Scheme:
    """How a weight [N, K] is stored in codes. precision: one that quantises. block: how many values along K share a
    scale (COLUMN: all of an output's). rows: codes stay [N, K], as a gather of rows reads them, not [K, N]."""

    precision: Precision
    block: int
    rows: bool = False

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
    def limits(self) -> tuple[int, int]:
        """Smallest and largest code stored. int4 uses -8 as well; in int8 one more code would make no difference."""
        if self.e4m3:
            return (-448, 448)  # E4M3 has no infinities, only NaN beyond
        return (-8, 7) if self.bits == 4 else (-127, 127)

    def span(self, k: int) -> int:
        """How many of a weight's K inputs share a scale."""
        return k if self.block == COLUMN else self.block

    def pieces(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Bytes of the codes of a weight [N, K], and of their scales; a block that is cut short has one, too."""
        return prod(shape) * self.bits // 8, prod(shape[:-1]) * -(-shape[-1] // self.span(shape[-1])) * SCALE_BYTES

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a weight [N, K] with its scales."""
        return sum(self.pieces(shape))


def precision_named(name: str) -> Precision:
    """The precision of this name; OptionError, which lists the names, if there is none."""
    if name not in PRECISIONS:
        raise OptionError(f"precision {name!r}", expected=f"one of {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def block_name(size: int) -> str:
    """A block size as the command line has it: "128", "column"."""
    return "column" if size == COLUMN else str(size)
