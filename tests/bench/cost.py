"""What a decode step must read and compute, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from engines.geometry import Geometry


@dataclass(frozen=True)
class Cost:
    """Of one token. Bytes: every weight, key and value a step needs, read once; what an implementation copies on top is
    its own affair. FLOPs: two per multiply-add of the matrix products."""

    bytes: int
    flops: int


def cost(g: Geometry, keys: int, hires_tokens: int, *, itemsize: int, project_again: bool = False) -> Cost:
    """A step at `keys` cached tokens that reads `hires_tokens` projected tokens in every reading layer.

    `project_again`: the official way, where each reading layer first projects those tokens' features again.
    """
    query, kv = g.heads * g.head_dim, g.kv_heads * g.head_dim
    layer = g.hidden * (2 * query + 2 * kv + 3 * g.intermediate)
    weights = g.layers * layer + g.vocab * g.hidden
    reads = len(g.reading_layers)
    values = weights + 2 * kv * (g.layers * keys + reads * hires_tokens)
    products = weights + 2 * query * (g.layers * keys + reads * hires_tokens)
    if project_again:
        values += reads * (2 * g.hidden * kv + hires_tokens * g.hidden)  # projection weights, raw features
        products += reads * hires_tokens * 2 * g.hidden * kv
    return Cost(bytes=values * itemsize, flops=2 * products)
