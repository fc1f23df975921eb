"""How much memory a build will need."""

from __future__ import annotations

from engines.geometry import Geometry
from engines.manifest import PRECISIONS
from export.checkpoint import expected_tensors

OVERHEAD = 1_000_000_000  # Python, torch, ONNX Runtime and their work space, bytes


def parity_bytes(g: Geometry, precision: str) -> int:
    """Bytes the parity check needs: the float32 reference, and the bundle in ONNX Runtime on the CPU, which keeps the
    stored weights and, for reduced precisions, float32 copies of them; caches and hi-res pages of both."""
    weights = sum(_product(shape) for shape in expected_tensors(g).values())
    stored = {"float32": 4, "float16": 2, "bfloat16": 2}[PRECISIONS[precision]]
    copies = 4 if precision == "fp32" else 4 + stored
    pages = 2 * len(g.reading_layers) * g.kv_heads * g.head_dim * g.hires_side**2
    cache = 2 * g.layers * g.kv_heads * g.head_dim * (g.image_tokens + 64)
    return weights * (4 + copies) + (pages + cache) * 8 + OVERHEAD


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
