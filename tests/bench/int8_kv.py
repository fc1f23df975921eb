"""What keys and values in 8 bits change in a decode step: `python -m tests.bench.int8_kv FOLDER`.

A random model, float32 or in blocks, with pages and cache of floats, and with int8 ones, on ONNX Runtime. Rows take
turns and read exactly as many pages as they say, as in tests/bench/decode.py. FOLDER keeps the bundles for the next
run. Times are the least of all rounds: what the machine does beside only adds to them.
"""

from __future__ import annotations

import argparse
from itertools import product
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
from tests.bench.random_checkpoint import SHAPES, write

AGREE = 0.1  # largest difference of a logit, as a share of the largest
WAYS = tuple(product(KV, KV))  # of pages and cache


def bundles(folder: Path, shape: str, precision: str) -> dict[tuple[str, str], Path]:
    """The bundle of each kind of pages and cache, made when it is not there."""
    checkpoint = folder / f"{shape}-checkpoint"
    if not checkpoint.exists():
        write(shape, checkpoint, torch.float32, threshold=-1, context=8192)
    found = {(kv, cache): folder / f"{shape}-{precision}-{kv}-{cache}" for kv, cache in WAYS}
    for (kv, cache), out in found.items():
        if not out.exists():
            options = BuildOptions(checkpoint, out, precision=precision, kv=kv, kv_cache=cache, check="none")
            build(options, Console(stderr=True))
    return found


def measure(
    found: dict[tuple[str, str], Path], words: int, rounds: int, steps: int, threads: int | None
) -> list[tuple[str, str, int, float, int]]:
    """Pages, cache, pages read per layer, milliseconds of a step (least), bytes of pages and cache. `words`: tokens of
    the prompt beside the image and TEXT."""
    runners, sizes = [], []
    for (kv, cache), path in found.items():
        model = OrtModel(Bundle(path, verify=False), threads=threads)
        g, begin = model.geometry, np.array([TEXT // 2])
        asked = question(g, 0)
        tiles, prompt = asked.tiles, asked.prompt(g.image_tokens)
        prompt = np.concatenate((prompt, np.random.default_rng(1).integers(3, g.vocab, (1, words))), axis=1)
        pages = model.project(model.vision(tiles[1:]), begin)
        image = Image(model.vision(tiles[:1]), pages, begin, np.zeros((1, 2), np.int64))
        for budget in (0, 22 * g.pages // 81, g.pages):
            decoder = model.decoder(image, prompt.shape[1] + 1)
            runners.append(Runner(f"{kv} {cache}", decoder, budget, prompt))
            sizes.append(sum(value.numpy().nbytes for value in pages.values()) + decoder.nbytes)
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
        (*runner.name.split(), runner.budget, 1000 * min(runner.times), size)
        for runner, size in zip(runners, sizes, strict=True)
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoint and the bundles lie")
    parser.add_argument("--shape", choices=SHAPES, default="mid", help="of the model")
    parser.add_argument("--precision", default="fp32", help="of the weights")
    parser.add_argument("--words", type=int, default=0, help="tokens of the prompt beside the image and a few")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each row")
    parser.add_argument("--steps", type=int, default=8, help="steps in each turn")
    parser.add_argument("--threads", type=int, help="None = every core")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    found = bundles(given.folder, given.shape, given.precision)
    rows = measure(found, given.words, given.rounds, given.steps, given.threads)
    print("| pages | cache | read per layer | ms/token | pages and cache |\n| --- | --- | ---: | ---: | ---: |")
    for kv, cache, budget, milliseconds, size in rows:
        print(f"| {kv} | {cache} | {budget} | {milliseconds:.2f} | {size / 1e6:.1f} MB |")
    print(f"\n{given.shape}, {given.precision}, {processor()}, least of {given.rounds * given.steps} steps")


if __name__ == "__main__":
    main()
