"""TensorRT and TensorRT-RTX: the only file that imports either. Their Python APIs are the same but for what is here.

Polygraphy has loaders for these steps, but it picks one of the two modules per process, by an environment variable, and
hides the parser's and the builder's messages in a log of its own; here the bundle picks, and messages become errors.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import mmap
import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import Any

from engines.bundle.kinds import TENSORRT, TENSORRT_RTX
from engines.bundle.manifest import Plan
from engines.errors import BackendError, FlexError
from engines.sizing.builder import MAPS_WEIGHTS
from plugins.registry import OPS
from plugins.tensorrt import NAMESPACE, take_error

MODULES = {TENSORRT: "tensorrt", TENSORRT_RTX: "tensorrt_rtx"}
INSTALL = {
    TENSORRT: "pip install tensorrt (on a Jetson it is part of JetPack: sudo apt install nvidia-jetpack)",
    TENSORRT_RTX: "pip install tensorrt-rtx",
}
PLUGIN_FREE_SINCE = (10, 15)  # TensorScatter and RotaryEmbedding, which the graph without plugins consists of
OLDEST = (10, 1)  # plugins written in Python, strongly typed networks, scratch memory of the caller


def load(backend: str) -> ModuleType:
    """The module of a backend, "tensorrt" or "tensorrt-rtx". BackendError when it is missing, broken or too old."""
    try:
        trt = importlib.import_module(MODULES[backend])
        version = trt.__version__
    except ModuleNotFoundError as error:
        raise BackendError(f"{backend} is not installed ({error})", fix=INSTALL[backend]) from None
    except Exception as error:  # a shared library that is missing or does not fit; broken packages have no __version__
        raise BackendError(f"{backend} does not load: {error}", fix=INSTALL[backend]) from error
    if backend == TENSORRT and _version(trt) < OLDEST:
        raise BackendError(
            f"TensorRT {version}", expected="TensorRT {}.{} or newer".format(*OLDEST), fix=INSTALL[backend]
        )
    return trt


def _version(trt: ModuleType) -> tuple[int, ...]:
    return tuple(map(int, trt.__version__.split(".")[:2]))


def maps_weights(backend: str) -> bool:
    """Whether the installed parser maps the weights beside a graph, or copies them. BackendError: see `load`."""
    return backend != TENSORRT or _version(load(backend)) >= MAPS_WEIGHTS


def require_operators(backend: str, *, plugins: bool) -> None:
    """BackendError when the installed TensorRT lacks operators of the decoder without plugins, or see `load`."""
    trt = load(backend)
    if backend == TENSORRT and not plugins and _version(trt) < PLUGIN_FREE_SINCE:
        raise BackendError(
            f"a decoder without plugins with TensorRT {trt.__version__}",
            expected="TensorRT {}.{} or newer (on a Jetson JetPack 7.2), for TensorScatter and RotaryEmbedding".format(
                *PLUGIN_FREE_SINCE
            ),
            fix="leave out --no-plugins",
        )


def cuda_version(backend: str) -> str:
    """The CUDA version that the installed TensorRT was made for, "13" or "12.6"; "unknown" if nothing says so."""
    pattern = re.compile(rf"{MODULES[backend]}[-_]cu(\d+)")
    for distribution in distributions():
        if match := pattern.fullmatch((distribution.metadata["Name"] or "").lower()):
            return match[1]
    try:  # JetPack and Debian packages: the CUDA they came with
        return str(json.loads(Path("/usr/local/cuda/version.json").read_text())["cuda"]["version"])
    except (OSError, ValueError, LookupError, TypeError):
        return "unknown"


def make_logger(trt: ModuleType, write: Callable[[str], object] | None = None) -> Any:
    """An ILogger that keeps the text of errors in `.errors` and hands every line to `write`."""

    base: Any = trt.ILogger

    class Logger(base):  # type: ignore[misc]  # the library is loaded by name: its classes have no types
        def __init__(self) -> None:
            base.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)
            if write:
                write(f"{severity.name}: {message}")

    return Logger()


def parse(trt: ModuleType, logger: Any, builder: Any, graph: Path, *, rebuild: str) -> tuple[Any, Any]:
    """A strongly typed network of an .onnx file, whose weights lie in the current folder, and the parser, which must
    live as long as the network.

    Raises BackendError with the parser's first error and its node; `rebuild` is the command that makes the graph anew.
    """
    _require_library_name(trt)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # later versions know no other networks
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    try:
        model = graph.read_bytes()
    except OSError as error:
        raise BackendError(f"TensorRT cannot read {graph}: {error.strerror}", fix=rebuild) from error
    # With a path, so that the weights beside it are found, and mapped instead of read.
    if not parser.parse(model, graph.name):
        _raise_error_of_plugin(trt)
        raise _parse_error(
            graph, [parser.get_error(index) for index in range(parser.num_errors)], logger.errors, rebuild
        )
    return network, parser


def _parse_error(graph: Path, errors: Sequence[Any], messages: Sequence[str], rebuild: str) -> BackendError:
    if not errors:
        why = messages[0] if messages else "it says no reason"
        return BackendError(f"TensorRT cannot read {graph}: {why}", fix=rebuild)
    first = errors[0]
    node, operator = first.node_name() or f"node {first.node()}", first.node_operator()
    found = f"TensorRT cannot parse {graph}: {node} ({operator or 'the file itself'}): {first.desc().strip()}"
    if operator in OPS and ("plugin" in first.desc().lower() or "checkFallbackPluginImporter" in (first.func() or "")):
        return BackendError(
            f"{found}\n  {NAMESPACE}::{operator} is one of this project's plugins, and they are not registered",
            fix="call plugins.tensorrt.register(trt, artifacts=...) before parsing, or build with --no-plugins",
        )
    others = f" (and {len(errors) - 1} more errors)" if len(errors) > 1 else ""
    return BackendError(found + others, fix=rebuild)


def _require_library_name(trt: ModuleType) -> None:
    """The wheel of TensorRT-RTX lacks a link by whose name its parser opens the library, and dies without: make it."""
    specification = importlib.util.find_spec("tensorrt_rtx_libs") if trt.__name__ == "tensorrt_rtx" else None
    if specification is None or not sys.platform.startswith("linux"):
        return
    for folder in map(Path, specification.submodule_search_locations or ()):
        link = folder / "libtensorrt_rtx.so"
        library = next(iter(sorted(folder.glob("libtensorrt_rtx.so.*"))), None)
        if library is None or link.exists():
            continue
        try:
            link.unlink(missing_ok=True)  # a dangling one
            link.symlink_to(library.name)
        except FileExistsError:  # another process was faster
            pass
        except OSError as error:
            raise BackendError(
                f"{folder} has no {link.name}, which the ONNX parser of TensorRT-RTX opens ({error.strerror})",
                fix=f"sudo ln -s {library.name} {link}",
            ) from error


def build(trt: ModuleType, logger: Any, builder: Any, network: Any, config: Any) -> Any:
    """The serialised engine (a buffer); BackendError with what the builder, or a plugin in it, said."""
    plan = builder.build_serialized_network(network, config)
    _raise_error_of_plugin(trt)
    if plan is None:
        why = "\n  ".join(logger.errors[-3:]) or "it says no reason"
        memory = re.search(r"out ?of ?memory|bad_alloc", why, re.IGNORECASE)
        raise BackendError(
            f"TensorRT built no engine:\n  {why}",
            fix="close programs, add --workspace with fewer MiB, or build the bundle again with a smaller --context"
            if memory
            else None,
        )
    return plan


def deserialise(trt: ModuleType, path: Path, plan: Plan, sm: int, *, rebuild: Callable[[], str]) -> Any:
    """The engine in `path` (an ICudaEngine) for the GPU of this process, whose SM is `sm`.

    Raises BackendError, which gives the command that `rebuild` makes: another version or GPU than it was built for,
    damaged bytes.
    """
    require_fit(trt, path, plan, sm, rebuild=rebuild)
    logger = make_logger(trt)
    try:  # mapped, not read: on a Jetson a copy of the plan would take the memory that the engine needs
        size = path.stat().st_size
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except OSError as error:
        raise BackendError(f"{path} cannot be read: {error.strerror}", fix=rebuild()) from error
    engine = trt.Runtime(logger).deserialize_cuda_engine(data) if size else None
    _raise_error_of_plugin(trt)
    if engine is None:
        why = logger.errors[0] if logger.errors else f"it holds {size} bytes"
        raise BackendError(f"TensorRT cannot open {path}: {why}", expected="a whole, unchanged engine", fix=rebuild())
    return engine


def require_fit(trt: ModuleType, path: Path, plan: Plan, sm: int, *, rebuild: Callable[[], str]) -> None:
    """BackendError unless this TensorRT and a GPU of this SM open the plan."""
    if trt.__version__ != plan.tensorrt:
        raise BackendError(
            f"{path} was built by {trt.__name__} {plan.tensorrt}, installed is {trt.__version__}",
            expected="the same version: no other opens an engine",
            fix=rebuild(),
        )
    if sm not in plan.sms:
        built = ", ".join(f"sm_{number}" for number in plan.sms)
        raise BackendError(f"{path} was built for {built}, this GPU is sm_{sm}", fix=rebuild())


def _raise_error_of_plugin(trt: ModuleType) -> None:
    error = take_error(trt)
    if error is None:
        return
    if isinstance(error, FlexError):
        raise error
    raise BackendError(f"plugin: {error!r}") from error
