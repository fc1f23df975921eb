"""How much memory TensorRT's builder takes: from the weights of the engines it builds, before any work."""

from __future__ import annotations

from engines.bundle.kinds import PARTS
from engines.sizing.needs import Configuration, engines_of

# Measured: TensorRT-RTX 1.7 on this project's engines and on chains of int8 and int4 products, anonymous memory beside
# the mapped weights: at most 2.15 times the weights of the engine, and what it takes without any.
BUILDER_FACTOR, BUILDER_BASE = 2.15, 400_000_000
# And what the nodes of a decoder layer take of it, each plugin with its kernels: a decoder of 16 layers and 459 MB, in
# engines of 16, 8, 4 and 2 of them (docs/figures.md).
BUILDER_LAYER = 12_000_000
# Read in the parser's source: that of TensorRT before 10.13 copies weights that lie beside a graph.
MAPS_WEIGHTS = (10, 13)


def builder_bytes(part: str, weights: int, *, layers: int = 0, copied: bool = False) -> int:
    """Bytes of memory a TensorRT build of an engine of a part takes, the mapped weights not counted.

    weights: bytes of them; layers: of the part, in it. copied: the weights are not mapped but read (see MAPS_WEIGHTS).
    """
    nodes = layers * BUILDER_LAYER if part == "decoder" else 0
    return int(BUILDER_FACTOR * weights) + BUILDER_BASE + nodes + (weights if copied else 0)


def largest_build(c: Configuration, *, copied: bool) -> int:
    """`builder_bytes` of the engine that takes most: they are built one after the other."""
    engines = ((part, engine) for part in PARTS for engine in engines_of(c, part))
    return max(builder_bytes(part, size, layers=layers, copied=copied) for part, (layers, size) in engines)
