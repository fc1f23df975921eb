"""The benchmark at a glance: a picture of what was measured and what was computed. Needs the extra "bench"."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from tests.bench.contenders.requests import WAYS, Graphs, work

COLOURS = {"low": "#7f7f7f", "eager": "#6baed6", "lazy": "#08519c", "official": "#d95f02", "exhaustive": "#7b3294"}
DRAWN = (("low", 0), ("eager", 16), ("lazy", 16), ("official", 16), ("official", 81), ("exhaustive", 0))
LONGEST = 64  # answer tokens


class Measured(Protocol):
    """What is drawn of a row of tests/bench/compare.py."""

    way: str
    pages: int
    first: float
    long: float


def label(way: str, pages: int) -> str:
    """Name of a line or bar."""
    return WAYS[way].replace("tokens in", "tokens\nin") + (f", {pages} pages" if pages else "")


def plot(rows: Sequence[Measured], graphs: Graphs, path: Path, captions: Sequence[str], text: int) -> None:
    """Write a PNG: left, seconds of a measured request; right, TFLOP of a request by the graphs, by answer length.

    `captions`: of what was measured, of what was computed. `text`: prompt tokens around the image.
    """
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.8), width_ratios=(1.15, 1), layout="constrained")
    _bars(left, rows)
    _lines(right, graphs, graphs.geometry.image_tokens + text)
    for axes, caption in zip((left, right), captions, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        note = textwrap.fill(caption, 84)
        axes.annotate(note, (0, 0), (0, -46), "axes fraction", "offset points", fontsize=7, va="top")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)


def _bars(axes: Axes, rows: Sequence[Measured]) -> None:
    place = np.arange(len(rows))
    first, whole = np.array([row.first for row in rows]), np.array([row.long for row in rows])
    colours = [COLOURS[row.way] for row in rows]
    axes.barh(place, first, color=colours, hatch="////", edgecolor="white", linewidth=0)
    axes.barh(place, whole - first, left=first, color=colours)
    for at, row in zip(place, rows, strict=True):
        axes.text(row.long, at, f" {row.first:.1f} + {row.long - row.first:.1f} s", va="center", fontsize=8)
    axes.set_yticks(place, [label(row.way, row.pages) for row in rows], fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * whole.max())
    axes.set_xlabel(f"seconds: first token (hatched) + {LONGEST - 1} more tokens")
    axes.set_title("Measured: a model of middle size", loc="left", fontsize=10.5)


def _lines(axes: Axes, graphs: Graphs, prompt: int) -> None:
    tokens = np.array([1, 2, 4, 8, 16, 32, LONGEST])
    ends = []
    for way, pages in DRAWN:
        flops = [work(graphs, way, pages, prompt=prompt, answer=int(answer)).flops / 1e12 for answer in tokens]
        axes.plot(tokens, flops, color=COLOURS[way], marker="o", markersize=3, linestyle="-" if pages != 81 else "--")
        ends.append((flops[-1], label(way, pages), COLOURS[way]))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(tokens, [str(answer) for answer in tokens])
    axes.set_xlabel("answer tokens")
    axes.set_ylabel("TFLOP of the whole request")
    axes.set_title("Computed from the graphs: LLaVA-1.5-7B-FlexAttention", loc="left", fontsize=10.5)
    axes.grid(axis="y", which="both", color="0.92")
    low, high = axes.get_ylim()
    gap, last = (high / low) ** 0.055, 0.0
    for value, name, colour in sorted(ends):
        last = max(value, last * gap)
        axes.text(tokens[-1] * 1.12, last, name, color=colour, fontsize=8.5, va="center")
    axes.set_xlim(tokens[0] * 0.9, tokens[-1] * 1.05)
