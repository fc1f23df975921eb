"""How things are called, in questions and in answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from export.default_model.asking.patterns import pick
from export.default_model.scenes import Thing

Name = tuple[str | None, str | None]  # colour and shape, one of which may be left out
Span = tuple[int, int]  # begin and end of a word in a text, in characters

THING = (("shape", "shapes"), ("thing", "things"), ("figure", "figures"), ("object", "objects"))
ONE = (("one", "ones"),)
SHAPE_NAMES = {  # the first is what answers say; one and many
    "circle": (("circle", "circles"), ("disc", "discs"), ("disk", "disks"), ("round shape", "round shapes")),
    "square": (("square", "squares"), ("box", "boxes")),
    "triangle": (("triangle", "triangles"),),
    "diamond": (("diamond", "diamonds"), ("rhombus", "rhombuses")),
    "star": (("star", "stars"),),
    "heart": (("heart", "hearts"),),
    "cross": (("cross", "crosses"), ("plus", "pluses")),
}
COLOUR_NAMES = {"purple": ("violet",), "cyan": ("turquoise",)}  # besides their own
SYNONYMS = 0.1  # share of names that are not the first


@dataclass(frozen=True)
class Words:
    """What fills a slot, and where in `text` its words for a colour and a shape are."""

    text: str
    colour_at: Span | None = None
    shape_at: Span | None = None

    def behind(self, text: str) -> Words:
        """The same with `text` in front: "the "."""
        moved = [at and (at[0] + len(text), at[1] + len(text)) for at in (self.colour_at, self.shape_at)]
        return Words(text + self.text, *moved)


def name(
    rng: np.random.Generator,
    colour: str | None,
    shape: str | None,
    *,
    many: bool = False,
    nouns: Sequence[tuple[str, str]] = THING,
) -> Words:
    """A thing as somebody may call it, "violet box"; `many`: "violet boxes". Without a shape a noun takes its place;
    without a colour the shape is alone."""
    said = colour
    if colour in COLOUR_NAMES and rng.random() < SYNONYMS:
        said = pick(rng, COLOUR_NAMES[colour])
    if shape is None:
        noun = pick(rng, nouns)[many]
    else:
        names = SHAPE_NAMES[shape]
        noun = (pick(rng, names[1:]) if len(names) > 1 and rng.random() < SYNONYMS else names[0])[many]
    text = f"{said} {noun}" if said else noun
    begin = len(text) - len(noun)
    return Words(
        text,
        (0, len(said)) if said else None,
        (begin, begin + len(noun.split()[0])) if shape else None,
    )


def called(colour: str | None, shape: str | None, many: bool = False) -> str:
    """A thing as answers call it: "red star", "star", "red shape"."""
    noun = (SHAPE_NAMES[shape] if shape else THING)[0][many]
    return f"{colour} {noun}" if colour else noun


def matches(name: Name, things: Sequence[Thing]) -> tuple[int, ...]:
    """Things that a name fits, by their index."""
    colour, shape = name
    return tuple(i for i, thing in enumerate(things) if colour in (None, thing.colour) and shape in (None, thing.shape))


def article(text: str) -> str:
    """ "a " or "an ", whichever `text` wants."""
    return "an " if text[0] in "aeiou" else "a "


def fill(template: str, words: Sequence[Words]) -> tuple[str, list[Words]]:
    """A template with its slots filled in turn, and the same words with their places in that text."""
    pieces = template.split("{}")
    text, placed = pieces[0], list[Words]()
    for filling, piece in zip(words, pieces[1:], strict=True):
        placed.append(filling.behind(text))
        text += filling.text + piece
    return text, placed
