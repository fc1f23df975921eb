"""What a decode step must read and compute, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from engines.bundle.geometry import Geometry


@dataclass(frozen=True)
class Cost:
    """Of one token. Bytes: every weight, key and value a step needs, read once; what an implementation copies on top is
    its own affair. FLOPs: two per multiply-add of the matrix products."""

    bytes: int
    flops: int


def cost(
    g: Geometry,
    keys: int,
    hires_tokens: int,
    *,
    itemsize: int,
    layer_itemsize: float | None = None,
    project_again: bool = False,
) -> Cost:
    """A step at `keys` cached tokens that reads `hires_tokens` projected tokens in every reading layer.

    `layer_itemsize`: bytes of a weight of the layers with its share of a scale, where it is not `itemsize`.
    `project_again`: the official way, where each reading layer first projects those tokens' features again.
    """
    query, kv = g.heads * g.head_dim, g.kv_heads * g.head_dim
    layer = g.hidden * (2 * query + 2 * kv + 3 * g.intermediate)
    weights = g.layers * layer + g.vocab * g.hidden
    saved = 0 if layer_itemsize is None else g.layers * layer * (itemsize - layer_itemsize)
    reads = len(g.reading_layers)
    values = weights + 2 * kv * (g.layers * keys + reads * hires_tokens)
    products = weights + 2 * query * (g.layers * keys + reads * hires_tokens)
    if project_again:
        values += reads * (2 * g.hidden * kv + hires_tokens * g.hidden)  # projection weights, raw features
        products += reads * hires_tokens * 2 * g.hidden * kv
    return Cost(bytes=values * itemsize - round(saved), flops=2 * products)
