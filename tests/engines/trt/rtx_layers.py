"""What a TensorRT-RTX engine consists of, read from the log of its builder: no GPU can be asked."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

TENSOR = re.compile(r"\{ Name: (?P<name>[^,]+), Dimensions: \[(?P<shape>[-\d,]*)\].*?\}")
PLUGIN = re.compile(r"PLUGIN_V3 node_(\w+?)(?:_\d+)?__\d")
ATTENTION = "_gemm_mha"  # the builder's name for one kernel that holds both products and the softmax


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


def log_of(bundle: Path, part: str) -> str:
    """The builder's log, kept beside the bundle (EngineOptions.keep_log)."""
    return bundle.with_name(f"{bundle.name}.{part}.tensorrt-rtx.log").read_text()


def plugins_of(log: str) -> list[str]:
    """The op of every plugin layer: "cached_attention", ..."""
    return PLUGIN.findall(log)


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
