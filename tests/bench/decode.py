"""What one decode step costs, side by side: `python tests/bench/decode.py`.

Same weights and forced tokens in every row; the rows take turns, a few steps each, so that a change of the machine's
speed hits all of them. Page counts are exact: the checkpoint's threshold lets every page pass and the budget decides.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from engines.backend import Image
from engines.bundle.folder import Bundle
from engines.bundle.geometry import Geometry
from engines.bundle.pages import page_size
from engines.bundle.precision import BLOCK_SIZES, SCALE_BYTES
from engines.ort import OrtModel
from engines.residency import SHARED
from export.build import BuildOptions, build
from export.checkpoint.config import read_config
from export.checkpoint.folder import Checkpoint
from export.network.reference import ReferenceModel
from tests.bench.contenders.cost import Cost, cost
from tests.bench.contenders.official import OfficialDecoder
from tests.bench.contenders.plain import PlainModel
from tests.bench.contenders.ways import TEXT, question
from tests.bench.random_checkpoint import SHAPES, write

AGREE = 1e-3  # largest logit difference allowed between ours and the official way


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    pages: int
    milliseconds: float  # median of a step
    ratio: float  # to plain low-res decode
    cost: Cost


class Runner:
    """One variant in a ready-to-step state: prompt in the cache, every step at the same length."""

    def __init__(self, name: str, decoder, budget: int, prompt: np.ndarray, *, prefill: bool = True) -> None:
        self.name, self.decoder, self.budget = name, decoder, budget
        if prefill:
            decoder.run(prompt[:, :-1])
        self.length = decoder.length.copy()
        self.times: list[float] = []

    def step(self, token: int) -> np.ndarray:
        """One decode step from the end of the prompt; logits [vocab]."""
        self.decoder.length = self.length.copy()
        started = perf_counter()
        result = self.decoder.run(np.array([[token]]), self.budget)
        self.times.append(perf_counter() - started)
        assert np.isfinite(result.logits).all(), self.name
        assert (result.page_count[:, :-1] == self.budget).all(), (self.name, result.page_count)
        return result.logits[0]

    def settle(self) -> None:
        """Steps that do not count, until the threads of the variant before have stopped waiting for work."""
        kept = list(self.times)
        for _ in range(3):
            self.step(5)
        self.times = kept


def measure(
    model: Path, bundle: Path, int4: Path, *, rounds: int, steps: int, threads: int | None
) -> tuple[Geometry, list[Row]]:
    """Run every variant on a checkpoint and its bundles in float32 and int4.

    First asserts that equal pages give equal logits where weights are equal.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    config = read_config(model)
    reference = ReferenceModel(config.geometry, Checkpoint.open(model, config.tower_folder))
    opened = Bundle(bundle, verify=False)
    # Several models of 7B's width do not fit into memory with what encodes images.
    flex, g = OrtModel(opened, threads=threads, residency=SHARED), config.geometry

    asked, begin = question(g, rounds * steps), np.array([TEXT // 2])
    tiles, tokens, prompt = asked.tiles, asked.answer, asked.prompt(g.image_tokens)
    length, hires = prompt.shape[1], g.hires_side**2
    low, high = flex.vision(tiles[:1]), flex.vision(tiles[1:])
    image = Image(low, flex.project(high, begin), begin, np.zeros((1, 2), np.int64))
    plain = PlainModel(opened, threads=threads, residency=SHARED)
    expected_low, expected_high = reference.vision(tiles[:1]), reference.vision(tiles[1:])
    expected = Image(expected_low, reference.project(expected_high, begin), begin, image.margins)

    def official(name: str, budget: int) -> Runner:
        return Runner(name, OfficialDecoder(reference, expected, expected_high, length + 1), budget, prompt)

    some, every = 22 * g.pages // 81, g.pages
    exhaustive = plain.decoder(image, length + hires + 1)
    plain.fill(exhaustive, length + hires - 1)
    runners = [
        Runner("plain low-res decode", plain.decoder(image, length + 1), 0, prompt),
        *(Runner("ours", flex.decoder(image, length + 1), budget, prompt) for budget in (0, some, every)),
        official("plain low-res decode, PyTorch", 0),
        Runner("ours, PyTorch reference", reference.decoder(expected, length + 1), some, prompt),
        *(official("official way (projects pages again in each step), PyTorch", budget) for budget in (some, every)),
        Runner("all hi-res tokens in the sequence", exhaustive, 0, prompt, prefill=False),
    ]
    _assert_agreement(runners[:-1])  # the last one's keys are other keys
    quantised = Bundle(int4, verify=False)
    small = OrtModel(quantised, threads=threads, residency=SHARED)
    seen = Image(small.vision(tiles[:1]), small.project(small.vision(tiles[1:]), begin), begin, image.margins)
    runners.insert(4, Runner("ours, int4", small.decoder(seen, length + 1), some, prompt))
    for runner in runners:
        runner.times.clear()
    for start in range(0, len(tokens), steps):
        for runner in runners:
            runner.settle()
            for token in tokens[start : start + steps]:
                runner.step(int(token))

    base = float(np.median(runners[0].times))
    rows = []
    for runner in runners:
        seconds = float(np.median(runner.times))
        keys = length + (hires if runner is runners[-1] else 0)
        again = runner.budget > 0 and isinstance(runner.decoder, OfficialDecoder)
        packed = 0.5 + SCALE_BYTES / quantised.manifest.block_size if runner is runners[4] else None
        price = cost(g, keys, runner.budget * page_size(g), itemsize=4, layer_itemsize=packed, project_again=again)
        rows.append(Row(runner.name, runner.budget, 1000 * seconds, seconds / base, price))
    return g, rows


def _assert_agreement(runners: list[Runner]) -> None:
    for token in (5, 60):
        found: dict[int, np.ndarray] = {}
        for runner in runners:
            logits = runner.step(token)
            difference = np.abs(logits - found.setdefault(runner.budget, logits)).max()
            assert difference <= AGREE, f"{runner.name} with {runner.budget} pages differs by {difference}"


def table(rows: list[Row]) -> list[list[str]]:
    """Cells of the table, heading first."""
    head = ["decode step", "pages read per layer", "ms/token", "tokens/s", "vs plain", "MB/token", "MFLOP/token"]
    return [head] + [
        [
            row.name,
            str(row.pages),
            f"{row.milliseconds:.1f}",
            f"{1000 / row.milliseconds:.1f}",
            f"{row.ratio:.2f}x",
            f"{row.cost.bytes / 1e6:.0f}",
            f"{row.cost.flops / 1e6:.0f}",
        ]
        for row in rows
    ]


def processor() -> str:
    """Name of the processor, for the table's caption."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def prepared(model: Path | None, run: Callable[[Path, Path, Path], None], shape: str = "mid") -> None:
    """Call `run` with a checkpoint whose every page passes the threshold, and its bundles in float32 and int4."""
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            model = write(shape, Path(folder) / "checkpoint", torch.float32, threshold=-1, context=8192)
        console, g = Console(stderr=True), read_config(model).geometry
        block = max(size for size in BLOCK_SIZES if g.hidden % size == g.intermediate % size == 0)
        bundle = build(BuildOptions(model, Path(folder) / "fp32", precision="fp32", check="weights"), console)
        int4 = BuildOptions(model, Path(folder) / "int4", precision="int4", block_size=block, check="weights")
        run(model, bundle.path, build(int4, console).path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, help="checkpoint with threshold -1 and room for all tokens; a random one when not given")
    add("--shape", choices=SHAPES, default="mid", help="of the random one; 7b-slice takes 12 GB of disk, 17 of memory")
    add("--rounds", type=int, default=6, help="turns of each variant")
    add("--steps", type=int, default=8, help="steps in each turn")
    add("--threads", type=int, help="None = every core")
    add("--markdown", action="store_true", help="print the table as Markdown")
    add("--json", type=Path, help="also write the rows to this file")
    given = parser.parse_args()

    def run(model: Path, bundle: Path, int4: Path) -> None:
        g, rows = measure(model, bundle, int4, rounds=given.rounds, steps=given.steps, threads=given.threads)
        threads = given.threads or torch.get_num_threads()
        caption = (
            f"hidden {g.hidden}, {g.layers} layers ({len(g.reading_layers)} read pages), {g.heads} heads, float32, "
            f"{g.image_tokens + TEXT} tokens in the cache; {processor()}, {threads} threads; "
            f"median of {given.rounds * given.steps} steps"
        )
        lines = table(rows)
        if given.markdown:
            rule = ["---"] + ["---:"] * (len(lines[0]) - 1)
            print("\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]]))
            print(f"\n{caption}")
        else:
            rich = Table(*lines[0], caption=caption)
            for line in lines[1:]:
                rich.add_row(*line)
            Console().print(rich)
        if given.json:
            given.json.write_text(json.dumps({"caption": caption, "rows": [asdict(row) for row in rows]}, indent=1))

    prepared(given.model, run, given.shape)


if __name__ == "__main__":
    main()
