"""A score by the reference model: each continuation from its prompt on, in a cache of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from engines.bundle.pages import margins
from export.network.reference import ReferenceModel
from runtime import Engine, Score
from runtime.preprocess import preprocess
from tests.parity.requests import LOGITS, encode, steps


@dataclass(frozen=True)
class Alone:
    """Of T tokens: log-probabilities [T] float64, whether each is the likeliest [T], cells bool [T, M, C * C]."""

    logprobs: np.ndarray
    likeliest: np.ndarray
    cells: np.ndarray


def alone(
    model: ReferenceModel, image: np.ndarray | None, input_ids: list[int], tokens: list[int], budget: int
) -> Alone:
    """`image`: [H, W, 3]. `input_ids`: the prompt, -200 for the image, put there by this function alone."""
    g = model.geometry
    if image is None:
        ids, encoded, budget = input_ids, model.no_image(1), 0
    else:
        at = input_ids.index(-200)
        ids = [*input_ids[:at], *(-1 - np.arange(g.image_tokens)), *input_ids[at + 1 :]]
        height, width = image.shape[:2]
        sides = margins(width, height, g.grid)
        encoded = encode(model, preprocess(Image.fromarray(image), g), np.array([at]), sides)
    found = steps(model, encoded, np.array([ids]), tokens[:-1], budget)
    logits = np.concatenate([step.logits for step in found]).astype(np.float64)
    likelihoods = np.exp(logits - logits.max(1, keepdims=True))
    chosen = likelihoods[np.arange(len(tokens)), tokens] / likelihoods.sum(1)
    return Alone(
        np.log(chosen), logits.argmax(1) == tokens, np.concatenate([step.cells() for step in found]).astype(bool)
    )


def assert_alone(score: Score, expected: Alone) -> None:
    """The score is the reference's, within the error of float32 logits."""
    assert score.logprobs.dtype == np.float64 and score.logprobs.shape == expected.logprobs.shape
    assert np.abs(score.logprobs - expected.logprobs).max() <= LOGITS
    assert np.array_equal(score.cells.reshape(expected.cells.shape), expected.cells)
    assert np.array_equal(score.pages_read, expected.cells.sum(-1)[:, :-1])
    assert score.greedy == bool(expected.likeliest.all())
    assert score.sum == pytest.approx(score.logprobs.sum(), abs=1e-12)
    assert score.mean == pytest.approx(score.logprobs.mean(), abs=1e-12)


def same(left: Score, right: Score) -> bool:
    """Equal tokens, cells and pages; log-probabilities up to the order of summation."""
    return (
        (left.token_ids, left.tokens, left.greedy) == (right.token_ids, right.tokens, right.greedy)
        and np.abs(left.logprobs - right.logprobs).max() <= 1e-5
        and np.array_equal(left.cells, right.cells)
        and np.array_equal(left.pages_read, right.pages_read)
    )


def in_context(engine: Engine, question: str, answer: str, image: bool) -> tuple[list[int], list[int]]:
    """Prompt and answer, tokenised as one text behind the image, by the bundle's tokenizer alone: what tests' bundles
    have as template, spelt out. The answer's tokens are those that do not end within the prompt. What looks like a
    control token is letters."""
    settings = json.loads(engine.prompter._required().to_str())
    tokenizer = Tokenizer.from_str(json.dumps({**settings, "added_tokens": []}))
    before, behind = "USER: ", f"\n{question} ASSISTANT:"
    pieces = [before, behind] if image else [before + behind.removeprefix("\n")]
    whole = tokenizer.encode(f"{pieces[-1]} {answer}", add_special_tokens=False)
    inside = sum(end <= len(pieces[-1]) for _, end in whole.offsets)
    head = [1, *tokenizer.encode(before, add_special_tokens=False).ids, -200] if image else [1]
    return [*head, *whole.ids[:inside]], whole.ids[inside:]
