"""What a whole request costs in each way of answering, counted from the graphs."""

from __future__ import annotations

from dataclasses import dataclass

from engines.bundle.geometry import Geometry
from engines.bundle.pages import page_size
from tests.bench.contenders.graphs import Graph, Run, Work

WAYS = {
    "low": "low-res only",
    "eager": "ours, eager",
    "lazy": "ours, lazy",
    "official": "the official way",
    "exhaustive": "all hi-res tokens in the sequence",
}


@dataclass(frozen=True)
class Graphs:
    """The traced graphs that answers are made of."""

    geometry: Geometry
    vision: Graph
    pages: Graph  # projects every page
    layout: Graph  # prepares the projection page by page
    decoder: Graph  # projects pages lazily; with no new page it is the eager one


def work(graphs: Graphs, way: str, budget: int, *, prompt: int, answer: int) -> Work:
    """A request whose prompt has `prompt` tokens, the low-res image included, and whose answer has `answer` tokens:
    vision, projection, the prompt without its last token, one step for each token of the answer.

    A step reads `budget` pages in each layer. "lazy" at its worst: each step selects pages that none before it did,
    until there are no others.
    """
    g = graphs.geometry
    total = graphs.vision.work(Run(tiles=1 if way == "low" else 1 + g.zoom**2))
    if way == "eager":
        total += graphs.pages.work(Run())
    elif way in ("lazy", "official"):
        total += graphs.layout.work(Run())
    past = prompt - 1 + (g.hires_side**2 if way == "exhaustive" else 0)
    total += graphs.decoder.work(Run(steps=past))
    for step in range(answer):
        left = max(0, min(budget, g.pages - step * budget))
        new = {"lazy": left, "official": budget}.get(way, 0)
        total += graphs.decoder.work(Run(past=past + step, read=budget, new=new))
    return total


def held(graphs: Graphs, way: str, *, prompt: int, answer: int, itemsize: int) -> int:
    """Bytes of weights, cache and hi-res pages (or features) during that request; activations not counted."""
    g = graphs.geometry
    tokens = prompt + answer + (g.hires_side**2 if way == "exhaustive" else 0)
    total = graphs.vision.weights() + graphs.decoder.weights(hires=way in ("eager", "lazy", "official"))
    total += 2 * g.layers * g.kv_heads * g.head_dim * tokens * itemsize
    slots = g.pages * page_size(g)
    if way in ("eager", "lazy"):
        total += 2 * len(g.reading_layers) * g.kv_heads * g.head_dim * slots * itemsize
    if way in ("lazy", "official"):
        total += slots * (g.hidden * itemsize + g.head_dim * 4)
    return total
