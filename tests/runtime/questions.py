"""The models, the pictures and the question that tests of whole answers share, and what makes two answers the same."""

from __future__ import annotations

import numpy as np

from runtime import Answer, Engine
from tests.geometries import tiny

VOCAB = 300  # room for a byte-level tokenizer
GEOMETRY = tiny(vocab=VOCAB, context=200)
TALKATIVE = tiny(vocab=VOCAB, context=800)  # room for the official system text and some turns
PHOTO = np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8)
OTHER = np.random.default_rng(1).integers(0, 256, (150, 80, 3), dtype=np.uint8)
QUESTION = "what number is in the red square?"
OPTIONS = {"max_new_tokens": 6, "trace": True, "stop_at_eos": False}


def same(left: Answer, right: Answer) -> bool:
    """Equal tokens, text and cells; logits up to the order of summation, which the cache's capacity may change."""
    return (
        left.token_ids == right.token_ids
        and left.text == right.text
        and np.abs(left.trace.logits - right.trace.logits).max() <= 1e-5
        and np.array_equal(left.trace.cells, right.trace.cells)
    )


def answers_alike(ours: Engine, theirs: Engine, **options: object) -> tuple[list[Answer], list[Answer]]:
    """Ask two backends' engines two questions about one picture, of which the second finds pages that the first has
    projected, and one without a picture: equal tokens and cells, logits within 2e-4. The answers of each."""
    found = []
    for engine in (ours, theirs):
        with engine.image(PHOTO) as view:
            questions = [view.ask(question, **options) for question in (QUESTION, "and now?")]
        found.append([*questions, engine.generate(None, "hello", **options)])
    for left, right in zip(*found, strict=True):
        assert left.token_ids == right.token_ids
        assert np.array_equal(left.trace.cells, right.trace.cells)
        assert np.abs(left.trace.logits - right.trace.logits).max() <= 2e-4
    return found[0], found[1]
