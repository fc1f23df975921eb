"""What a plugin is, whatever runs it: its tensors, its kernels, its launches. Plain data; needs nothing but Python."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")
Shapes = Mapping[str, Sequence[T]]  # a tensor's dimensions, by its name

TRITON_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "i8", "int64": "i64"}
FIRST_SM = 80  # what code that all SMs share is written for: older GPUs cannot run it
ALIGNMENT = 256  # bytes: tensors begin at multiples of it, in files of weights and on a GPU
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "int64": 8}
MODEL_DTYPES = "float32", "float16", "bfloat16"  # what a model may compute in
# Attributes that say how things are kept, pages or the cache in 8 bits, pages in page slots, in the order in which what
# they add follows an op's other inputs.
STORES = INT8_PAGES, INT8_CACHE, PAGE_SLOTS = "int8_pages", "int8_cache", "page_slots"
# Inputs of ops on an int8 store of pages, or on an int8 cache, which ops on other stores lack.
PAGE_SCALES = "page_key_scale", "page_value_scale"
CACHE_SCALES = "past_key_scale", "past_value_scale"
# What the kernel of pages in page slots is given, and no other.
OF_PAGE_SLOTS = "slots", "slot_total"


def power_of_two(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (number - 1).bit_length()


def blocks(count: int, size: int) -> int:
    """Blocks of `size` that cover `count`."""
    return -(-count // size)


def padded(size: int) -> int:
    """`size` bytes, rounded up to ALIGNMENT."""
    return blocks(size, ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Kernel:
    """One variant of a Triton function: everything a compiler needs, and everything a launcher must pass.

    name: unique among the kernels of a model. function: "module:function". parameters: (name, type) of the run-time
    parameters in order; a type is Triton's, a pointer "*fp16", "*bf16", "*fp32", "*i8", "*i64" or the integer "i32".
    constants: the tl.constexpr parameters. Every pointer is 16-byte aligned, and the compiler is told so. absent:
    pointers of the function that this variant does without; it is compiled with None in their place. tile: names of
    those constants that, as warps and stages, say how the work is cut and not what comes out (plugins/tiles.py).
    arch: the SM whose instructions it may use; FIRST_SM: those that every SM has.
    """

    name: str
    function: str
    parameters: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int], ...]
    warps: int = 4
    stages: int = 2
    absent: tuple[str, ...] = ()
    tile: tuple[str, ...] = ()
    arch: int = FIRST_SM

    def constant(self, name: str) -> int:
        """The constant of this name; KeyError."""
        return dict(self.constants)[name]

    def launch(self, grid: tuple[int, int, int], values: Mapping[str, int]) -> Launch:
        """A launch with those of `values` that are its parameters; KeyError when one of them is missing."""
        return Launch(self, grid, {name: values[name] for name, _ in self.parameters})


@dataclass(frozen=True)
class Launch:
    """One launch. arguments: an address or an integer for each of the kernel's parameters, by its name."""

    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: Mapping[str, int]

    def ordered(self, kernel: Kernel) -> list[int]:
        """The arguments in the order of a compiled kernel's parameters; ValueError unless there is one for each."""
        names = [name for name, _ in kernel.parameters]
        if self.arguments.keys() != set(names):
            odd = ", ".join(sorted(self.arguments.keys() ^ set(names)))
            raise ValueError(f"{kernel.name}: {len(self.arguments)} arguments, {len(names)} parameters: {odd}")
        return [self.arguments[name] for name in names]


@dataclass(frozen=True)
class Tensor:
    """An input or output of an op; `dtype` is "float32", "int8", "int64", or "model": what the model computes in."""

    name: str
    dtype: str

    def kind(self, dtype: str) -> str:
        """Its dtype when the model computes in `dtype`."""
        return dtype if self.dtype == "model" else self.dtype


def named(tensors: Iterable[Tensor], values: Iterable[T]) -> dict[str, T]:
    """Values in the order of tensors -> by their names. ValueError unless there is one for each."""
    return dict(zip((tensor.name for tensor in tensors), values, strict=True))


def in_int8(tensors: Iterable[Tensor], prefix: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What a store in 8 bits changes, of pages or the cache: `tensors` with PREFIX_key and PREFIX_value int8, and those
    that hold the steps of both (how: plugins/cached_attention)."""
    stores = f"{prefix}_key", f"{prefix}_value"
    kept = tuple(replace(tensor, dtype="int8") if tensor.name in stores else tensor for tensor in tensors)
    return kept, tuple(Tensor(f"{store}_scale", "float32") for store in stores)


class Op(ABC):
    """One custom op with its attributes.

    Its tensors are addressed by name: `shapes` holds those of all inputs, `addresses` where all inputs and outputs lie
    on the device. No input of an op has the name of an output.
    """

    name: ClassVar[str]  # the ONNX op type, in the domain "flex"
    attribute_names: ClassVar[tuple[str, ...]]  # integers
    defaults: ClassVar[dict[str, int]] = {}  # of attributes a node may lack
    # An instance may have others than its class: what an attribute changes.
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    in_place: Mapping[str, str] = {}  # output -> the input whose buffer it must share

    def __init__(self, **attributes: int) -> None:
        """One integer for each of `attribute_names` that has no default."""
        attributes = self.defaults | attributes
        if set(attributes) != set(self.attribute_names):
            raise ValueError(f"{self.name}: attributes {sorted(attributes)}, expected {sorted(self.attribute_names)}")
        self.attributes = attributes
        self._kernels: dict[str, tuple[Kernel, ...]] = {}

    @abstractmethod
    def output_shapes(self, shapes: Shapes[Any]) -> dict[str, tuple[Any, ...]]:
        """Each output's dimensions: dimensions of inputs (numbers, or a builder's symbols) and constants."""

    def kernels(self, dtype: str) -> tuple[Kernel, ...]:
        """Every kernel a launch may need when the model computes in `dtype`: `make_kernels`, asked once for each."""
        if dtype not in self._kernels:
            self._kernels[dtype] = self.make_kernels(dtype)
        return self._kernels[dtype]

    @abstractmethod
    def make_kernels(self, dtype: str) -> tuple[Kernel, ...]:
        """What `kernels` returns: it follows from the attributes and `dtype` alone."""

    @abstractmethod
    def workspace(self, dtype: str, shapes: Shapes[int]) -> int:
        """Bytes of scratch memory a call with these (or smaller) shapes needs when the model computes in `dtype`."""

    @abstractmethod
    def launches_of(
        self, kernels: Sequence[Kernel], shapes: Shapes[int], addresses: Mapping[str, int], workspace: int
    ) -> list[Launch]:
        """`launches`, of these kernels: grids and scratch follow from their constants."""

    def launches(
        self,
        dtype: str,
        shapes: Shapes[int],
        addresses: Mapping[str, int],
        workspace: int,
        kernels: Sequence[Kernel] | None = None,
    ) -> list[Launch]:
        """The launches of one call, in order on one stream; `workspace` is a device address, too.

        kernels: those of `kernels`, in that order, as the code at hand has them (Artifacts.on), whose tiles may be
        others.
        """
        return self.launches_of(self.kernels(dtype) if kernels is None else kernels, shapes, addresses, workspace)
