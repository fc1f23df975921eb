"""What a plugin is, whatever runs it: its tensors, its kernels, its launches. Plain data; needs nothing but Python."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

TRITON_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "i8", "int64": "i64"}
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "int64": 8}


def power_of_two(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (number - 1).bit_length()


def blocks(count: int, size: int) -> int:
    """Blocks of `size` that cover `count`."""
    return -(-count // size)


@dataclass(frozen=True)
class Kernel:
    """One variant of a Triton function: everything a compiler needs, and everything a launcher must pass.

    name: unique among the kernels of a model. function: "module:function". parameters: (name, type) of the run-time
    parameters in order; a type is Triton's, a pointer "*fp16", "*bf16", "*fp32", "*i8", "*i64" or the integer "i32".
    constants: the tl.constexpr parameters. Every pointer is 16-byte aligned, and the compiler is told so.
    """

    name: str
    function: str
    parameters: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int], ...]
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Launch:
    """One launch. `arguments`: an address or an integer for each of the kernel's parameters."""

    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """An input or output of an op; `dtype` is "float32", "int8", "int64", or "model": what the model computes in."""

    name: str
    dtype: str


class Op(ABC):
    """One custom op with its attributes. Shapes are those of all inputs, in order."""

    name: ClassVar[str]  # the ONNX op type, in the domain "flex"
    attribute_names: ClassVar[tuple[str, ...]]  # integers
    defaults: ClassVar[dict[str, int]] = {}  # of attributes a node may lack
    inputs: ClassVar[tuple[Tensor, ...]]
    outputs: ClassVar[tuple[Tensor, ...]]
    in_place: ClassVar[dict[int, int]] = {}  # output -> the input whose buffer it must share

    def __init__(self, **attributes: int) -> None:
        """One integer for each of `attribute_names` that has no default."""
        attributes = self.defaults | attributes
        if set(attributes) != set(self.attribute_names):
            raise ValueError(f"{self.name}: attributes {sorted(attributes)}, expected {sorted(self.attribute_names)}")
        self.attributes = attributes

    @abstractmethod
    def output_shapes(self, shapes: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
        """Each output's dimensions: dimensions of inputs (numbers, or a builder's symbols) and constants."""

    @abstractmethod
    def kernels(self, dtype: str) -> tuple[Kernel, ...]:
        """Every kernel a launch may need when the model computes in `dtype`."""

    @abstractmethod
    def workspace(self, shapes: Sequence[Sequence[int]]) -> int:
        """Bytes of scratch memory a call with these (or smaller) shapes needs."""

    @abstractmethod
    def launches(
        self,
        dtype: str,
        shapes: Sequence[Sequence[int]],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
    ) -> list[Launch]:
        """The launches of one call, in order on one stream; `inputs`, `outputs`, `workspace` are device addresses."""
