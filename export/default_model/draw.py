"""Draws scenes for who asks line by line, in a process of its own: `python -m export.default_model.draw`.

The page of the server offers new scenes. They need torch, which the server must not import; so it starts this, writes
`{"seed": 7}` in a line of standard input, and reads a line of standard output: `{"seed": 7, "image": PNG in base64,
"questions": [{"question": ..., "answer": ...}, ...]}`. It ends with its standard input.
"""

from __future__ import annotations

import base64
import io
import json
import sys

import numpy as np
import torch

from export.default_model.questions import KINDS, ask
from export.default_model.scenes import make_scene


def draw(seed: int) -> dict:
    """The scene of a seed, a whole number from 0 on: `seed`, `image` (PNG, base64), `questions` with their right
    answers, one of each kind that the scene allows. Digits are of the test split, which no training saw.

    Follow-ups are left out: they need the question before them."""
    rng = np.random.default_rng(seed)
    scene = make_scene(rng, "test")
    png = io.BytesIO()
    scene.image.save(png, "PNG")
    asked = [ask(rng, scene.things, scene.image.size, kind) for kind in KINDS if kind != "follow-up"]
    return {
        "seed": seed,
        "image": base64.b64encode(png.getvalue()).decode(),
        "questions": [{"question": each.text, "answer": each.answer} for each in asked if each is not None],
    }


def main() -> None:
    """Answer every line of standard input."""
    torch.set_num_threads(1)  # a scene is small, and the server's model wants the cores
    for line in sys.stdin:
        print(json.dumps(draw(json.loads(line)["seed"])), flush=True)


if __name__ == "__main__":
    main()
