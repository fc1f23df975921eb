"""Draws the example scenes with their questions: `python -m export.default_model.examples`.

Pictures were chosen by looking at them; questions are written by hand, with their names in brackets. Answers are read
off the scenes. `examples.json`: a list of `image`, `question`, `answer`, and `history` where a question is a follow-up:
[question, answer] of each turn before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from export.default_model.asking import unknown
from export.default_model.asking.names import Name, article, called, matches
from export.default_model.asking.patterns import RELATIONS
from export.default_model.asking.question import larger, zone
from export.default_model.scenes import COLOURS, SHAPES, Scene, Style, Thing, make_scene

FOLDER = Path("examples")
SCENES = {  # name: seed, style
    "garden": (4, Style(aspect=1.0)),
    "postcard": (6, Style(aspect=1.5)),
    "tower": (34114, Style(aspect=0.65)),
    "banner": (10, Style(aspect=1.6)),
    "window": (35655, Style(aspect=1.25)),
    "poster": (55384, Style(aspect=0.75)),
    "plaza": (13, Style(aspect=1.1)),
    "night": (18, Style(aspect=1.3, background="dark")),
    "beach": (22, Style(aspect=1.5, background="coloured")),
    "photo": (26, Style(aspect=1.2, photo=True)),
    "market": (29, Style(aspect=1.35, clutter=2.0)),
    "evening": (33, Style(aspect=0.9, background="dark", quality=75)),
}
Asked = tuple[str, str]  # kind, and text with its names in brackets
QUESTIONS: Mapping[str, Sequence[Sequence[Asked]]] = {  # of each scene; of several turns the last is the question
    "garden": (
        [("one", "what number is in the [yellow star]?")],
        [("count", "how many [circles] are there?")],
        [("where", "where is the [green triangle]?")],
    ),
    "postcard": (
        [("count", "count the [stars].")],
        [("compare", "is the number in the [red star] larger than in the [blue star]?")],
        [("one", "what number is in the [green star]?")],
    ),
    "tower": (
        [("one", "read the number on the [green triangle].")],
        [("side", "is the [yellow star] left of the [orange circle]?")],
        [("one", "what number is in the [red diamond]?"), ("one", "and in the [yellow one]?")],
    ),
    "banner": (
        [("two", "what numbers are in the [cyan star] and the [orange cross]?")],
        [("colour", "what colour is the [star], in one word?")],
        [("shape", "what shape is [orange]?")],
    ),
    "window": (
        [("one", "what number is in the [green triangle]?")],
        [("where", "where is the [purple heart]? answer in a sentence.")],
        [("yes/no", "is there a [blue circle]?")],
    ),
    "poster": (
        [("two", "what numbers are in the [red star] and the [cyan circle]?")],
        [("one", "which number does the [orange triangle] show?")],
        [("yes/no", "is there a [pink circle]?")],
    ),
    "plaza": (
        [("count", "how many [squares] are there?")],
        [("which", "which has the larger number, the [pink heart] or the [purple heart]?")],
        [("count", "how many [hearts] are there?"), ("count", "and how many [red ones]?")],
    ),
    "night": (
        [("two", "read the numbers on the [cyan triangle] and the [purple heart].")],
        [("where", "where is the [green star]?")],
        [("count", "how many [yellow shapes] are there?")],
    ),
    "beach": (
        [("count", "how many [pink shapes] do you see? answer in a sentence.")],
        [("side", "is the [pink cross] above the [pink triangle]?")],
        [("one", "in a sentence: what number is in the [blue diamond]?")],
    ),
    "photo": (
        [("count", "how many [hearts] are there?")],
        [("one", "what number has the [red heart]?")],
        [("where", "where is the [green heart]?"), ("where", "and the [yellow one]?")],
    ),
    "market": (
        [("colour", "what colour is the [star]?")],
        [("shape", "what is the [green] thing?")],
        [("compare", "does the [cyan triangle] have a larger number than the [red cross]?")],
    ),
    "evening": (
        [("count", "how many [blue shapes] are there?")],
        [("side", "is the [yellow triangle] below the [red triangle]?")],
        [("unknown", "where is the dog?")],
    ),
}
STRIP = ("poster", "banner", "night", "photo", "tower", "beach")  # what README shows in one row
STRIP_WIDTH, GAP = 1200, 8  # pixels


def draw(name: str) -> Scene:
    """The scene of a name. Digits are of the test split, which no training saw."""
    seed, style = SCENES[name]
    return make_scene(np.random.default_rng(seed), "test", style)


def rows(name: str, scene: Scene) -> list[dict[str, Any]]:
    """What examples.json says of a scene."""
    found = []
    for turns in QUESTIONS[name]:
        said = [[re.sub(r"[][]", "", text), answer(kind, text, scene)] for kind, text in turns]
        question, last = said.pop()
        row: dict[str, Any] = {"image": f"{name}.png", "question": question, "answer": last}
        found.append(row | ({"history": said} if said else {}))
    return found


def answer(kind: str, text: str, scene: Scene) -> str:
    """The right answer to a question about a scene, as the model is trained to give it. ValueError for a question that
    has none: a name that fits several things, a place near the border of two zones."""
    names = [_named(words) for words in re.findall(r"\[(.+?)\]", text)]
    fitting = [[scene.things[index] for index in matches(name, scene.things)] for name in names]
    if kind == "unknown":
        return unknown.ANSWER
    first, spoken = called(*names[0]), "sentence" in text
    if kind == "count":
        count = len(fitting[0])
        many = called(*names[0], many=count != 1)
        return f"there {'is' if count == 1 else 'are'} {count} {many}" if spoken else str(count)
    if kind == "yes/no":
        there = bool(fitting[0])
        more = f", there is {article(first) if there else 'no '}{first}" if spoken else ""
        return ("yes" if there else "no") + more
    for name, things in zip(names, fitting, strict=True):
        if not things:
            return f"there is no {called(*name)}" if name[1] else f"there is nothing {name[0]}"
        if len(things) > 1:
            raise ValueError(f"{text}: {called(*name)} is one of {len(things)}")
    thing, *others = (things[0] for things in fitting)
    if kind == "one":
        return f"the number in the {first} is {thing.number}" if spoken else thing.number
    if kind == "colour":
        return f"the {thing.shape} is {thing.colour}" if spoken else thing.colour
    if kind == "shape":
        return thing.shape
    if kind == "where":
        place = zone(thing.centre, scene.image.size)
        if place is None:
            raise ValueError(f"{text}: it lies near the border of two zones")
        return f"the {first} is at the {place}" if spoken else place
    (other,) = others
    if kind == "two":
        return f"{thing.number} and {other.number}"
    relation = next(key for key, wordings in RELATIONS.items() if any(f" {each} " in text for each in wordings))
    holds = _holds(relation, thing, other)
    if kind == "side":
        return "yes" if holds else "no"
    wins = thing if holds else other
    last = f"the {wins.name}" if kind == "which" else "yes" if holds else "no"
    return f"{thing.number} and {other.number}, {larger(int(thing.number), int(other.number))}, {last}"


def _named(words: str) -> Name:
    colour = next((colour for colour in COLOURS if colour in words.split()), None)
    return colour, next((shape for shape in SHAPES if shape in words), None)  # also of many: "crosses"


def _holds(relation: str, thing: Thing, other: Thing) -> bool:
    (x, y), (a, b) = thing.centre, other.centre
    number, than = int(thing.number), int(other.number)
    return {
        "left": x < a, "right": x > a, "above": y < b, "below": y > b, "larger": number > than, "smaller": number < than
    }[relation]  # fmt: skip


def strip(images: Mapping[str, Image.Image]) -> Image.Image:
    """The pictures of STRIP in one row, equally high, STRIP_WIDTH wide."""
    chosen = [images[name] for name in STRIP]
    room = STRIP_WIDTH - GAP * (len(chosen) - 1)
    height = int(room / sum(image.width / image.height for image in chosen))
    row, x = Image.new("RGBA", (STRIP_WIDTH, height)), 0
    for image in chosen:
        width = round(height * image.width / image.height)
        row.paste(image.resize((width, height), Image.Resampling.LANCZOS), (x, 0))
        x += width + GAP
    return row


def main() -> None:
    """Write the scenes, examples.json and strip.png."""
    FOLDER.mkdir(exist_ok=True)
    scenes = {name: draw(name) for name in SCENES}
    for name, scene in scenes.items():
        scene.image.save(FOLDER / f"{name}.png", optimize=True)
    listed = [row for name, scene in scenes.items() for row in rows(name, scene)]
    (FOLDER / "examples.json").write_text(json.dumps(listed, indent=1) + "\n")
    strip({name: scene.image for name, scene in scenes.items()}).save(FOLDER / "strip.png", optimize=True)


if __name__ == "__main__":
    main()
