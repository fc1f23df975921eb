"""What the evaluation counts, on answers we write: half of the numbers that tiles cut wrong, all others right, and who
wins a comparison apart from its numbers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from export.default_model.evaluate import Tally
from export.default_model.questions import KINDS, ask, build_tokenizer
from export.default_model.scenes import make_scene

GRID = 9  # pages per side


def answer(text: str, pages: float, read: np.ndarray) -> SimpleNamespace:
    tokens = build_tokenizer().encode(text, add_special_tokens=False).ids
    cells = np.broadcast_to(read, (16, 7, GRID, GRID))
    stats = SimpleNamespace(pages_read=np.full(7, pages))
    return SimpleNamespace(text=text, token_ids=tokens, stats=stats, trace=SimpleNamespace(cells=cells))


def test_numbers_that_tiles_cut_are_counted_apart():
    tally, cut, everywhere = Tally(), 0, np.ones((GRID, GRID), bool)
    for seed in range(30):
        scene = make_scene(np.random.default_rng(seed), "test")
        question = ask(np.random.default_rng(seed), scene.things, scene.image.size, "one")
        is_cut = scene.things[question.about[0]].cut
        cut += is_cut
        text = "no number" if is_cut and cut % 2 else question.answer
        tally.add(question, scene, answer(text, 2.0, everywhere))
    assert cut >= 4 and len(tally.single[True]) == cut and len(tally.single[False]) == 30 - cut
    share = 100 * (cut // 2) / cut
    assert tally.sentences() == [
        f"Of single numbers that a tile's border cuts {share:.1f} % are right, of others 100.0 %."
    ]
    row = tally.row()
    assert row[0] == f"{100 * (30 - cut + cut // 2) / 30:.1f}" and row[1 : len(KINDS)] == ["-"] * (len(KINDS) - 1)
    assert row[len(KINDS) :] == ["2.0", "100.0"]


def test_who_wins_is_counted_apart_from_the_numbers():
    scene = make_scene(np.random.default_rng(1), "test")
    question = ask(np.random.default_rng(1), scene.things, scene.image.size, "compare")
    tally, nowhere = Tally(), np.zeros((GRID, GRID), bool)
    verdict = question.answer.split(", ", 1)[1]
    for text in (question.answer, f"0 and 0, {verdict}", "nothing"):
        tally.add(question, scene, answer(text, 0.0, nowhere))
    assert tally.row()[KINDS.index("compare")] == "33.3"
    assert tally.sentences() == ["Of comparisons 66.7 % say rightly who wins."]
