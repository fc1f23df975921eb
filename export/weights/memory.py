"""How much memory a build will need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engines.bundle.geometry import Geometry
from engines.bundle.precision import PRECISIONS
from engines.bundle.tensors import tensors_of_parts
from export.checkpoint.folder import expected_tensors
from export.weights.quantize import Scheme, quantised_tensors

SEARCHED = 40_000_000  # floats of pieces of a weight in export/weights/awq.py, tried with one scale or clip
OVERHEAD = 1_000_000_000  # Python, torch, ONNX Runtime and their work space, bytes


def parity_bytes(g: Geometry, precision: str, scheme: Scheme | None = None, calibrated: bool = False) -> int:
    """Bytes the parity check needs: the float32 reference, and the bundle in ONNX Runtime on the CPU, which keeps the
    stored weights and, for reduced precisions, copies of them: float32, or of what is quantised in another order;
    caches and hi-res pages of both. `calibrated`: before that, a second reference in place of the bundle."""
    shapes = expected_tensors(g)
    weights = sum(map(_product, shapes.values()))
    quantised = quantised_tensors(g, scheme) if scheme else {}
    integers = sum(2 * scheme.stored_bytes(shape) for shape in quantised.values()) if scheme else 0
    others = weights - sum(map(_product, quantised.values()))
    stored = {"float32": 4, "float16": 2, "bfloat16": 2}[PRECISIONS[precision]]
    copies = 4 if precision == "fp32" else 4 + stored
    pages = 2 * len(g.reading_layers) * g.kv_heads * g.head_dim * g.hires_side**2
    cache = 2 * g.layers * g.kv_heads * g.head_dim * (g.image_tokens + 64)
    beside = max(others * copies + integers, 4 * weights if calibrated else 0)
    return 4 * weights + beside + (pages + cache) * 8 + OVERHEAD


def calibration_bytes(g: Geometry, scheme: Scheme, pictures: int, lengths: Sequence[int], rows: int) -> int:
    """Bytes that calibration on requests of `lengths` tokens about `pictures` images needs: the vision tower, then the
    embedding, then one decoder layer at a time, in float32; and through all of it the requests between two layers, the
    images' features, `rows` inputs of each linear layer, and how far to clip each block."""
    parts = tensors_of_parts(replace(g, lazy_pages=False))
    layers: dict[str, int] = {}
    for name, shape in {**parts["pages"], **parts["decoder"]}.items():
        key = ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else name
        layers[key] = layers.get(key, 0) + _product(shape)
    vision = sum(map(_product, parts["vision"].values()))
    width = g.heads * g.head_dim
    features = pictures * (1 + g.zoom**2) * g.image_tokens * g.hidden
    between = sum(lengths) * g.hidden + rows * (3 * g.hidden + width + g.intermediate)
    inside = 2 * g.kv_heads * g.head_dim * g.hires_side**2 * 2 + 3 * g.heads * max(lengths) ** 2
    clips = sum(map(_product, quantised_tensors(g, scheme).values())) // scheme.block
    return 4 * (max(vision, *layers.values()) + features + between + inside + SEARCHED) + clips + OVERHEAD


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
