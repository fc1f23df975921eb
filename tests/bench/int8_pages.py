"""What int8 pages change in a decode step: `python -m tests.bench.int8_pages FOLDER`.

A random model of middle size, float32, with float32 pages and with int8 ones, on ONNX Runtime. Rows take turns and read
exactly as many pages as they say, as in tests/bench/decode.py. FOLDER keeps the bundles for the next run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from engines.backend import Image
from engines.bundle.folder import Bundle
from engines.ort import OrtModel
from export.build import BuildOptions, build
from export.options import KV
from tests.bench.contenders.ways import TEXT, question
from tests.bench.decode import Runner, processor
from tests.bench.random_checkpoint import write

AGREE = 0.05  # largest difference of a logit, as a share of the largest


def bundles(folder: Path, shape: str = "mid") -> dict[str, Path]:
    """The bundle of each kind of pages, made when it is not there."""
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        write(shape, checkpoint, torch.float32, threshold=-1, context=8192)
    found = {kv: folder / kv for kv in KV}
    for kv, out in found.items():
        if not out.exists():
            build(BuildOptions(checkpoint, out, precision="fp32", kv=kv, check="none"), Console(stderr=True))
    return found


def measure(found: dict[str, Path], rounds: int, steps: int, threads: int | None) -> list[tuple[str, int, float, int]]:
    """Pages, pages read per layer, milliseconds of a step (median), bytes of the store."""
    runners, stores = [], []
    for kv, path in found.items():
        model = OrtModel(Bundle(path, verify=False), threads=threads)
        g, begin = model.geometry, np.array([TEXT // 2])
        asked = question(g, 0)
        tiles, prompt = asked.tiles, asked.prompt(g.image_tokens)
        pages = model.project(model.vision(tiles[1:]), begin)
        image = Image(model.vision(tiles[:1]), pages, begin, np.zeros((1, 2), np.int64))
        for budget in (0, 22 * g.pages // 81, g.pages):
            runners.append(Runner(kv, model.decoder(image, prompt.shape[1] + 1), budget, prompt))
            stores.append(sum(value.numpy().nbytes for value in pages.values()))
    first: dict[int, np.ndarray] = {}
    for runner in runners:
        logits = runner.step(5)
        expected = first.setdefault(runner.budget, logits)
        assert np.abs(logits - expected).max() <= AGREE * np.abs(expected).max(), (runner.name, runner.budget)
        runner.times.clear()
    for _ in range(rounds):
        for runner in runners:
            runner.settle()
            for token in range(5, 5 + steps):
                runner.step(token)
    return [
        (runner.name, runner.budget, 1000 * float(np.median(runner.times)), size)
        for runner, size in zip(runners, stores, strict=True)
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoint and the bundles lie")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each row")
    parser.add_argument("--steps", type=int, default=8, help="steps in each turn")
    parser.add_argument("--threads", type=int, help="None = every core")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    print("| pages | read per layer | ms/token | store |\n| --- | ---: | ---: | ---: |")
    for kv, budget, milliseconds, size in measure(bundles(given.folder), given.rounds, given.steps, given.threads):
        print(f"| {kv} | {budget} | {milliseconds:.2f} | {size / 1e6:.1f} MB |")
    print(f"\nfloat32, {processor()}, median of {given.rounds * given.steps} steps")


if __name__ == "__main__":
    main()
