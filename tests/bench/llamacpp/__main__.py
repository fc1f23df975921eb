"""Beside llama.cpp on the CPU: `python -m tests.bench.llamacpp --folder DIR`.

Four layers of LLaVA-1.5-7B's width with random weights, decoder alone: the same prompt of text in both, no image, so
that no page is read. Ours is built as `--int4 --head int8`, llama.cpp's is a GGUF file of the same checkpoint in Q4_0
with its head in Q8_0. The two take turns. Before, both must say much the same of what follows the prompt.

llama.cpp is the prebuilt binary in the npm package node-llama-cpp, which is no dependency of this project:
`npm install --prefix DIR node-llama-cpp`. --folder keeps checkpoint, bundle and GGUF for the next time (5 GB).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np
from rich.console import Console

from engines.bundle.folder import Bundle
from engines.ort import OrtModel
from export.build import BuildOptions, build
from plugins.cores import usable_cores
from tests.bench.compare import markdown
from tests.bench.decode import processor
from tests.bench.llamacpp.weights import write_gguf
from tests.bench.random_checkpoint import write

STEPS = Path(__file__).with_name("steps.mjs")
PROMPT, CONTEXT = 600, 1024  # tokens; llama.cpp reads of its context what is filled
FIRST = 3  # ids below are special
ALIKE = 0.9  # least correlation of log probabilities: both round the same weights to 4 bits, each in its own way


@dataclass
class Contender:
    """What was measured of one: seconds."""

    name: str
    prefill: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)


class LlamaCpp:
    """llama.cpp in a process of its own. RuntimeError if that ends, with what it said on stderr above."""

    def __init__(self, npm: Path, model: Path, threads: int) -> None:
        command = ["node", str(STEPS), str(npm.resolve()), str(model.resolve()), str(threads), str(CONTEXT)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def ask(self, wanted: str, ids: np.ndarray) -> list:
        """The answer to a request of steps.mjs."""
        self._process.stdin.write(json.dumps({"wanted": wanted, "ids": ids.tolist()}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> list:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp ended with status {self._process.wait()}; is node-llama-cpp in --npm?")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


class Ours:
    """The decoder of a bundle, with no image, and a cache with `room` for so many tokens, as a request gets it."""

    def __init__(self, bundle: Path, threads: int, room: int) -> None:
        model = OrtModel(Bundle(bundle, verify=False), threads=threads)
        self.decoder = model.decoder(model.no_image(1), room)

    def run(self, ids: np.ndarray, length: int) -> tuple[float, np.ndarray]:
        """Append `ids` to the first `length` tokens: seconds, and logits [vocab] of the last."""
        self.decoder.length[:] = length
        started = perf_counter()
        logits = self.decoder.run(ids[None], 0).logits[0]
        seconds = perf_counter() - started
        assert np.isfinite(logits).all()
        return seconds, logits


def alike(ours: np.ndarray, theirs: list[tuple[int, float]]) -> float:
    """Correlation of logits [vocab] with the logarithms of probabilities, given as pairs of token and probability."""
    ids, probabilities = (np.array(each) for each in zip(*theirs, strict=True))
    seen = probabilities > 0
    return float(np.corrcoef(ours[ids[seen].astype(int)], np.log(probabilities[seen]))[0, 1])


def measure(bundle: Path, llama: LlamaCpp, vocab: int, *, rounds: int, steps: int, threads: int) -> list[Contender]:
    """Both in turns, after they were found to be the same model."""
    prompt = np.random.default_rng(0).integers(FIRST, vocab, PROMPT + steps)
    prompt, forced = prompt[:PROMPT], prompt[PROMPT:]
    ours = Ours(bundle, threads, PROMPT + steps)
    found = alike(ours.run(prompt, 0)[1], llama.ask("probabilities", prompt))
    assert found >= ALIKE, f"log probabilities of llama.cpp and logits here correlate by {found:.3f} only"
    here, there = Contender("here, `--int4 --head int8`"), Contender("llama.cpp, Q4_0, head Q8_0")
    for _ in range(rounds):
        here.prefill.append(ours.run(prompt, 0)[0])
        for index, token in enumerate(forced):
            seconds = ours.run(np.array([token]), PROMPT)[0]
            if index:  # the first follows a prefill
                here.step.append(seconds)
        there.prefill.append(llama.ask("prefill", prompt) / 1000)
        there.step += [each / 1000 for each in llama.ask("steps", forced)[1:]]
    return [there, here]


def table(contenders: list[Contender]) -> list[list[str]]:
    """Cells, heading first; ratios to the first one."""
    base, *_ = contenders
    lines = [["", f"prefill of {PROMPT} tokens", "ratio", "decode, a token", "ratio"]]
    for each in contenders:
        ratios = (float(np.median(a) / np.median(b)) for a, b in ((each.prefill, base.prefill), (each.step, base.step)))
        prefill, step = (f"{ratio:.2f}x" for ratio in ratios)
        lines.append(
            [each.name, f"{np.median(each.prefill):.2f} s", prefill, f"{1000 * np.median(each.step):.1f} ms", step]
        )
    return lines


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="keeps what is built")
    add("--npm", type=Path, help="where node-llama-cpp was installed; None = --folder")
    add("--shape", default="7b-slice", help="of the checkpoint (tests/bench/random_checkpoint.py)")
    add("--rounds", type=int, default=5, help="turns of each")
    add("--steps", type=int, default=20, help="steps in each turn")
    add("--threads", type=int, default=usable_cores(), help="of both")
    given = parser.parse_args()
    checkpoint, bundle, model = (given.folder / name for name in ("checkpoint", "bundle", "model.gguf"))
    if not checkpoint.exists():
        write(given.shape, checkpoint)
    if not bundle.exists():
        build(BuildOptions(checkpoint, bundle, "int4", head="int8", check="none"), Console(stderr=True))
    if not model.exists():
        write_gguf(checkpoint, model)
    llama = LlamaCpp(given.npm or given.folder, model, given.threads)
    g = Bundle(bundle, verify=False).manifest.geometry
    found = measure(bundle, llama, g.vocab, rounds=given.rounds, steps=given.steps, threads=given.threads)
    llama.close()
    print(markdown(table(found)))
    print(f"\nhidden {g.hidden}, {g.layers} layers; {processor()}, {given.threads} threads; medians of {given.rounds}")


if __name__ == "__main__":
    sys.exit(main())
