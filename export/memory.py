"""How much memory a build will need."""

from __future__ import annotations

from engines.geometry import Geometry
from engines.manifest import PRECISIONS
from export.checkpoint import expected_tensors
from export.quantize import Scheme, quantised_tensors

OVERHEAD = 1_000_000_000  # Python, torch, ONNX Runtime and their work space, bytes


def parity_bytes(g: Geometry, precision: str, scheme: Scheme | None = None) -> int:
    """Bytes the parity check needs: the float32 reference, and the bundle in ONNX Runtime on the CPU, which keeps the
    stored weights and, for reduced precisions, copies of them: float32, or of what is quantised in another order;
    caches and hi-res pages of both."""
    shapes = expected_tensors(g)
    weights = sum(map(_product, shapes.values()))
    quantised = quantised_tensors(g, scheme) if scheme else {}
    integers = sum(2 * scheme.stored_bytes(shape) for shape in quantised.values()) if scheme else 0
    others = weights - sum(map(_product, quantised.values()))
    stored = {"float32": 4, "float16": 2, "bfloat16": 2}[PRECISIONS[precision]]
    copies = 4 if precision == "fp32" else 4 + stored
    pages = 2 * len(g.reading_layers) * g.kv_heads * g.head_dim * g.hires_side**2
    cache = 2 * g.layers * g.kv_heads * g.head_dim * (g.image_tokens + 64)
    return 4 * weights + others * copies + integers + (pages + cache) * 8 + OVERHEAD


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
