"""What TensorRT-RTX makes of a decoder graph, on a machine without a GPU.

In a process of its own, since the parser can abort it: `python -m tests.engines.rtx_layers GRAPH CONTEXT OUT` writes
JSON to OUT.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).parents[2]
SMS = ("SM86", "SM89", "SM120")
TENSOR = re.compile(r"\{ Name: (?P<name>[^,]+), Dimensions: \[(?P<shape>[-\d,]*)\].*?\}")


@dataclass(frozen=True)
class Tensor:
    """A tensor a built layer reads or writes; a dimension that may vary is -1."""

    name: str
    shape: tuple[int, ...]

    @property
    def fixed_size(self) -> int:
        """Elements; 0 if a dimension may vary."""
        return 0 if -1 in self.shape else math.prod(self.shape)


@dataclass(frozen=True)
class Layer:
    """One layer of the engine."""

    name: str
    kind: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Built:
    """A serialised engine: what the network had, by type, what became of it, bytes and seconds."""

    network: dict[str, int]
    layers: tuple[Layer, ...]
    bytes: int
    seconds: float


def build_with_rtx(graph: Path, context: int) -> Built:
    """Build `graph` in a process of its own; batch 1, 1 .. context steps. AssertionError with its last words."""
    with tempfile.TemporaryDirectory() as folder:
        # The wheel lacks this name, by which its parser opens the library. Until engines.trt.load() mends that.
        library = next(Path(find_spec("tensorrt_rtx_libs").submodule_search_locations[0]).glob("libtensorrt_rtx.so.*"))
        (Path(folder) / "libtensorrt_rtx.so").symlink_to(library)
        out = Path(folder) / "built.json"
        command = [sys.executable, "-m", "tests.engines.rtx_layers", graph, str(context), out]
        environment = {**os.environ, "LD_LIBRARY_PATH": folder}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{result.returncode}: {(result.stdout + result.stderr)[-3000:]}"
        found = json.loads(out.read_text())
    layers = tuple(
        Layer(
            layer["name"],
            layer["kind"],
            *(tuple(Tensor(t["name"], tuple(t["shape"])) for t in layer[key]) for key in ("inputs", "outputs")),
        )
        for layer in found["layers"]
    )
    return Built(found["network"], layers, found["bytes"], found["seconds"])


def layers_of(log: str) -> list[Layer]:
    """The layers of an engine from the builder's verbose log at ProfilingVerbosity.DETAILED."""
    layers = []
    for line in log.splitlines():
        match = re.search(r"Name: (.+?), LayerType: (\w+), Inputs: \[(.*?)\], (?:Constants: .*?)?Outputs: \[(.*)", line)
        if match:
            name, kind, *sides = match.groups()
            tensors = [
                tuple(
                    Tensor(found["name"], tuple(int(size) for size in found["shape"].split(",") if size))
                    for found in TENSOR.finditer(side)
                )
                for side in sides
            ]
            layers.append(Layer(name, kind, *tensors))
    return layers


def _build(graph: str, context: int) -> Built:
    import tensorrt_rtx as trt

    lines: list[str] = []

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, message: str) -> None:
            lines.append(message)

    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(graph):
        sys.exit("\n".join(str(parser.get_error(index)) for index in range(parser.num_errors)))
    kinds = [network.get_layer(index).type.name for index in range(network.num_layers)]
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = len(SMS)
    for index, name in enumerate(SMS):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        least = [1 if size == -1 else size for size in tensor.shape]
        most = [1, context] if tensor.name == "input_ids" else least
        if -1 in tensor.shape:
            profile.set_shape(tensor.name, least, least, most)
    config.add_optimization_profile(profile)
    started = perf_counter()
    plan = builder.build_serialized_network(network, config)
    seconds = perf_counter() - started
    if plan is None:
        sys.exit("\n".join(lines[-5:]))
    return Built(
        {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        tuple(layers_of("\n".join(lines))),
        plan.nbytes,
        seconds,
    )


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(json.dumps(asdict(_build(sys.argv[1], int(sys.argv[2])))))
