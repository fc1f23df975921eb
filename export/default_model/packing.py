"""Questions of many scenes as arrays: several questions share one image prefix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from export.default_model.questions import KINDS, TEMPLATE, Question, ask
from export.default_model.scenes import COLOURS, SHAPES, Thing

LENGTH = 28  # tokens of a question and its answer
READS = 6  # answer tokens, the end token included: "12 and 34" and the end
SHARES = (0.34, 0.30, 0.22, 0.14)  # of the kinds of questions
BOS, EOS = 1, 2
Encoded = dict[str, tuple[list[int], list[str]]]  # a text -> its ids and tokens


@dataclass(frozen=True)
class Batch:
    """S scenes with Q questions each. Positions are within question and answer, LENGTH long."""

    ids: Tensor  # [S, Q, LENGTH]
    where: Tensor  # [S, Q, READS]: position whose output predicts the answer token
    answer: Tensor  # [S, Q, READS]: that token, -100 after the end
    target: Tensor  # [S, Q, READS]: hi-res patch (row * 36 + column) of the digit to look at, -1 = none
    words: Tensor  # [S, Q, READS, 2]: positions of the colour and the shape the token is about, -1 = none
    named: Tensor  # [S, Q, READS, 2]: which colour and shape that is, -1 = none
    kind: Tensor  # [S, Q]: of the question, index into KINDS


def prefix_ids(tokenizer: Tokenizer) -> list[int]:
    """Tokens before the image."""
    return [BOS, *tokenizer.encode(TEMPLATE.split("<image>")[0], add_special_tokens=False).ids]


def pack(
    rng: np.random.Generator,
    scenes: list[tuple[Thing, ...]],
    questions: int,
    tokenizer: Tokenizer,
    encoded: Encoded,
) -> Batch:
    """Random questions about scenes; `encoded` remembers the tokens of texts."""
    rows = [
        [_row(ask(rng, things, _kind(rng, things)), things, tokenizer, encoded) for _ in range(questions)]
        for things in scenes
    ]
    return Batch(*(torch.from_numpy(np.array([[row[i] for row in scene] for scene in rows])) for i in range(7)))


def _kind(rng: np.random.Generator, things: tuple[Thing, ...]) -> str:
    kind = KINDS[int(rng.choice(len(KINDS), p=SHARES))]
    return "one" if kind == "two" and len(things) < 2 else kind


def _row(question: Question, things: tuple[Thing, ...], tokenizer: Tokenizer, encoded: Encoded) -> tuple[Any, ...]:
    def tokens(text: str) -> tuple[list[int], list[str]]:
        if text not in encoded:
            encoding = tokenizer.encode(text, add_special_tokens=False)
            encoded[text] = encoding.ids, encoding.tokens
        return encoded[text]

    asked, texts = tokens(TEMPLATE.split("<image>")[1].format(prompt=question.text))
    answer = [*tokens(question.answer)[0], EOS]
    ids = np.zeros(LENGTH, np.int64)
    ids[: len(asked) + len(answer) - 1] = [*asked, *answer[:-1]]
    where, wanted = np.zeros(READS, np.int64), np.full(READS, -100, np.int64)
    where[: len(answer)] = len(asked) - 1 + np.arange(len(answer))
    wanted[: len(answer)] = answer
    target, words = np.full(READS, -1, np.int64), np.full((READS, 2), -1, np.int64)
    named = np.full((READS, 2), -1, np.int64)
    kinds = [(list(COLOURS).index(colour), SHAPES.index(shape)) for colour, shape in question.mentions]
    places, start = [], 0
    for colour, shape in question.mentions:
        start = texts.index(f"\u2581{colour}", start) + 1
        places.append((start - 1, texts.index(f"\u2581{shape}", start)))
    by_name = {(thing.colour, thing.shape): thing for thing in things}
    if question.kind in ("one", "two"):
        token = 0
        for mention, place, kind in zip(question.mentions, places, kinds, strict=True):
            cells = by_name[mention].cells
            for index in range(len(cells) + 1):  # the token after the last digit is about the same thing
                row, column = cells[min(index, len(cells) - 1)]
                target[token], words[token], named[token] = row * 36 + column, place, kind
                token += 1
    elif places:
        words[0], named[0] = places[0], kinds[0]
        if question.mentions[0] in by_name:
            row, column = by_name[question.mentions[0]].cells[0]
            target[0] = row * 36 + column
    return ids, where, wanted, target, words, named, np.int64(KINDS.index(question.kind))
