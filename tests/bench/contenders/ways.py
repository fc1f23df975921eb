"""Ways to answer a question about an image, each a whole request: vision, hi-res, prompt, answer tokens.

`python -m tests.bench.contenders.ways WAY BUDGET --model DIR --eager DIR --lazy DIR --tokens N` answers once, in a
process of its own, and prints the peak memory of that in bytes.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np

from engines.backend import Image
from engines.bundle.folder import Bundle
from engines.bundle.geometry import Geometry
from engines.bundle.pages import tile_order
from engines.memory import peak_rss
from engines.ort import OrtModel
from tests.bench.contenders.plain import PlainModel

CHUNK = 512  # prompt tokens fed at once, so that the scores of a long prompt fit into memory
TEXT = 24  # prompt tokens around the image, half on each side


@dataclass(frozen=True)
class Question:
    """tiles [1 + zoom*zoom, 3, lowres, lowres]: low-res image first; words [TEXT]; answer: the tokens to feed."""

    tiles: np.ndarray
    words: np.ndarray
    answer: np.ndarray

    def prompt(self, image_tokens: int) -> np.ndarray:
        """ids [1, TEXT + image_tokens] with the image in the middle."""
        before, after = self.words[None, : TEXT // 2], self.words[None, TEXT // 2 :]
        return np.concatenate((before, -1 - np.arange(image_tokens)[None], after), 1)


def question(g: Geometry, tokens: int, seed: int = 0) -> Question:
    """A random image, prompt and answer of `tokens` tokens."""
    rng = np.random.default_rng(seed)
    tiles = rng.standard_normal((1 + g.zoom**2, 3, g.lowres, g.lowres), dtype=np.float32)
    return Question(tiles, rng.integers(3, g.vocab, TEXT), rng.integers(3, g.vocab, tokens))


@dataclass
class Timing:
    """One request. `first`: seconds to the first token; `steps`: of each token after it; `logits` [tokens, vocab]."""

    first: float = 0.0
    steps: list[float] = field(default_factory=list)
    logits: np.ndarray | None = None
    projected: int = 0  # pages, summed over the reading layers


class Way:
    """One of tests.bench.requests.WAYS, with `budget` pages a layer, on an opened model."""

    def __init__(self, name: str, budget: int, model: object) -> None:
        self.name, self.budget, self.model = name, budget, model
        self.begin, self.geometry = np.array([TEXT // 2]), model.geometry

    def answer(self, asked: Question, tokens: int) -> Timing:
        """Answer with the first `tokens` of the answer's tokens."""
        result, logits = Timing(), []
        started = perf_counter()
        decoder, ids = self._start(asked)
        feed = [ids[0, -1], *asked.answer[: tokens - 1]]
        for start in range(0, ids.shape[1] - 1, CHUNK):
            decoder.run(ids[:, start : min(start + CHUNK, ids.shape[1] - 1)])
        for token in feed:
            step = decoder.run(np.array([[token]]), self.budget)
            now = perf_counter()
            result.steps.append(now - started)
            logits.append(step.logits[0])
            assert np.isfinite(logits[-1]).all(), self.name
            assert (step.page_count[:, :-1] == self.budget).all(), (self.name, step.page_count)
            started = perf_counter()
        result.first, result.logits = result.steps.pop(0), np.stack(logits)
        result.projected = self._projected(decoder, tokens)
        return result

    def _start(self, asked: Question) -> tuple[object, np.ndarray]:
        """An empty decoder that knows the image, and the prompt."""
        g, model, hires = self.geometry, self.model, None
        low = model.vision(asked.tiles[:1])
        if self.name != "low":
            hires = model.vision(asked.tiles[1:])
        pages, count = {}, g.image_tokens
        if self.name in ("eager", "lazy"):
            pages = model.project(hires, self.begin)
        elif self.name == "exhaustive":  # the hi-res image follows the low-res one, row by row
            rows = hires.numpy().reshape(1, g.hires_side**2, g.hidden)[:, tile_order(g)]
            low, count = model.buffers.of(np.concatenate((low.numpy(), rows), 1)), count + g.hires_side**2
        image = Image(low, pages, self.begin, np.zeros((1, 2), np.int64))
        ids = asked.prompt(count)
        return model.decoder(image, ids.shape[1] + len(asked.answer)), ids

    def _projected(self, decoder: object, tokens: int) -> int:
        every = len(self.geometry.reading_layers) * self.geometry.pages
        return {"eager": every}.get(self.name, 0)


class LazyWay(Way):
    """Ours with pages projected when first selected."""

    def _projected(self, decoder: object, tokens: int) -> int:
        return int(decoder._inputs["projected"].numpy().sum())


class ReferenceWay(Way):
    """A way without pages, by the PyTorch reference."""

    def _start(self, asked: Question) -> tuple[object, np.ndarray]:
        import torch

        g, count = self.geometry, self.geometry.image_tokens
        low = self.model.vision(asked.tiles[:1])
        if self.name == "exhaustive":
            rows = self.model.vision(asked.tiles[1:]).reshape(1, g.hires_side**2, g.hidden)
            low = torch.cat((low, rows[:, torch.from_numpy(tile_order(g))]), 1)
            count += g.hires_side**2
        image = Image(low, self.model.no_image(1).pages, self.begin, np.zeros((1, 2), np.int64))
        ids = asked.prompt(count)
        return self.model.decoder(image, ids.shape[1] + len(asked.answer)), ids


class OfficialWay(Way):
    """The official code's way, in PyTorch."""

    def _start(self, asked: Question) -> tuple[object, np.ndarray]:
        from tests.bench.contenders.official import OfficialDecoder

        low, hires = self.model.vision(asked.tiles[:1]), self.model.vision(asked.tiles[1:])
        image = Image(low, self.model.no_image(1).pages, self.begin, np.zeros((1, 2), np.int64))
        ids = asked.prompt(self.geometry.image_tokens)
        return OfficialDecoder(self.model, image, hires, ids.shape[1] + len(asked.answer)), ids

    def _projected(self, decoder: object, tokens: int) -> int:
        return len(self.geometry.reading_layers) * self.budget * tokens


class Models:
    """The models behind the ways, each opened when first needed."""

    def __init__(self, checkpoint: Path, eager: Path, lazy: Path, *, device: str, threads: int | None) -> None:
        self._checkpoint, self._folders = checkpoint, {"eager": eager, "lazy": lazy}
        self._device, self._threads = device, threads
        self._open: dict[str, object] = {}

    def way(self, name: str, budget: int) -> Way:
        """The way `name` with `budget` pages a layer."""
        model = self._model({"low": "plain", "exhaustive": "plain", "official": "reference"}.get(name, name))
        return {"lazy": LazyWay, "official": OfficialWay}.get(name, Way)(name, budget, model)

    def reference(self, name: str) -> Way:
        """What the way `name`, which reads no pages, must agree with."""
        return ReferenceWay(name, 0, self._model("reference"))

    def close(self) -> None:
        """Free all models."""
        self._open.clear()

    def _model(self, key: str) -> object:
        if key not in self._open:
            self._open[key] = self._reference() if key == "reference" else self._graphs(key)
        return self._open[key]

    def _graphs(self, key: str) -> OrtModel:
        opened = Bundle(self._folders.get(key, self._folders["eager"]), verify=False)
        kind = PlainModel if key == "plain" else OrtModel
        return kind(opened, device=self._device, threads=self._threads)

    def _reference(self) -> object:
        import torch  # the other ways do without

        from export.checkpoint.config import read_config
        from export.checkpoint.folder import Checkpoint
        from export.network.reference import ReferenceModel

        if self._threads is not None:
            torch.set_num_threads(self._threads)
        config = read_config(self._checkpoint)
        return ReferenceModel(config.geometry, Checkpoint.open(self._checkpoint, config.tower_folder))


def main() -> None:
    """Command line: see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way")
    parser.add_argument("budget", type=int)
    for name in ("model", "eager", "lazy"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, required=True)
    given = parser.parse_args()
    models = Models(given.model, given.eager, given.lazy, device=given.device, threads=given.threads)
    way = models.way(given.way, given.budget)
    way.answer(question(way.geometry, given.tokens), given.tokens)
    print(peak_rss())


if __name__ == "__main__":
    main()
