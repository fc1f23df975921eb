"""What a question is, and the text that it stands in."""

from __future__ import annotations

from dataclasses import dataclass

from export.default_model.asking.names import Span
from export.default_model.scenes import CANVAS

TEMPLATE = "<image>\n{prompt} answer:"
TURN = " {answer}\n{prompt} answer:"
MARGIN = 0.035  # of width or height: nearer to the border between two zones, a point is in none
ROWS, COLUMNS = ("top ", "", "bottom "), ("left", "", "right")


@dataclass(frozen=True)
class Mention:
    """A thing, or things, that a question's own text names.

    colour, shape: None where the text has no word for it. thing: index of the one thing it means; None: there is none,
    or any number of things is meant. colour_at, shape_at: where these words are in the text, in characters.
    """

    colour: str | None
    shape: str | None
    thing: int | None
    colour_at: Span | None
    shape_at: Span | None


@dataclass(frozen=True)
class Question:
    """reads: (character of the answer, index of the thing, index of its digit) for each digit that is read off the
    picture. about: things that the answer's first token is about. history: earlier questions with their answers.
    relation: one of patterns.RELATIONS, where a question asks whether, or of which of two things, it holds;
    relation_at: where the word for it is in the text, in characters."""

    kind: str
    text: str
    answer: str
    mentions: tuple[Mention, ...] = ()
    reads: tuple[tuple[int, int, int], ...] = ()
    about: tuple[int, ...] = ()
    history: tuple[tuple[str, str], ...] = ()
    relation: str = ""
    relation_at: Span | None = None


def conversation_text(question: Question) -> str:
    """What stands behind the image: history and question, up to and including " answer:"."""
    texts = [*(text for text, _ in question.history), question.text]
    text = TEMPLATE.split("<image>")[1].format(prompt=texts[0])
    for (_, answer), following in zip(question.history, texts[1:], strict=True):
        text += TURN.format(answer=answer, prompt=following)
    return text


def zone(centre: tuple[float, float], size: tuple[int, int]) -> str | None:
    """Where in the picture a point is: "top left" .. "centre" .. "bottom right"; None near a border between zones.

    `centre`: x and y in pixels of the padded square; `size`: width and height of the picture in its middle."""
    found = []
    for at, length in zip(centre, size, strict=True):
        share = (at - (CANVAS - length) // 2) / length
        if min(abs(share - 1 / 3), abs(share - 2 / 3)) < MARGIN:
            return None
        found.append(int(share > 1 / 3) + int(share > 2 / 3))
    return (ROWS[found[1]] + COLUMNS[found[0]]).strip() or "centre"


def larger(first: int, second: int) -> str:
    """What stands between two numbers that were read and what was asked of them: comparing is a step of its own."""
    return f"the {'first' if first > second else 'second'} is larger"
