"""What each kernel must move at 7B, and how long each board's memory takes for that: ESTIMATES, from shapes alone.

`python tests/bench/kernels.py` prints Markdown. Nothing is run: see `NOTE`. With `--roofline` whole decode steps on
every board. With `--gpu` the kernels of a decode step are compiled and timed on this machine's GPU, and held against
its bandwidth.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from engines.bundle.geometry import Geometry
from engines.bundle.pages import page_size
from engines.bundle.precision import FP16, INT4
from engines.cuda import Cuda
from engines.errors import FlexError
from engines.sizing.fit import assess, room_of
from engines.sizing.needs import SHARE_OF_BANDWIDTH, Configuration, step_bytes
from engines.targets import TARGETS, Target
from plugins.cached_attention.launch import PAGES_PER_SPLIT, SPLIT
from plugins.compiler.ptxas import SMS
from plugins.op import ITEMSIZE, Op, blocks
from plugins.registry import ops_of_model
from tests.bench.contenders.cost import cost
from tests.geometries import official
from tests.on_gpu.compiled import compiled
from tests.shapes import input_shapes, sizes

if TYPE_CHECKING:
    from tests.plugins.harness import Launcher

NOTE = """\
**An estimate, not a measurement: no figure of this table was taken on a GPU** (docs/figures.md has what an H100 took).
Bytes are counted from shapes: what a launch must read or write, each byte once. Microseconds are those bytes at the
full bandwidth of the board's memory, the least a kernel can take. A launch also has a floor of a few microseconds,
which is all that the small kernels cost; what stays in the GPU's cache between launches costs less; `append` and
`prefill` run for the prompt only, and arithmetic, not memory, bounds `prefill` and `project_pages`."""

BOARDS = ("orin-nano-8", "orin-nano-8-super", "orin-nx-16", "agx-orin-64", "agx-thor-128", "rtx-4090", "h100-80")
F32, I64 = 4, 8
ROOFLINE_PAGES = 22  # read in each reading layer, as in most figures of docs/figures.md
ROUNDS, REPEATS = 50, 10  # launches in a graph, of which the fastest of so many runs counts


@dataclass(frozen=True)
class Case:
    """One decode step of one sequence, and the prefill of its prompt."""

    geometry: Geometry
    tokens: int = 1200  # cached
    pages: int = 10  # read in each reading layer
    dtype: str = "float16"

    @property
    def item(self) -> int:
        """Bytes of a value."""
        return ITEMSIZE[self.dtype]

    @property
    def query(self) -> int:
        """Bytes of a token's query, or context."""
        return self.geometry.heads * self.geometry.head_dim * self.item

    @property
    def cached(self) -> int:
        """Bytes of a token's key and value in one layer."""
        return 2 * self.geometry.kv_heads * self.geometry.head_dim * self.item

    @property
    def rotary(self) -> int:
        """Bytes of a position's cos and sin."""
        return self.geometry.head_dim * F32

    def parts(self, pages: int) -> int:
        """Bytes of what the splits hand to `combine`: weighted values, maximum and sum, for each split and head."""
        splits = blocks(self.tokens, SPLIT) + blocks(pages, PAGES_PER_SPLIT)
        return splits * self.geometry.heads * (self.geometry.head_dim + 2) * F32

    @property
    def scores(self) -> int:
        """Bytes of the scores of the image tokens, for each head."""
        return self.geometry.heads * self.geometry.image_tokens * F32


def attend(c: Case) -> int:
    """Query, new key and value (which it also stores), the cache -> parts, scores."""
    return c.query + 2 * c.cached + c.rotary + c.tokens * c.cached + c.parts(0) + c.scores


def attend_pages(c: Case) -> int:
    """`attend`, and the listed pages."""
    parts = c.parts(c.pages) - c.parts(0)
    return attend(c) + c.pages * (page_size(c.geometry) * c.cached + 2 * I64) + parts


def combine(c: Case, pages: int) -> int:
    """Parts, scores -> context, map."""
    return c.parts(pages) + c.scores + c.query + c.geometry.image_tokens * F32


def select_pages(c: Case) -> int:
    """Map -> list of pages."""
    return c.geometry.image_tokens * F32 + c.geometry.pages * I64


def project_pages(c: Case, new: int) -> int:
    """The list and what is projected; with new pages their features and rotary, both weights -> keys and values."""
    g, tokens = c.geometry, new * page_size(c.geometry)
    weights = 2 * g.kv_heads * g.head_dim * g.hidden * c.item if new else 0
    return 3 * g.pages * I64 + weights + tokens * (g.hidden * c.item + c.rotary + c.cached)


def append(c: Case) -> int:
    """New keys and values, all but the last -> the cache."""
    return (c.tokens - 1) * (2 * c.cached + c.rotary)


def prefill(c: Case) -> int:
    """Queries and the cache -> contexts."""
    return (c.tokens - 1) * (2 * c.query + c.cached + c.rotary)


# (op, kernel) of a decode step -> bytes of a launch.
STEP: dict[tuple[str, str], Callable[[Case], int]] = {
    ("CachedAttention", "attend"): attend,
    ("CachedAttention", "combine"): lambda c: combine(c, 0),
    ("SelectPages", "select_pages"): select_pages,
    ("ProjectPages", "project_pages"): lambda c: project_pages(c, 0),
    ("HierarchicalAttention", "attend_pages"): attend_pages,
    ("HierarchicalAttention", "combine"): lambda c: combine(c, c.pages),
}
# Beside the steps: of the prompt, and of a page's first selection.
RARE: dict[str, Callable[[Case], int]] = {
    "append, whole prompt": append,
    "prefill, whole prompt": prefill,
    "project_pages, every page new": lambda c: project_pages(c, c.pages),
}


def launches(g: Geometry) -> Counter[tuple[str, str]]:
    """(op, kernel) -> launches of a decode step in all layers, as the plugins say."""
    layers = {
        "CachedAttention": g.start_layer + 1,
        "SelectPages": len(g.selecting_layers),
        "ProjectPages": len(g.reading_layers),
        "HierarchicalAttention": len(g.reading_layers),
    }
    counted: Counter[tuple[str, str]] = Counter()
    for op in ops_of_model(sizes(g)):
        nowhere = dict.fromkeys((tensor.name for tensor in (*op.inputs, *op.outputs)), 0)
        for launch in op.launches("float16", input_shapes(g)[op.name], nowhere, 0):
            counted[op.name, launch.kernel.name] += layers[op.name]
    return counted


def microseconds(count: int, board: Target) -> float:
    """What a board's memory takes for that many bytes, at the least."""
    return count / (board.bandwidth * 1e9) * 1e6


def table(case: Case) -> list[list[str]]:
    """The first row is the header."""
    g = case.geometry
    counted = launches(g)
    boards = [TARGETS[name] for name in BOARDS]
    header = ["kernel", "launches a token", "bytes a launch", *(f"{b.name} ({b.bandwidth} GB/s)" for b in boards)]

    def row(name: str, number: str, count: int) -> list[str]:
        return [name, number, f"{count:,}", *(f"{microseconds(count, board):,.1f}" for board in boards)]

    rows = [header]
    rows += [row(f"{op}: {kernel}", str(counted[op, kernel]), STEP[op, kernel](case)) for op, kernel in counted]
    total = sum(number * STEP[key](case) for key, number in counted.items())
    weights = cost(g, 0, 0, itemsize=case.item).bytes
    rows.append(row("**all kernels of a token**", str(counted.total()), total))
    read = row("**weights of a token**", "", weights)
    read[3:] = [
        text if weights < board.memory else "does not fit" for text, board in zip(read[3:], boards, strict=True)
    ]
    rows.append(read)
    rows.append(["kernels / weights", "", f"{total / weights:.1%}", *[""] * len(boards)])
    rows += [row(name, "-", count(case)) for name, count in RARE.items()]
    return rows


def roofline(tokens: int, pages: int) -> list[list[str]]:
    """A decode step of 7B on every board, in the precisions that fit there: what it reads, what memory takes for that
    at least, and at the share of its bandwidth that was measured. The first row is the header."""
    g, share = official(), SHARE_OF_BANDWIDTH
    rows = [
        ["board", "GB/s", "weights", "GB a step", "ms at least", "tokens/s at most", f"ms at {share:.0%}", "tokens/s"]
    ]
    for board in TARGETS.values():
        for precision in (FP16, INT4):
            c = Configuration(g, precision)
            count = step_bytes(c, tokens, pages)
            row = [board.name, str(board.bandwidth), precision.name, f"{count / 1e9:.2f}"]
            if assess(c, room_of(board)).runs:
                least = microseconds(count, board) / 1000
                likely = least / share
                row += [f"{least:.2f}", f"{1000 / least:.1f}", f"{likely:.2f}", f"{1000 / likely:.1f}"]
            else:
                row += ["does not fit", "", "", ""]
            rows.append(row)
    return rows


def products(g: Geometry) -> int:
    """Matrix products of a decode step, each with weights of its own: seven a layer, and the head."""
    return 7 * g.layers + 1


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:]])


def inputs_of(op: Op, case: Case) -> dict[str, np.ndarray]:
    """Inputs of a decode step: random numbers, `case.tokens` cached, the first `case.pages` pages listed and there."""
    rng, arrays = np.random.default_rng(0), {}
    shapes = input_shapes(case.geometry)[op.name]
    whole = {
        "positions": case.tokens - 1,
        "page_budget": case.pages,
        "page_count": case.pages,
        "projected": 1,
        "page_lengths": page_size(case.geometry),
    }
    for tensor in op.inputs:
        shape, kind = shapes[tensor.name], tensor.kind(case.dtype)
        if tensor.name == "pages":
            arrays[tensor.name] = np.broadcast_to(np.arange(shape[-1]), shape).astype(np.int64)
        elif kind == "int64":
            arrays[tensor.name] = np.full(shape, whole.get(tensor.name, 0), np.int64)
        else:
            arrays[tensor.name] = (rng.standard_normal(shape, np.float32) / 4).astype(kind)
    return arrays


def bandwidth(cuda: Cuda, size: int = 256 << 20) -> float:
    """Bytes per second of copying `size` bytes within the device's memory: read once, written once."""
    buffers, stream = [cuda.buffer(size, "a benchmark") for _ in range(2)], cuda.stream()
    start, end = cuda.event(), cuda.event()
    best = 0.0
    for _ in range(5):
        start.record(stream)
        for _ in range(10):
            buffers[0].take(buffers[1].address, size, stream)
        end.record(stream)
        end.wait()
        best = max(best, 2 * 10 * size / (end.since(start) / 1000))
    return best


def measured(
    case: Case, launcher: Launcher, limit: float, rounds: int = ROUNDS, repeats: int = REPEATS
) -> list[list[str]]:
    """Microseconds of each launch of a decode step on the GPU of `launcher`, repeated in a graph, and its share of
    `limit`, the bytes that the memory moves in a second. What stays in the GPU's cache may look faster than its memory.
    The first row is the header."""
    cuda, stream = launcher.cuda, launcher.stream
    start, end = cuda.event(), cuda.event()
    rows = [["kernel", "bytes a launch", "us", f"share of {limit / 1e9:.0f} GB/s, measured by copying"]]
    for op in ops_of_model(sizes(case.geometry)):
        steps, _memory = launcher.prepare(op, case.dtype, inputs_of(op, case))
        artifacts = launcher.artifacts(op, case.dtype)
        for launch in steps:
            cuda.run(artifacts, [launch], int(stream))  # loads it
            stream.wait()

            def record(launch=launch, artifacts=artifacts) -> None:
                cuda.run(artifacts, [launch] * rounds, int(stream))

            graph, times = cuda.capture(stream, record), []
            for _ in range(repeats):
                start.record(stream)
                graph.launch(stream)
                end.record(stream)
                end.wait()
                times.append(1000 * end.since(start) / rounds)
            moved = STEP[op.name, launch.kernel.name](case)
            share = moved / limit / (min(times) / 1e6)
            rows.append([f"{op.name}: {launch.kernel.name}", f"{moved:,}", f"{min(times):.1f}", f"{share:.0%}"])
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python tests/bench/kernels.py", description="Bytes and time of each kernel at 7B."
    )
    parser.add_argument("--gpu", action="store_true", help="time them on this machine's GPU")
    parser.add_argument("--roofline", action="store_true", help="whole decode steps on every board")
    case, options = Case(official()), parser.parse_args(arguments)
    if options.roofline:
        g, pages = case.geometry, ROOFLINE_PAGES
        print(
            f"LLaVA-1.5-7B, {case.tokens} tokens cached, {pages} pages a layer, batch 1: {launches(g).total()} "
            f"launches of our kernels beside {products(g)} products.\n\n{markdown(roofline(case.tokens, pages))}"
        )
        return
    if options.gpu:
        from tests.plugins.harness import Launcher  # the estimate needs no Triton

        try:
            cuda = Cuda()
        except FlexError as error:
            sys.exit(str(error))
        sms = (cuda.sm,) if cuda.sm in SMS else SMS[:1]  # of a GPU nobody has heard of the driver compiles the PTX
        rows = measured(case, Launcher(cuda, lambda kernels: compiled(kernels, sms)), bandwidth(cuda))
        print(f"{cuda.name}; LLaVA-1.5-7B, {case.dtype}, {case.tokens} tokens cached, {case.pages} pages a layer\n")
        print(markdown(rows))
        return
    print(
        f"LLaVA-1.5-7B, {case.dtype}, {case.tokens} tokens cached, {case.pages} pages a layer, batch 1; microseconds.\n"
    )
    print(f"{NOTE}\n\n{markdown(table(case))}")


if __name__ == "__main__":
    main()
