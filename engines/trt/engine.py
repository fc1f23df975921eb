"""One part of a bundle as a deserialised TensorRT engine: its contexts, the shapes it takes, and device arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np

from engines.bundle.folder import Bundle
from engines.bundle.kinds import PLUGIN_FREE, TENSORRT, TENSORRT_RTX, needing_plugins
from engines.bundle.manifest import Plan, Profile
from engines.bundle.rebuild import rebuild
from engines.cuda import Buffer, Cuda, Stream
from engines.errors import BackendError, BundleError, FlexError, KernelError
from engines.sizing.needs import MAX_BATCH
from engines.trt.library import deserialise
from engines.trt.options import RTX_SMS, command, recorded
from plugins.artifacts import Artifacts, with_command
from plugins.compiler.ptxas import SMS
from plugins.op import ITEMSIZE, padded
from plugins.tensorrt import take_error


def rebuild_command(bundle: Bundle, backend: str, *, sm: int | None = None, batch: int | None = None) -> str:
    """The command that builds the engines of an opened bundle again, with the options they had, on the machine that
    runs them. Where the bundle lacks the kernels for that, the one that builds all of it again.

    sm: a GPU that the engines were not built for; batch: rows they were not built for.
    """
    manifest = bundle.manifest
    options, built = recorded(manifest.options.get(backend), backend), manifest.parts["decoder"].plans.get(backend)
    if built is not None:
        options = replace(options, plugins=built.plugins)
    if sm is not None and backend == TENSORRT_RTX and sm not in RTX_SMS:
        return f"TensorRT-RTX has nothing for sm_{sm}: {rebuild_command(bundle, TENSORRT, sm=sm)}"
    if batch is not None:
        options = replace(options, batch=min(batch, MAX_BATCH))
    if sm is not None:
        targets = (*options.sms, *([sm] if sm not in options.sms else [])) if backend == TENSORRT_RTX else None
        options = replace(options, targets=targets)
    if options.plugins and sm is not None and sm not in SMS:
        options = replace(options, plugins=False)
    if not options.plugins:
        if PLUGIN_FREE in manifest.parts["decoder"].graphs:
            return command(bundle.path, options)
        options_of_it = " and ".join(needing_plugins(manifest.geometry))
        return f"open the bundle with backend='onnxruntime': {options_of_it} needs kernels, and there are none"
    missing = set(options.sms if sm is None else (*options.sms, sm)) - set(_kernels_of(bundle))
    if missing or manifest.kernels is None:
        return rebuild(manifest, bundle.path, backend=backend, engines=asdict(options))
    return command(bundle.path, options)


def _kernels_of(bundle: Bundle) -> tuple[int, ...]:
    """The SMs that the bundle holds compiled kernels for."""
    try:
        name = bundle.manifest.kernels
        return Artifacts.read(bundle.file(name)).sms if name else ()
    except KernelError:
        return ()


def plans_of(bundle: Bundle, backend: str) -> dict[str, Plan]:
    """The plan of each part for a backend; BundleError with the build command if the bundle holds none."""
    parts = bundle.manifest.parts
    missing = [name for name, part in parts.items() if backend not in part.plans]
    if missing:
        built = sorted({backend for part in parts.values() for backend in part.plans})
        raise BundleError(
            f"{bundle.path} holds no {backend} engine of its {missing[0]} part",
            expected=f"engines built for {backend}; there are {built or 'none'}",
            fix=rebuild_command(bundle, backend),
        )
    return {name: part.plans[backend] for name, part in parts.items()}


@dataclass(frozen=True)
class DeviceArray:
    """A tensor on the device; `memory` is what keeps it there. dtype: "float32", "float16", "bfloat16", "int8" or
    "int64"."""

    memory: Buffer
    address: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return nbytes(self.shape, self.dtype)

    def rows(self, begin: int, end: int) -> DeviceArray:
        """Its rows, of the first axis, from `begin` to `end`, where they lie; at any address."""
        row = self.nbytes // self.shape[0]
        return DeviceArray(self.memory, self.address + begin * row, (end - begin, *self.shape[1:]), self.dtype)

    def clear(self, stream: Stream) -> None:
        """Zero it, in the order of the stream."""
        self.memory.fill(0, stream, self.address - self.memory.address, self.nbytes)

    def copy(self, other: DeviceArray, stream: Stream) -> None:
        """Take over what an array of the same size holds, in the order of the stream."""
        self.memory.take(other.address, self.nbytes, stream, self.address - self.memory.address)

    def numpy(self, stream: Stream) -> np.ndarray:
        """A copy on the host; bfloat16 becomes float32."""
        raw = np.empty(self.shape, {"bfloat16": np.uint16}.get(self.dtype, self.dtype))
        self.memory.download(raw, stream, self.address - self.memory.address)
        return (raw.astype(np.uint32) << 16).view(np.float32) if self.dtype == "bfloat16" else raw


def nbytes(shape: Iterable[int], dtype: str) -> int:
    """Bytes of a tensor."""
    return int(np.prod(tuple(shape))) * ITEMSIZE[dtype]


def allocate(
    cuda: Cuda, shapes: Mapping[str, tuple[tuple[int, ...], str]], what: str, fix: str | None = None
) -> dict[str, DeviceArray]:
    """Arrays of these (shape, dtype) by name, in one buffer; BackendError when `what`, which they are, does not fit."""
    sizes = [padded(nbytes(shape, dtype)) for shape, dtype in shapes.values()]
    memory, arrays, offset = cuda.buffer(sum(sizes), what, fix), {}, 0
    for (name, (shape, dtype)), size in zip(shapes.items(), sizes, strict=True):
        arrays[name] = DeviceArray(memory, memory.address + offset, tuple(shape), dtype)
        offset += size
    return arrays


def clear(arrays: Iterable[DeviceArray], stream: Stream) -> None:
    """Zero all the memory that arrays lie in, in the order of the stream."""
    for memory in {array.memory for array in arrays}:
        memory.fill(0, stream)


class PartEngine:
    """A part's engine. specs: what it takes and gives, by name."""

    def __init__(self, trt: ModuleType, cuda: Cuda, bundle: Bundle, part: str, backend: str, plan: Plan) -> None:
        """Deserialise the plan. BackendError when it does not fit this TensorRT, GPU or bundle, or is damaged."""
        self.part, self.plan = part, plan
        self._trt, self._bundle, self._backend = trt, bundle, backend
        self._foreign_sm = None if cuda.sm in plan.sms else cuda.sm
        self._engine = deserialise(trt, bundle.file(plan.file), plan, cuda.sm, rebuild=self._rebuild)
        self.specs = {spec.name: spec for spec in (*plan.inputs, *plan.outputs)}
        found = {self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)}
        if found != set(self.specs):
            odd = sorted(found ^ set(self.specs))[0]
            raise BackendError(f"{plan.file} and its manifest disagree on the tensor {odd}", fix=self._rebuild())
        self._runtime_cache: Any = None

    def _rebuild(self) -> str:
        """The command that builds it again. For an error only: it reads the bundle's kernels."""
        return rebuild_command(self._bundle, self._backend, sm=self._foreign_sm)

    @property
    def scratch(self) -> int:
        """Bytes of device memory a run needs beside its inputs and outputs."""
        return int(self._engine.device_memory_size_v2)

    def profile(self, **sizes: int) -> int:
        """The first profile that admits these sizes of symbols; BackendError when none does."""
        for index, profile in enumerate(self.plan.profiles):
            if not _outside(profile, sizes):
                return index
        symbol, size = _outside(self.plan.profiles[-1], sizes)[0]
        least, most = self.limits(symbol)
        larger = "ask for less at once"
        if symbol == "batch" and size <= MAX_BATCH:
            larger += f", or build it larger: {rebuild_command(self._bundle, self._backend, batch=size)}"
        raise BackendError(
            f"the {self.part} engine for {symbol} = {size}",
            expected=f"{least} .. {most}, which it was built for",
            fix=larger,
        )

    def limits(self, symbol: str) -> tuple[int, int]:
        """The smallest and the largest size of a symbol over all profiles."""
        sizes = [profile.sizes[symbol] for profile in self.plan.profiles]
        return min(size[0] for size in sizes), max(size[2] for size in sizes)

    def context(
        self, profile: int, scratch: Buffer, stream: Stream, *, offset: int = 0, one_shape: bool = False
    ) -> Context:
        """A new context for one profile that works in `scratch` from `offset` on, which no two runs may use at the same
        time.

        `one_shape`: its inputs never change their shapes, so that kernels made for these are worth their while.
        """
        settings = self._settings(one_shape)
        made = self._engine.create_execution_context(settings)
        if made is None:
            raise self.error("no execution context could be made")
        try:  # before its memory, of which it may need more or less than for the profile it was made with
            chosen = made.set_optimization_profile_async(profile, int(stream))
        except RuntimeError as error:
            raise self.error(f"profile {profile} could not be chosen: {error}") from error
        if not chosen:
            raise self.error(f"profile {profile} could not be chosen")
        made.set_device_memory(scratch.address + offset, scratch.size - offset)
        return Context(self, made, settings)

    def error(self, what: str) -> FlexError:
        """What a plugin says went wrong, if it is that which failed; else BackendError for `what` in this engine."""
        cause, where = take_error(self._trt), f"TensorRT, {self.part} part"
        if isinstance(cause, FlexError):  # which part, no plugin knows
            again = self._rebuild()
            return with_command(cause, again, where) if cause.fix else cause.within(where, fix=again)
        reason = f" ({cause!r})" if cause else ""
        return BackendError(f"{where}: {what}{reason}", fix=self._rebuild())

    def _settings(self, one_shape: bool) -> Any:
        """How contexts are made: with scratch memory of ours, and in TensorRT-RTX, which compiles for the GPU as it
        makes them, sharing what is compiled, and with kernels of their own only for shapes that stay."""
        trt, own_memory = self._trt, self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(self._engine, "create_runtime_config"):  # TensorRT before 10.11
            return own_memory
        settings = self._engine.create_runtime_config()
        settings.set_execution_context_allocation_strategy(own_memory)
        if hasattr(settings, "create_runtime_cache"):  # TensorRT-RTX
            self._runtime_cache = self._runtime_cache or settings.create_runtime_cache()
            settings.set_runtime_cache(self._runtime_cache)
            strategies = trt.DynamicShapesKernelSpecializationStrategy
            settings.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER if one_shape else strategies.NONE
        return settings


class Context:
    """Addresses and shapes for runs of one engine with one profile."""

    def __init__(self, engine: PartEngine, context: Any, settings: Any) -> None:
        """`settings`: what `context` was made with. TensorRT leaves them to the caller, for as long as the context."""
        self._part, self._context, self._settings = engine, context, settings

    def bind(self, name: str, address: int, shape: tuple[int, ...]) -> None:
        """Where a tensor lies; the shape matters for inputs."""
        spec = self._part.specs[name]
        if spec in self._part.plan.inputs and not self._context.set_input_shape(name, shape):
            raise self._part.error(f"{name} cannot have the shape {list(shape)}")
        if not self._context.set_tensor_address(name, address):
            raise self._part.error(f"{name} cannot be at {address:#x}")

    def enqueue(self, stream: Stream) -> None:
        """Ask for one run; does not wait."""
        if not self._context.execute_async_v3(int(stream)):
            raise self._part.error("the run failed")

    def capturable(self, stream: Stream) -> bool:
        """Whether a run can be recorded in a graph: TensorRT-RTX may still have to compile kernels."""
        return not hasattr(self._context, "is_stream_capturable") or self._context.is_stream_capturable(int(stream))


def _outside(profile: Profile, sizes: Mapping[str, int]) -> list[tuple[str, int]]:
    return [
        (symbol, size)
        for symbol, size in sizes.items()
        if not profile.sizes[symbol][0] <= size <= profile.sizes[symbol][2]
    ]
