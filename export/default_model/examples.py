"""Draws the example scenes with their questions: `python -m export.default_model.examples`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from export.default_model.questions import ask
from export.default_model.scenes import make_scene

FOLDER = Path("examples")
SCENES = {  # name: seed, aspect
    "garden": (31, 1.0), "postcard": (32, 1.5), "tower": (33, 0.65), "banner": (34, 1.6), "window": (35, 1.25),
    "poster": (36, 0.75), "plaza": (37, 1.1),
}  # fmt: skip


def main() -> None:
    """Write PNG files and examples.json: image, question and right answer. Digits are of the test split."""
    FOLDER.mkdir(exist_ok=True)
    rows = []
    for name, (seed, aspect) in SCENES.items():
        rng = np.random.default_rng(seed)
        scene = make_scene(rng, "test", aspect=aspect)
        scene.image.save(FOLDER / f"{name}.png", optimize=True)
        for kind in ("one", "two", "yes/no", "count"):
            question = ask(rng, scene.things, kind)
            rows.append({"image": f"{name}.png", "question": question.text, "answer": question.answer})
    (FOLDER / "examples.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
