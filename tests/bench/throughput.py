"""Requests one after the other, and 2, 4, 8 at a time: `python -m tests.bench.throughput`.

The same questions about the same images in every row, of a random model whose threshold lets every page pass, so that
the budget is what each layer reads. Images are encoded before the clock starts, once for all: what is shared by slots
is decoding. Answers of each row are compared with those of the first.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from engines.errors import OptionError
from engines.memory import release_freed
from export.build import BuildOptions, build
from plugins import command
from runtime import Engine
from tests.bench.decode import processor
from tests.bench.random_checkpoint import SHAPES, write

SLOTS = (1, 2, 4, 8)
SEED = 0
WORDS = 30  # tokens of a question, about
HEAD = "| precision | at a time | joining and leaving | | first token | gap | starting together | | memory |"
RULE = "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"


@dataclass(frozen=True)
class Request:
    """A question: which image, ids (-200 for the image), answer tokens."""

    image: int
    ids: list[int]
    tokens: int


@dataclass(frozen=True)
class Row:
    """What one number of slots gave. Rates in answer tokens per second of the whole; seconds; bytes resident.

    mixed: requests of different length, a new one as soon as one has ended. first: median time from asking to the first
    token, its own prefill included. gap: longest time between two tokens of an answer, median of the answers. together:
    as many of equal length as there are slots, at once. memory: of the opened engine, its weights included.
    """

    slots: int
    mixed: float
    first: float
    gap: float
    together: float
    memory: int


def requests(count: int, images: int, longest: int, vocab: int) -> list[Request]:
    """Questions of different lengths about so many images, mixed."""
    draw = np.random.default_rng(SEED)
    made = []
    for index in range(count):
        words = draw.integers(3, vocab, WORDS // 2 + int(draw.integers(WORDS))).tolist()
        made.append(Request(index % images, [1, -200, *words], int(draw.integers(longest // 4, longest + 1))))
    return made


def run(engine: Engine, views: list, asked: list[Request], budget: int) -> tuple[float, list[float], list[float], list]:
    """(seconds, times to first tokens, longest gaps, token ids of each) with as many on the way as there are slots."""
    waiting, running = deque(enumerate(asked)), deque()
    first, gaps, answers = [], [0.0] * len(asked), [None] * len(asked)
    started = perf_counter()
    while waiting or running:
        while waiting and len(running) < engine.slots:
            index, request = waiting.popleft()
            stream = views[request.image].stream(
                input_ids=request.ids, max_new_tokens=request.tokens, page_budget=budget, stop_at_eos=False
            )
            running.append([index, stream, stream.steps(), perf_counter(), 0])
            stream.join()  # as one does who waits in a thread of his own
        entry = running.popleft()
        index, stream, steps, since, count = entry
        if next(steps, None) is None:
            answers[index] = stream.answer().token_ids
            continue
        now = perf_counter()
        if count:
            gaps[index] = max(gaps[index], now - since)
        else:
            first.append(now - since)
        running.append([index, stream, steps, now, count + 1])
    return perf_counter() - started, first, gaps, answers


def measure(bundle: Path, slots: int, asked: list[Request], budget: int, threads: int | None) -> tuple[Row, list]:
    """One row, and the answers that belong to it."""
    before = resident()
    images = np.random.default_rng(SEED).integers(
        0, 256, (1 + max(request.image for request in asked), 300, 400, 3), dtype=np.uint8
    )
    with Engine(bundle, slots=slots, threads=threads, verify=False) as engine:
        views = [engine.image(image) for image in images]
        for view in views:  # vision, and memory that is touched for the first time
            view.ask(input_ids=[1, -200, 5], max_new_tokens=2, page_budget=budget, stop_at_eos=False)
        run(engine, views, asked[:slots], budget)
        seconds, first, gaps, answers = run(engine, views, asked, budget)
        longest = max(request.tokens for request in asked)
        equal = [Request(asked[index].image, asked[index].ids, longest) for index in range(slots)]
        together, *_ = run(engine, views, equal, budget)
        tokens = sum(request.tokens for request in asked)
        row = Row(
            slots, tokens / seconds, float(np.median(first)), float(np.median(gaps)), slots * longest / together,
            resident() - before,
        )  # fmt: skip
    release_freed()
    return row, answers


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def table(rows: dict[str, list[Row]]) -> list[str]:
    """Lines of Markdown."""
    lines = [HEAD, RULE]
    for precision, found in rows.items():
        one = found[0]
        lines += [
            f"| {precision} | {row.slots} | {row.mixed:.1f} | {row.mixed / one.mixed:.2f}x | {1000 * row.first:.0f} ms "
            f"| {1000 * row.gap:.0f} ms | {row.together:.1f} | {row.together / one.together:.2f}x "
            f"| {row.memory / 1e9:.1f} GB |"
            for row in found
        ]
    return lines


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int4"])
    parser.add_argument("--slots", nargs="+", type=int, default=SLOTS, help="ratios are to the first")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--images", type=int, default=3, help="that the requests are about")
    parser.add_argument("--tokens", type=int, default=64, help="of the longest answer; the shortest has a quarter")
    parser.add_argument("--pages", type=int, default=22, help="each layer reads for each token")
    parser.add_argument("--threads", type=int, default=None, help="None = every core")
    given = parser.parse_args()
    if given.requests < max(given.slots):
        raise OptionError(f"--requests {given.requests}", expected=f"at least the slots, {max(given.slots)}")
    rows: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        g = SHAPES[given.shape]
        model = write(given.shape, folder / "model", threshold=-1, context=g.image_tokens + 2 * WORDS + given.tokens)
        asked = requests(given.requests, given.images, given.tokens, g.vocab)
        for precision in given.precisions:
            blocks = {"block_size": 32} if precision == "int4" and g.intermediate % 128 else {}
            bundle = build(BuildOptions(model, folder / precision, precision=precision, check="none", **blocks)).path
            expected = None
            for slots in given.slots:
                row, answers = measure(bundle, slots, asked, given.pages, given.threads)
                expected = expected or answers
                equal = sum(left == right for left, right in zip(expected, answers, strict=True))
                print(f"{precision}, {slots}: {equal} of {len(answers)} answers as one at a time; {row}", flush=True)
                rows.setdefault(precision, []).append(row)
    print("\n".join(table(rows)))
    what = f"{given.requests} requests of up to {given.tokens} tokens, {given.pages} pages"
    print(f"\n{given.shape}, {what}, {processor()}")


if __name__ == "__main__":
    raise SystemExit(command.run(main))
