"""What an engine is asked, and the greedy answer to a prompt that is spelt out: in float64, in the official way of
computing, with none of this project's prompt or model code behind the vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from safetensors.torch import load_file
from tokenizers import Tokenizer

from engines.bundle.geometry import Geometry
from runtime.preprocess import preprocess
from runtime.view import ImageView
from tests.geometries import tiny
from tests.parity.official import Official
from tests.parity.requests import load
from tests.runtime.questions import VOCAB

BOS, EOS = 1, 2
ROOMY = tiny(vocab=VOCAB, context=1400)  # room for the official system text, in characters, and an answer of 512
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
FEW = 6  # tokens of the answers that are compared


def answer(checkpoint: Path, g: Geometry, image: PIL.Image.Image, text: str) -> str:
    """The first FEW tokens of the answer to a prompt that has "<image>" in it, or those before the end token."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    features = load(checkpoint).vision(preprocess(image, g))
    hires = features[1:].view(g.zoom, g.zoom, g.grid, g.grid, -1).transpose(1, 2).reshape(g.hires_side**2, -1)
    before, after = (tokenizer.encode(part, add_special_tokens=False).ids for part in text.split("<image>"))
    begin = 1 + len(before)
    run = Official(load_file(checkpoint / "model.safetensors"), g, features[0], hires, begin, image.size)
    run.run([BOS, *before, *(-1 - np.arange(g.image_tokens)).tolist(), *after[:-1]])
    tokens = [after[-1]]
    while len(tokens) <= FEW and tokens[-1] != EOS:
        tokens.append(int(run.run(tokens[-1:])[0].argmax()))
    return tokenizer.decode(tokens[1:], skip_special_tokens=True).strip()


def watch(monkeypatch) -> list[tuple[str, dict[str, Any]]]:
    """Prompts and options that views are asked with from now on; no answer has more than FEW tokens."""
    asked, ask = [], ImageView.ask

    def few(self, prompt, **options):
        asked.append((prompt, options))
        return ask(self, prompt, **{**options, "max_new_tokens": FEW})

    monkeypatch.setattr(ImageView, "ask", few)
    return asked
