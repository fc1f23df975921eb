"""Triton's interpreter (3.9) as a checker: mends what it computes wrongly without a word, and watches memory.

Mended: bfloat16 arithmetic (Triton would add raw bits), rounding to bfloat16 (it truncates; a GPU rounds to nearest
even), float32 dots at the default precision (it computes in full; a GPU rounds the operands to TF32), comparisons
(their result has the type of the operands, which breaks broadcasting).

Import this module before anything else imports triton: functions are decorated for the interpreter or for the compiler.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np

os.environ["TRITON_INTERPRET"] = "1"

import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle, interpreter_builder

from tests.emulator.memory import Memory

if not isinstance(tl.standard.sum, InterpretedFunction):
    raise ImportError("triton was imported for the compiler before: set TRITON_INTERPRET=1 when the process starts")


class RaceError(Exception):
    """Two programs of one launch touch one address, and at least one of them writes: their order is undefined."""


class Watch:
    """What the programs of one launch do to memory."""

    def __init__(self, memory: Memory, kernel: str) -> None:
        self.memory, self.kernel = memory, kernel
        self._programs: list[tuple[int, int, int]] = []
        self._loads: list[np.ndarray] = []  # per program: the addresses, each once
        self._stores: list[np.ndarray] = []
        self._loading: list[np.ndarray] = []
        self._storing: list[np.ndarray] = []

    def load(self, addresses: np.ndarray, size: int) -> None:
        """Note the elements of `size` bytes the current program loads."""
        self.memory.check_all(addresses, size, f"{self.kernel}: a load")
        self._loading.append(addresses)

    def store(self, addresses: np.ndarray, size: int) -> None:
        """Note the elements of `size` bytes the current program stores."""
        self.memory.check_all(addresses, size, f"{self.kernel}: a store")
        if len(np.unique(addresses)) != len(addresses):
            raise RaceError(f"{self.kernel}: one store writes an address twice")
        self._storing.append(addresses)

    def finish_program(self, program: tuple[int, int, int]) -> None:
        """The loads and stores since the last call were those of `program`."""
        self._programs.append(program)
        self._loads.append(_unique(self._loading))
        self._stores.append(_unique(self._storing))
        self._loading, self._storing = [], []

    def finish_launch(self) -> None:
        """RaceError if two programs interfered."""
        written = np.concatenate(self._stores)
        owner = np.repeat(np.arange(len(self._stores)), [len(each) for each in self._stores])
        order = np.argsort(written, kind="stable")
        written, owner = written[order], owner[order]
        twice = np.flatnonzero(written[1:] == written[:-1])
        if len(twice):
            first, second = (self._programs[owner[twice[0] + step]] for step in (0, 1))
            raise RaceError(f"{self.kernel}: programs {first} and {second} both write {int(written[twice[0]]):#x}")
        if not len(written):
            return
        for index, loads in enumerate(self._loads):
            place = np.minimum(np.searchsorted(written, loads), len(written) - 1)
            foreign = (written[place] == loads) & (owner[place] != index)
            if foreign.any():
                at = place[np.argmax(foreign)]
                raise RaceError(
                    f"{self.kernel}: program {self._programs[index]} reads {int(written[at]):#x}, which program "
                    f"{self._programs[owner[at]]} writes"
                )


def _unique(parts: list[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.uint64)


def to_float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as raw uint16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 as raw uint16, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


# Builder methods: of these, bfloat16 operands are widened and a bfloat16 result is rounded,
_ARITHMETIC = (
    "fadd", "fmul", "fdiv", "frem", "fsub", "fneg", "precise_divf", "approx_divf", "minimumf", "minnumf", "maximumf",
    "maxnumf", "clampf", "fma", "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "precise_sqrt", "sin", "cos", "floor",
    "ceil", "erf",
)  # fmt: skip
# these yield truth values,
_COMPARISONS = tuple(f"fcmp{order}{kind}" for order in "OU" for kind in ("LT", "GT", "LE", "GE", "EQ", "NE"))
_COMPARISONS += tuple(f"icmp{kind}" for kind in ("SLT", "SGT", "SLE", "SGE", "ULT", "UGT", "ULE", "UGE", "EQ", "NE"))
# and these escape the checks.
_FORBIDDEN = ("atomic_rmw", "atomic_cas", "atomic_poll", "atomic_store", "dot_scaled")


def _is_bfloat16(handle: object) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _widened(handle: object) -> object:
    return TensorHandle(to_float32(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _arithmetic(original: Callable) -> Callable:
    def compute(*handles: object) -> TensorHandle:
        if not any(map(_is_bfloat16, handles)):
            return original(*handles)
        return TensorHandle(to_bfloat16(original(*map(_widened, handles)).data), tl.bfloat16)

    return compute


def _comparison(original: Callable) -> Callable:
    return lambda left, right: TensorHandle(original(_widened(left), _widened(right)).data, tl.int1)


def _cast(original: Callable) -> Callable:
    def cast(source: TensorHandle, kind: tl.dtype, *rest: object) -> TensorHandle:
        if kind.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            return TensorHandle(to_bfloat16(source.data.astype(np.float32)), tl.bfloat16)
        if _is_bfloat16(source) and kind.scalar != tl.bfloat16:
            source = _widened(source)
            if kind.scalar == tl.float32:
                return source
        return original(source, kind, *rest)

    return cast


def _dot(a: TensorHandle, b: TensorHandle, start: TensorHandle, precision: object, _: object) -> TensorHandle:
    left, right = (_widened(handle).data for handle in (a, b))
    full = precision == triton_interpreter._ir.INPUT_PRECISION.IEEE
    if left.dtype == right.dtype == np.float32 and not (full or _is_bfloat16(a)):
        left, right = map(triton_interpreter._round_f32_to_tf32, (left, right))
    product = np.matmul(left.astype(np.float32), right.astype(np.float32))
    return TensorHandle((product + start.data).astype(start.data.dtype), start.dtype.scalar)


def _forbidden(original: Callable) -> Callable:
    def refuse(*_: object) -> None:
        raise NotImplementedError(f"{original.__name__}: the checks here do not see what it does to memory")

    return refuse


def _memory_operations(watch: Watch) -> dict[str, Callable]:
    load, store = (getattr(type(interpreter_builder), f"create_masked_{name}") for name in ("load", "store"))

    def size(pointers: TensorHandle) -> int:
        return max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    def masked(pointers: TensorHandle, mask: TensorHandle) -> np.ndarray:
        return pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]

    def watched_load(pointers, mask, other, policy, volatile):
        watch.load(masked(pointers, mask), size(pointers))
        return load(interpreter_builder, pointers, mask, other, policy, volatile)

    def watched_store(pointers, value, mask, policy):
        watch.store(masked(pointers, mask), size(pointers))
        return store(interpreter_builder, pointers, value, mask, policy)

    return {"create_masked_load": watched_load, "create_masked_store": watched_store}


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Within the block, Triton functions compute as described above and report their memory accesses to `watch`."""
    builder = interpreter_builder
    kinds = (_ARITHMETIC, _arithmetic), (_COMPARISONS, _comparison), (_FORBIDDEN, _forbidden)
    names = [(f"create_{name}", mend) for names, mend in kinds for name in names]
    changes = {name: mend(getattr(builder, name)) for name, mend in names}
    changes |= {"create_dot": _dot, "cast_impl": _cast(builder.cast_impl), **_memory_operations(watch)}
    call = InterpretedFunction.__call__
    # Patched once for all: the interpreter would patch again at each call of a function within a kernel.
    scope = triton_interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    try:
        InterpretedFunction.__call__ = lambda self, *args, **named: self.rewrite()(*args, **named)
        for name, change in changes.items():
            setattr(builder, name, change)
        yield
    finally:
        for name in changes:
            builder.__dict__.pop(name, None)
        InterpretedFunction.__call__ = call
        scope.restore()
