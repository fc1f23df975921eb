"""Run kernels on the CPU, over host memory, as a GPU would be asked to: `run` for launches, `call` for a whole op.

Checked on the way: alignment, every load and store within an allocation, no two programs of a launch interfering.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from plugins.op import Kernel, Launch, Op
from tests.emulator.memory import Memory, aligned, aligned_copy
from tests.emulator.triton_cpu import InterpretedFunction, TensorHandle, Watch, interpreter_builder, tl, watched

# bfloat16 is held as its bits.
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int8": np.int8, "int64": np.int64}


def run(launches: Sequence[Launch], memory: Memory | Iterable[np.ndarray]) -> None:
    """Execute the launches in order; arguments that are addresses point into `memory` (or into these arrays).

    Raises MemoryFault, RaceError, ValueError for a launch that a driver would refuse, or what the kernel raises.
    """
    if not isinstance(memory, Memory):
        arrays, memory = memory, Memory()
        for index, array in enumerate(arrays):
            memory.add(array, f"array {index}")
    for launch in launches:
        _run(launch, memory)


def call(op: Op, dtype: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What `op` makes of `inputs`, both by name (bfloat16 as uint16 bits), when the model computes in `dtype`.

    Inputs are copied first; outputs that share the buffer of an input are that copy, updated. Everything else an op
    writes, its scratch memory too, is NaN beforehand.
    """
    memory = Memory()
    for tensor in op.inputs:
        kind, found = np.dtype(NUMPY[tensor.kind(dtype)]), inputs[tensor.name].dtype
        if found != kind:
            raise ValueError(f"{op.name}: {tensor.name} is {found}, expected {kind}")
    given = {tensor.name: aligned_copy(inputs[tensor.name]) for tensor in op.inputs}
    shapes = {name: array.shape for name, array in given.items()}
    made = op.output_shapes(shapes)
    results = {
        tensor.name: given[op.in_place[tensor.name]]
        if tensor.name in op.in_place
        else aligned(made[tensor.name], NUMPY[tensor.kind(dtype)])
        for tensor in op.outputs
    }
    addresses = {name: memory.add(array, name) for name, array in (given | results).items()}
    scratch = memory.add(aligned(op.workspace(dtype, shapes), np.uint8), "workspace")
    run(op.launches(dtype, shapes, addresses, scratch), memory)
    return results


def function_of(kernel: Kernel) -> InterpretedFunction:
    """The Triton function of a kernel; ValueError unless its parameters are those the launcher will pass, by name."""
    module, name = kernel.function.split(":")
    function = getattr(importlib.import_module(module), name)
    if not isinstance(function, InterpretedFunction):
        raise ImportError(f"{kernel.function} was imported for the compiler: set TRITON_INTERPRET=1")
    declared = function.fn.__annotations__
    constant = [each for each in function.arg_names if "constexpr" in str(declared.get(each, ""))]
    passed = [each for each in function.arg_names if each not in (*constant, *kernel.absent)]
    if sorted(passed) != sorted(each for each, _ in kernel.parameters):
        raise ValueError(f"{kernel.name}: parameters {[each for each, _ in kernel.parameters]}, function has {passed}")
    if sorted(constant) != sorted(each for each, _ in kernel.constants):
        raise ValueError(f"{kernel.name}: constants {[each for each, _ in kernel.constants]}, function has {constant}")
    return function


def _argument(kernel: Kernel, name: str, kind: str, value: int) -> object:
    dtype = tl.str_to_ty(kind, None)
    if kind == "i32":
        if not -(2**31) <= value < 2**31:
            raise ValueError(f"{kernel.name}: {name}={value} is no 32-bit integer")
        return tl.tensor(TensorHandle(np.array([value], np.int32), dtype), dtype)
    if value % 16:
        raise ValueError(f"{kernel.name}: {name} at {value:#x} is not aligned to 16 bytes")
    return tl.tensor(TensorHandle(np.array([value], np.uint64), dtype), dtype)


def _run(launch: Launch, memory: Memory) -> None:
    kernel = launch.kernel
    function = function_of(kernel)
    if not all(0 < size <= limit for size, limit in zip(launch.grid, (2**31 - 1, 65535, 65535), strict=True)):
        raise ValueError(f"{kernel.name}: a grid of {launch.grid}")
    arguments: dict[str, object] = dict(kernel.constants) | dict.fromkeys(kernel.absent)
    for (name, kind), value in zip(kernel.parameters, launch.ordered(kernel), strict=True):
        arguments[name] = _argument(kernel, name, kind, value)
    body = function.rewrite()
    watch = Watch(memory, kernel.name)
    interpreter_builder.set_grid_dim(*launch.grid)
    with watched(watch):
        for program in itertools.product(*map(range, launch.grid)):
            interpreter_builder.set_grid_idx(*program)
            body(**arguments)
            watch.finish_program(program)
    watch.finish_launch()
