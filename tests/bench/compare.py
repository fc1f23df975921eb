"""What users get, side by side: `python -m tests.bench.compare`.

Whole requests on the same weights and question: low-res only, FlexAttention here (pages projected eagerly and lazily,
several budgets), FlexAttention the official way, and every hi-res token in the sequence. Measured on a random model of
middle size, whose threshold lets every page pass, so that the budget is what is read; taking turns, after their logits
were compared. Computed for LLaVA-1.5-7B-FlexAttention from its graphs (tests/bench/contenders/graphs.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from rich.console import Console

from engines.bundle.folder import Bundle
from engines.bundle.geometry import Geometry
from engines.bundle.kinds import TRACED
from engines.ort import PROVIDERS
from export.build import BuildOptions, build
from export.graph.trace import trace
from tests.bench.contenders.graphs import Graph
from tests.bench.contenders.requests import WAYS, Graphs, held, work
from tests.bench.contenders.ways import TEXT, Models, Question, Timing, Way, question
from tests.bench.decode import processor
from tests.bench.random_checkpoint import write
from tests.geometries import official

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = (4, 8, 16, 81)
AGAIN = (16, 81)  # budgets of the official way
ANSWERS = (1, 16, 64)  # tokens
SHORT = 16  # answer tokens measured of the ways whose steps are slow and all alike
AGREE = 1e-3  # largest difference of logits
CHECKED = 4  # answer tokens compared


@dataclass
class Row:
    """One way at one budget. Times in seconds, medians of the requests; counts for each of ANSWERS."""

    way: str
    pages: int
    first: float = 0.0  # to the first token
    step: float = 0.0  # each token after it
    long: float = 0.0  # to the end of the longest answer
    projected: int = 0  # pages, in the longest answer, all layers
    peak: int = 0  # bytes
    flops: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    held: int = 0  # bytes of weights, cache and pages


def ways(device: str) -> list[tuple[str, int]]:
    """Every way with its budget. The official way is measured on the CPU only, in PyTorch."""
    again = [("official", budget) for budget in AGAIN] if device == "cpu" else []
    ours = [(way, budget) for way in ("eager", "lazy") for budget in BUDGETS]
    return [("low", 0), *ours, *again, ("exhaustive", 0)]


def check(models: Models, entered: Sequence[tuple[str, int]], asked: Question) -> None:
    """Ways that must give the same logits do: all with the same pages; those without pages and the reference."""
    expected: dict[tuple[str, int], np.ndarray] = {}
    for name, budget in entered:
        same = (name, 0) if budget == 0 else ("pages", budget)
        if same not in expected and budget == 0:
            expected[same] = models.reference(name).answer(asked, CHECKED).logits
        logits = models.way(name, budget).answer(asked, CHECKED).logits
        difference = np.abs(logits - expected.setdefault(same, logits)).max()
        assert difference <= AGREE, f"{name} with {budget} pages differs by {difference}"


def measure(entered: Sequence[Way], asked: Question, rounds: int) -> list[Row]:
    """Every way answers once in each round; slow ways briefly: their steps stand for those of a long answer."""
    found: list[list[Timing]] = [[] for _ in entered]
    for _ in range(rounds):
        for way, timings in zip(entered, found, strict=True):
            tokens = SHORT if way.name in ("official", "exhaustive") else ANSWERS[-1]
            timings.append(way.answer(asked, tokens))
    rows = []
    for way, timings in zip(entered, found, strict=True):
        first = float(np.median([timing.first for timing in timings]))
        step = float(np.median(np.concatenate([timing.steps for timing in timings])))
        rest = (ANSWERS[-1] - 1) * float(np.median([np.mean(timing.steps) for timing in timings]))
        projected = timings[0].projected * (ANSWERS[-1] // SHORT if way.name == "official" else 1)
        rows.append(Row(way.name, way.budget, first, step, first + rest, projected))
    return rows


def peak(name: str, budget: int, folders: dict[str, Path], device: str, threads: int | None) -> int:
    """Peak memory of one request in a process of its own, bytes."""
    command = [
        sys.executable,
        "-m",
        "tests.bench.contenders.ways",
        name,
        str(budget),
        "--device",
        device,
        "--tokens",
        "4",
    ]
    for key, folder in folders.items():
        command += [f"--{key}", str(folder)]
    command += [] if threads is None else ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def count(row: Row, graphs: Graphs, itemsize: int) -> Row:
    """The row with what is computed from the graphs."""
    prompt = graphs.geometry.image_tokens + TEXT
    costs = [work(graphs, row.way, row.pages, prompt=prompt, answer=tokens) for tokens in ANSWERS]
    size = held(graphs, row.way, prompt=prompt, answer=ANSWERS[-1], itemsize=itemsize)
    return replace(row, flops=[cost.flops for cost in costs], bytes=[cost.bytes for cost in costs], held=size)


def graphs_of_bundles(eager: Bundle, lazy: Bundle) -> Graphs:
    """Those that two bundles of one model were made from."""

    def graph(bundle: Bundle, part: str) -> Graph:
        return Graph(ir.load(bundle.graph(part, TRACED)))

    parts = graph(eager, "vision"), graph(eager, "pages"), graph(lazy, "pages"), graph(lazy, "decoder")
    return Graphs(lazy.manifest.geometry, *parts)


def graphs_of_geometry(g: Geometry, dtype: torch.dtype = torch.float16) -> Graphs:
    """Traced without weights."""
    lazy = replace(g, lazy_pages=True)
    parts = ("vision", g), ("pages", g), ("pages", lazy), ("decoder", lazy)
    return Graphs(lazy, *(Graph(trace(part, geometry, dtype)) for part, geometry in parts))


def measured_table(rows: Sequence[Row]) -> list[list[str]]:
    """Cells, heading first."""
    listed = " / ".join(map(str, ANSWERS))
    head = ["measured", "pages", "first token", "tokens/s", f"{ANSWERS[-1]} tokens", "pages projected", "peak memory"]
    head += [f"GFLOP for {listed} tokens", f"GB moved for {listed} tokens"]
    return [head] + [
        [
            WAYS[row.way],
            str(row.pages),
            f"{row.first:.2f} s",
            f"{1 / row.step:.1f}",
            f"{row.long:.2f} s",
            str(row.projected),
            f"{row.peak / 1e6:.0f} MB",
            " / ".join(f"{flops / 1e9:.0f}" for flops in row.flops),
            " / ".join(f"{moved / 1e9:.1f}" for moved in row.bytes),
        ]
        for row in rows
    ]


def computed_table(rows: Sequence[Row]) -> list[list[str]]:
    """Cells, heading first."""
    listed = " / ".join(map(str, ANSWERS))
    head = ["computed", "pages", f"TFLOP for {listed} tokens", f"GB moved for {listed} tokens", "weights, cache, pages"]
    return [head] + [
        [
            WAYS[row.way],
            str(row.pages),
            " / ".join(f"{flops / 1e12:.1f}" for flops in row.flops),
            " / ".join(f"{moved / 1e9:.0f}" for moved in row.bytes),
            f"{row.held / 1e9:.1f} GB",
        ]
        for row in rows
    ]


def markdown(lines: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    rule = ["---"] + ["---:"] * (len(lines[0]) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def compare(
    checkpoint: Path, folder: Path, *, rounds: int, device: str, threads: int | None, memory: bool = True
) -> tuple[Geometry, list[Row]]:
    """Build both bundles of a checkpoint in `folder`, check, measure and count every way."""
    folders = {"model": checkpoint}
    for projection in ("eager", "lazy"):
        folders[projection] = folder / projection
        options = BuildOptions(checkpoint, folders[projection], "fp32", projection=projection, check="none")
        build(options, Console(stderr=True))
    models = Models(checkpoint, folders["eager"], folders["lazy"], device=device, threads=threads)
    entered = ways(device)
    graphs = graphs_of_bundles(*(Bundle(folders[key], verify=False) for key in ("eager", "lazy")))
    asked = question(graphs.geometry, ANSWERS[-1])
    check(models, entered, asked)
    rows = [count(row, graphs, 4) for row in measure([models.way(*each) for each in entered], asked, rounds)]
    models.close()
    if memory:
        rows = [replace(row, peak=peak(row.way, row.pages, folders, device, threads)) for row in rows]
    return graphs.geometry, rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=int, default=2, help="turns of each way")
    add("--threads", type=int, help="None = every core")
    add("--device", choices=PROVIDERS, default="cpu", help="of what is measured; the official way runs on the CPU only")
    add("--plot", type=Path, default=ROOT / "docs" / "compare.png", help="picture to write")
    add("--json", type=Path, help="also write the rows to this file")
    given = parser.parse_args()
    from tests.bench.plot import plot  # before the work: without the extra "bench" there is no picture

    with tempfile.TemporaryDirectory() as folder:
        model = write("mid", Path(folder) / "checkpoint", torch.float32, threshold=-1, context=8192)
        g, measured = compare(model, Path(folder), rounds=given.rounds, device=given.device, threads=given.threads)
    seven = graphs_of_geometry(official(context=8192))
    computed = [count(Row(way, pages), seven, itemsize=2) for way, pages in ways("cpu")]
    where = f"{processor()}, {given.threads or torch.get_num_threads()} threads" if given.device == "cpu" else "GPU"
    captions = [
        f"Measured: hidden {g.hidden}, {g.layers} layers ({len(g.reading_layers)} read pages), float32, "
        f"{g.image_tokens + TEXT} prompt tokens; {where}; median of {given.rounds} requests. "
        "The official way runs in PyTorch, all others in ONNX Runtime.",
        f"Computed: LLaVA-1.5-7B-FlexAttention, float16, {g.image_tokens + TEXT} prompt tokens. "
        "Lazy at its worst: every step selects new pages.",
    ]
    print(markdown(measured_table(measured)), captions[0], markdown(computed_table(computed)), captions[1], sep="\n\n")
    if given.json:
        rows = {"measured": measured, "computed": computed}
        found = {key: [asdict(row) for row in listed] for key, listed in rows.items()}
        given.json.write_text(json.dumps({"captions": captions, **found}, indent=1))
    plot(measured, seven, given.plot, captions, TEXT)
    print(f"\n{given.plot}")


if __name__ == "__main__":
    main()
