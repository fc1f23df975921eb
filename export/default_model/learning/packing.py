"""Questions of many scenes as arrays: several conversations share one image prefix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from export.default_model.asking.names import called
from export.default_model.asking.patterns import RELATIONS
from export.default_model.learning.pool import HIRES, LOWRES, lowres_shares, lowres_token
from export.default_model.questions import (
    KINDS,
    TEMPLATE,
    Mention,
    Question,
    ask,
    build_tokenizer,
    conversation_text,
    draw_kind,
)
from export.default_model.scenes import COLOURS, SHAPES, Thing

LENGTH = 72  # tokens of a conversation and its last answer, at most
TALK, TALKING = 0.2, 0.3  # share of steps with conversations, and of conversations in them; the others are short
READS = 15  # answer tokens, the end token included
PARTS, GOALS, MENTIONS, NEAR, DIGITS = 4, 9, 2, 4, 4
HARD = 0.4  # share of HARDER that are hard, in scenes that allow it, beside those that happen to be
HARDER = "one", "two", "count", "compare"  # kinds of which some are hard
BOS, EOS = 1, 2
Described = tuple[tuple[Thing, ...], tuple[int, int]]  # things of a scene, and its size: width, height


@dataclass(frozen=True)
class Batch:
    """S scenes with Q conversations each, L long, their last answers R. Positions are within a conversation; -1 = none.

    Only tokens of the last answer read pages; what came before is history.
    """

    ids: Tensor  # [S, Q, L], L <= LENGTH
    where: Tensor  # [S, Q, R], R <= READS: position whose output predicts the answer token
    answer: Tensor  # [S, Q, R]: that token, -100 after the end
    parts: Tensor  # [S, Q, R, PARTS]: hi-res patches (row * 36 + column) the digit to say can be read at
    goals: Tensor  # [S, Q, R, GOALS]: low-res tokens the answer token is about
    words: Tensor  # [S, Q, R, 2]: positions of the colour and the shape the answer token is about; twice that of a
    # comparison's relation where it is decided
    named: Tensor  # [S, Q, R, 2]: which colour and shape that is
    ends: Tensor  # [S, Q, MENTIONS]: position of the last word that names a thing
    joined: Tensor  # [S, Q, MENTIONS]: position of the colour before it
    places: Tensor  # [S, Q, MENTIONS]: low-res token of that thing, or ABSENT
    apart: Tensor  # [S, Q, 2]: whether the second thing is right of, below the first one
    count: Tensor  # [S, Q]: what is counted
    near: Tensor  # [S, Q, GOALS, NEAR]: low-res tokens that have a share of the middle of each thing that counts
    counted: Tensor  # [S, Q]: index into R of the token that says it
    holds: Tensor  # [S, Q]: whether what is asked holds of the first thing, its side or its number: 0, 1
    relation: Tensor  # [S, Q]: which of RELATIONS that is
    more: Tensor  # [S, Q]: whether the first thing is further right, or down, or its number is larger, as it asks: 0, 1
    decided: Tensor  # [S, Q]: index into R of the token that says so
    larger: Tensor  # [S, Q]: whether the first of two numbers to compare is the larger one: 0, 1
    compared: Tensor  # [S, Q]: index into R of the token that says so
    digits: Tensor  # [S, Q, DIGITS]: positions of tens and units of the first, then of the second number
    picked: Tensor  # [S, Q, R]: position of the winner's colour or shape, where a comparison answers with its name
    kind: Tensor  # [S, Q]: of the question, index into KINDS

    def to(self, device: str) -> Batch:
        """The same on a device."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


ABSENT = LOWRES * LOWRES  # the place of what is not there


@dataclass(frozen=True)
class Reads:
    """The positions of a batch that predict an answer token, V in each scene: as many as the scene with most has.

    Of a batch's R most are empty, since few answers are long; what costs much is computed for these alone.
    """

    entry: Tensor  # [S, V]: which of the Q * R entries of a scene it is
    question: Tensor  # [S, V]: of which conversation
    at: Tensor  # [S, V]: where in it
    there: Tensor  # [S, V]: bool, False for what fills a scene up to V

    @classmethod
    def of(cls, batch: Batch) -> Reads:
        """Those of a batch."""
        said = (batch.answer >= 0).flatten(1)
        entry = said.int().argsort(dim=1, descending=True, stable=True)[:, : int(said.sum(1).max())]
        at = batch.where.flatten(1).gather(1, entry)
        return cls(entry, entry // batch.where.shape[2], at, said.gather(1, entry))

    def of_entries(self, z: Tensor) -> Tensor:
        """[S, Q, R, ...] -> [S, V, ...]."""
        return _taken(z.flatten(1, 2), self.entry)

    def of_positions(self, z: Tensor) -> Tensor:
        """[S, Q, L, ...] -> [S, V, ...]."""
        return _taken(z.flatten(1, 2), self.question * z.shape[2] + self.at)

    def of_conversations(self, z: Tensor) -> Tensor:
        """[S, Q, ...] -> [S, V, ...]."""
        return _taken(z, self.question)

    def put(self, z: Tensor, values: Tensor) -> Tensor:
        """[S, Q, L, ...] with `values` [S, V, ...] at these positions. What fills a scene up goes to the last position
        of a conversation, which nothing reads."""
        length = z.shape[2]
        place = self.question * length + self.at.where(self.there, length - 1)
        index = place.reshape(*place.shape, *(1,) * (values.dim() - 2)).expand_as(values)
        return z.flatten(1, 2).scatter(1, index, values).unflatten(1, z.shape[1:3])


def _taken(z: Tensor, index: Tensor) -> Tensor:
    """[S, N, ...] at `index` [S, V] -> [S, V, ...]."""
    index = index.reshape(*index.shape, *(1,) * (z.dim() - 2)).expand(-1, -1, *z.shape[2:])
    return z.gather(1, index)


def prefix_ids(tokenizer: Tokenizer) -> list[int]:
    """Tokens before the image."""
    return [BOS, *tokenizer.encode(TEMPLATE.split("<image>")[0], add_special_tokens=False).ids]


def pack(
    rng: np.random.Generator,
    scenes: list[Described],
    count: int,
    tokenizer: Tokenizer,
    *,
    wording: str = "train",
    talking: float | None = None,
    hard: float = 0.0,
) -> Batch:
    """`count` random conversations about each scene; `talking`: the share of those with history, None = as SHARES;
    `hard`: the share of HARDER kinds that are hard (`ask`) if the scene allows it."""
    rows = []
    for things, size in scenes:
        own: list[dict[str, np.ndarray]] = []
        while len(own) < count:
            kind = draw_kind(rng)
            if talking is not None:
                follow = rng.random() < talking
                while (kind == "follow-up") != follow:
                    kind = "follow-up" if follow else draw_kind(rng)
            difficult = kind in HARDER and rng.random() < hard
            question = ask(rng, things, size, kind, wording=wording, hard=difficult)
            row = None if question is None else arranged(question, things, tokenizer)
            if row is not None:
                own.append(row)
        rows.append(own)
    stacked = {
        field.name: np.array([[row[field.name] for row in own] for own in rows], np.int64) for field in fields(Batch)
    }
    reads = int((stacked["answer"] >= 0).sum(-1).max())
    length = int(stacked["where"].max()) + 2  # one more than is used: what lies behind an answer's end goes there
    for name in ("where", "answer", "parts", "goals", "words", "named", "picked"):
        stacked[name] = stacked[name][:, :, :reads]
    stacked["ids"] = stacked["ids"][:, :, :length]
    return Batch(**{name: torch.from_numpy(values.copy()) for name, values in stacked.items()})


def arranged(question: Question, things: tuple[Thing, ...], tokenizer: Tokenizer) -> dict[str, np.ndarray] | None:
    """The arrays of one conversation; None if it is too long."""
    text = conversation_text(question)
    asked = tokenizer.encode(text, add_special_tokens=False)
    said = tokenizer.encode(question.answer, add_special_tokens=False)
    answer = [*said.ids, EOS]
    if len(asked.ids) + len(answer) - 1 > LENGTH or len(answer) > READS:
        return None
    row = {
        "ids": np.zeros(LENGTH + 1, np.int64), "where": np.zeros(READS, np.int64), "answer": np.full(READS, -100),
        "parts": np.full((READS, PARTS), -1), "goals": np.full((READS, GOALS), -1), "words": np.full((READS, 2), -1),
        "named": np.full((READS, 2), -1), "ends": np.full(MENTIONS, -1), "joined": np.full(MENTIONS, -1),
        "places": np.full(MENTIONS, -1), "apart": np.full(2, -1), "count": np.array(-1), "counted": np.array(0),
        "near": np.full((GOALS, NEAR), -1),
        "holds": np.array(-1), "relation": np.array(-1), "more": np.array(-1), "decided": np.array(0),
        "larger": np.array(-1), "compared": np.array(0), "digits": np.full(DIGITS, -1), "picked": np.full(READS, -1),
        "kind": np.array(KINDS.index(question.kind)),
    }  # fmt: skip
    row["ids"][: len(asked.ids) + len(answer) - 1] = [*asked.ids, *answer[:-1]]
    row["where"][: len(answer)] = len(asked.ids) - 1 + np.arange(len(answer))
    row["answer"][: len(answer)] = answer
    begin = len(text) - len(" answer:") - len(question.text)
    spoken = [
        [None if span is None else _token(asked, begin + span[1] - 1) for span in (mention.colour_at, mention.shape_at)]
        for mention in question.mentions
    ]
    _mentions(row, question, things, spoken)
    _answers(row, question, things, said, spoken)
    if question.kind == "compare":
        assert question.relation_at is not None
        row["words"][row["decided"]] = _token(asked, begin + question.relation_at[1] - 1)
    if row["holds"] >= 0:
        row["relation"] = np.array(list(RELATIONS).index(question.relation))
        row["more"] = np.array(bool(row["holds"]) == bool(row["relation"] % 2))
    return row


def _token(encoding: Encoding, character: int) -> int:
    """The token a character of the text lies in."""
    for index, (first, last) in enumerate(encoding.offsets):
        if first <= character < last:
            return index
    raise ValueError(f"no token holds character {character} of {encoding.tokens}")


def _mentions(row: dict[str, np.ndarray], question: Question, things: tuple[Thing, ...], spoken: list) -> None:
    for index, (mention, at) in enumerate(zip(question.mentions[:MENTIONS], spoken, strict=False)):
        positions = [position for position in at if position is not None]
        if not positions or (mention.thing is None and question.kind in ("count", "follow-up")):
            continue
        row["ends"][index] = max(positions)
        if len(positions) == 2:
            row["joined"][index] = min(positions)
        row["places"][index] = ABSENT if mention.thing is None else lowres_token(*things[mention.thing].centre)
    if len(question.mentions) == 2 and all(mention.thing is not None for mention in question.mentions):
        first, second = (things[mention.thing].centre for mention in question.mentions)
        for axis in (0, 1):
            if abs(second[axis] - first[axis]) > 30:
                row["apart"][axis] = second[axis] > first[axis]
    if question.kind == "side":
        row["holds"] = np.array(question.answer.startswith("yes"))


def _answers(
    row: dict[str, np.ndarray], question: Question, things: tuple[Thing, ...], said: Encoding, spoken: list
) -> None:
    by_thing = {mention.thing: index for index, mention in enumerate(question.mentions) if mention.thing is not None}

    def about(token: int, mention: int) -> None:
        named: Mention = question.mentions[mention]
        row["words"][token] = [-1 if position is None else position for position in spoken[mention]]
        row["named"][token, 0] = -1 if named.colour is None else list(COLOURS).index(named.colour)
        row["named"][token, 1] = -1 if named.shape is None else SHAPES.index(named.shape)

    read = {_token(said, offset): (thing, digit) for offset, thing, digit in question.reads}
    for token, (thing, digit) in list(read.items()):
        if digit == len(things[thing].number) - 1 and token + 1 not in read:
            read[token + 1] = thing, digit  # whether the number ends there is seen there, too
    for token, (thing, digit) in read.items():
        parts = things[thing].parts(digit)[:PARTS]
        row["parts"][token, : len(parts)] = parts
        low = list(dict.fromkeys(part // HIRES // 3 * LOWRES + part % HIRES // 3 for part in parts))
        row["goals"][token, : len(low)] = low
        if thing in by_thing:
            about(token, by_thing[thing])
    if question.kind == "compare":
        first, second = (int(things[thing].number) for thing in dict.fromkeys(thing for _, thing, _ in question.reads))
        comma = max(read)  # "58 and 35, the first is larger, yes", or "58 and 35, the first is larger, the red star"
        row["larger"], row["compared"] = np.array(first > second), np.array(comma + 2)
        row["decided"] = np.array(comma + 6)
        for offset, thing, digit in question.reads:  # tens or units, of the first thing or the second
            at = 2 * (thing != question.reads[0][1]) + 2 - len(things[thing].number) + digit
            row["digits"][at] = row["where"][_token(said, offset)] + 1
        names = [called(mention.colour, mention.shape) for mention in question.mentions]
        row["holds"] = np.array(question.answer.endswith(("yes", names[0])))
        if question.answer.endswith(tuple(names)):
            row["picked"][comma + 7 : comma + 9] = spoken[0 if row["holds"] else 1]
    goals = list(dict.fromkeys(lowres_token(*things[index].centre) for index in question.about))[:GOALS]
    first = 0
    if question.kind == "count":
        first = _token(said, next(index for index, character in enumerate(question.answer) if character.isdigit()))
        row["count"] = np.array(int("".join(c for c in question.answer if c.isdigit())))
        row["counted"] = np.array(first)
        for index, thing in enumerate(question.about[:GOALS]):
            shared = list(lowres_shares(*things[thing].centre))
            row["near"][index, : len(shared)] = shared
    last = len(said.ids) if question.kind in ("colour", "shape", "where") else first + 1
    for token in range(first, last):
        if token not in read:
            row["goals"][token, : len(goals)] = goals
            if question.mentions:
                about(token, 0)


class Lessons(Dataset[tuple[list[int], Batch]]):
    """Step i -> which scenes, and conversations about them. The same whoever asks, in any order."""

    def __init__(self, scenes: list[Described], steps: int, per_step: tuple[int, int], seed: int) -> None:
        self.scenes, self.steps, self.per_step, self.seed = scenes, steps, per_step, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[list[int], Batch]:
        rng = np.random.default_rng([self.seed, step])
        chosen = rng.integers(len(self.scenes), size=self.per_step[0]).tolist()
        talking = TALKING if rng.random() < TALK else 0.0
        scenes = [self.scenes[index] for index in chosen]
        return chosen, pack(rng, scenes, self.per_step[1], _tokenizer(), talking=talking, hard=HARD)

    def ahead(self, workers: int) -> Iterator[tuple[list[int], Batch]]:
        """All steps in order, made by other processes while training runs."""
        return iter(DataLoader(self, batch_size=None, num_workers=workers, prefetch_factor=8 if workers else None))


_made: list[Tokenizer] = []


def _tokenizer() -> Tokenizer:
    if not _made:
        _made.append(build_tokenizer())
    return _made[0]
