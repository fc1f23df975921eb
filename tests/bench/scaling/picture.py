"""The picture: seconds to an answer as more is asked, and how much can be asked of how many replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes

COLOURS = {True: "#08519c", False: "#d95f02"}
NAMES = {True: "by image", False: "by load alone"}


@dataclass(frozen=True)
class Line:
    """Of one way to choose replicas. loads: questions a second and replica, with the p95 in seconds of so many
    replicas. capacity: replicas, and questions a second of which 95 % come in time."""

    affinity: bool
    loads: dict[int, list[tuple[float, float]]]
    capacity: list[tuple[int, float]]


def plot(lines: Sequence[Line], measured: Sequence[tuple[int, float]], within: float, path: Path) -> None:
    """Write a PNG. measured: replicas and questions a second of this machine."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.3), layout="constrained")
    _loads(left, lines, within)
    _capacities(right, lines, measured, within)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)


def _loads(axes: Axes, lines: Sequence[Line], within: float) -> None:
    for line in lines:
        for (replicas, points), style in zip(line.loads.items(), ("-", "--", ":"), strict=False):
            label = f"{replicas} replica{'s' * (replicas > 1)}, {NAMES[line.affinity]}"
            axes.plot(*zip(*points, strict=True), style, color=COLOURS[line.affinity], label=label)
    axes.axhline(within, color="#7f7f7f", linewidth=0.8)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("questions a second and replica")
    axes.set_ylabel("seconds within which 95 % are answered")
    axes.set_title("Simulated with measured times", loc="left", fontsize=10.5)


def _capacities(axes: Axes, lines: Sequence[Line], measured: Sequence[tuple[int, float]], within: float) -> None:
    for line in lines:
        axes.plot(*zip(*line.capacity, strict=True), "o-", color=COLOURS[line.affinity], markersize=3.5,
                  label=f"simulated, {NAMES[line.affinity]}")  # fmt: skip
    axes.plot(*zip(*measured, strict=True), "k*", markersize=9, label="measured: 2 cores, everything on them")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("replicas")
    axes.set_ylabel(f"questions a second, 95 % of them within {within:g} s")
    axes.set_title("How much can be asked", loc="left", fontsize=10.5)
