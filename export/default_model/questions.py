"""Questions about a scene with their answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
from tokenizers import Tokenizer

from export.default_model.asking import names as naming
from export.default_model.asking import patterns, unknown
from export.default_model.asking.names import Name, Words, article, called
from export.default_model.asking.patterns import pick
from export.default_model.asking.plain import AXES, PlainAsker
from export.default_model.asking.question import TEMPLATE, TURN, Mention, Question, conversation_text, zone
from export.default_model.asking.tokenizer import build_tokenizer, known_words
from export.default_model.scenes import COLOURS, SHAPES, Thing

__all__ = [
    "KINDS", "LONGEST", "SHARES", "TEMPLATE", "TURN", "Mention", "Question", "ask", "build_tokenizer",
    "conversation_text", "draw_kind", "zone",
]  # fmt: skip
SHARES = {
    "one": 0.13, "two": 0.13, "yes/no": 0.05, "count": 0.19, "colour": 0.04, "shape": 0.04, "where": 0.06,
    "side": 0.11, "compare": 0.14, "honest": 0.06, "follow-up": 0.05,
}  # fmt: skip
KINDS = tuple(SHARES)
_UP_TO = np.cumsum(list(SHARES.values()))
LONGEST = 72  # tokens of a conversation behind the image with its last answer, the end token included
_TRIES = 40


def ask(
    rng: np.random.Generator, things: tuple[Thing, ...], size: tuple[int, int], kind: str, *, wording: str = "train",
    hard: bool = False,
) -> Question | None:  # fmt: skip
    """A random question of a kind about a scene, or None where the scene allows none.

    `size`: width and height of the picture, in pixels, which stands in the middle of the padded square. `wording`:
    "train", or "held out" for wordings and unknown words that training never sees. `hard`: count at least MANY things,
    compare numbers that differ in the second digit alone or of which the border of a tile cuts one, read one that it
    cuts, if there are any. ValueError for another kind or wording.
    """
    if kind not in KINDS or wording not in ("train", "held out"):
        raise ValueError(
            f"question of kind {kind!r} in wording {wording!r}; expected one of {KINDS}, 'train' or 'held out'"
        )
    asker = _Asker(rng, things, size, wording)
    asker.hard = hard
    for _ in range(_TRIES):
        question = asker.ask(kind)
        if question is None and kind not in ("honest", "follow-up"):  # those draw another kind
            return None
        if question is not None and _fits(question):
            return question
    return None


def draw_kind(rng: np.random.Generator) -> str:
    """A kind of question, by SHARES."""
    return KINDS[int(np.searchsorted(_UP_TO, rng.random() * _UP_TO[-1], "right"))]


class _Asker(PlainAsker):
    """Asks questions of all kinds about one scene."""

    def ask(self, kind: str) -> Question | None:
        asked: dict[str, Callable[[], Question | None]] = {
            "one": self.one, "two": self.two, "yes/no": self.is_there, "count": self.count, "colour": self.colour,
            "shape": self.shape, "where": self.where, "side": self.side, "compare": self.compare,
            "honest": self.honest, "follow-up": self.follow_up,
        }  # fmt: skip
        return asked[kind]()

    def honest(self) -> Question | None:
        """About something that is not there, or with words that the model does not know."""
        if self.rng.random() < 0.3:
            return self.unknown()
        kind = pick(self.rng, ("one", "two", "colour", "shape", "where", "side", "compare"))
        if kind in ("colour", "shape"):
            missing = self._missing(kind)
            if missing == (None, None):
                return None
            names = [missing]
        else:
            names = [self._missing()]
            if kind in ("two", "side", "compare"):
                other = self._missing() if self.rng.random() < 0.3 else self._name_of(self._any())
                if other == names[0]:
                    return None
                names.insert(int(self.rng.integers(2)), other)
        relation = pick(self.rng, {"side": sum(AXES, ()), "compare": ("larger", "smaller")}.get(kind, ("",)))
        if kind == "compare" and self.rng.random() < 0.3:
            kind = "which"
        return replace(self._write(kind, names, relation=relation), kind="honest", answer=self._none_of(names))

    def _none_of(self, names: Sequence[Name]) -> str:
        colour, shape = next(name for name in names if not self._matches(name))
        return f"there is no {called(colour, shape)}" if shape else f"there is nothing {colour}"

    def unknown(self) -> Question:
        """A question with words that the model does not know."""
        rng, wording = self.rng, self.wording

        def word() -> str:
            return pick(rng, unknown.NOUNS[wording]) if rng.random() < 0.5 else _babble(rng)

        choice = rng.random()
        if choice < 0.25:
            text = pick(rng, unknown.SENTENCES[wording])
        elif choice < 0.5:
            text = patterns.choose(rng, pick(rng, unknown.FRAMES))
            while "{}" in text:
                text = text.replace("{}", word(), 1)
        else:
            choice, noun = rng.random(), word()
            if choice < 0.4:
                noun = f"{pick(rng, tuple(COLOURS))} {noun}"
            elif choice < 0.6:
                noun = f"{pick(rng, unknown.COLOURS[wording])} {pick(rng, SHAPES)}"
            kind = pick(rng, ("one", "where", "colour", "yes/no"))
            noun = article(noun) + noun if kind == "yes/no" else noun
            text = self._write(kind, [], words=[Words(noun)]).text
        if text[-1] in "?." and rng.random() < patterns.NO_MARK:
            text = text[:-1]
        return Question("honest", text, unknown.ANSWER)

    def follow_up(self) -> Question | None:
        """One or two questions with their answers, then one that needs them; or a fresh one of any kind."""
        self.plain = True
        fresh = self.rng.random() < 0.35
        kind = pick(self.rng, KINDS[:-1] if fresh else ("one", "one", "where", "colour", "count", "yes/no"))
        asked = [self.ask(kind)]
        follows = kind in ("one", "where", "colour", "count", "yes/no")
        if self.rng.random() < 0.25:
            asked.append(self._following(kind, asked) if follows else self.ask(kind))
        asked.append(self.ask(pick(self.rng, KINDS[:-1])) if fresh else self._following(kind, asked))
        done = [question for question in asked if question is not None]
        if len(done) < len(asked):
            return None
        *before, last = done
        return replace(last, kind="follow-up", history=tuple((past.text, past.answer) for past in before))

    def _following(self, kind: str, asked: Sequence[Question | None]) -> Question | None:
        mentions = [mention for question in asked if question for mention in question.mentions]
        but: list[Name] = [(mention.colour, mention.shape) for mention in mentions]
        pattern = "follow-up"
        if kind == "count":
            return self.count(but, "follow-up count" if self.rng.random() < 0.3 else pattern)
        if kind == "yes/no":
            name = self._missing() if self.rng.random() < 0.5 else self._name_of(self._any(), unique=False, full=True)
            return None if name in but or None in name else self._existence(kind, name, pattern=pattern)
        if kind == "colour":
            choices: list[Name] = [
                (None, thing.shape) for thing in self.things if len(self._matches((None, thing.shape))) == 1
            ]
        else:
            past = {mention.thing for mention in mentions}
            left = [thing for index, thing in enumerate(self.things) if index not in past]
            left = [thing for thing in left if kind != "where" or zone(thing.centre, self.size)]
            names = [((t.colour, None), (t.colour, t.shape), (None, t.shape)) for t in left]
            choices = [name for three in names for name in three if len(self._matches(name)) == 1]
        if self.rng.random() < 0.1:
            choices = [self._missing("colour" if kind == "colour" else "")]
        choices = [name for name in choices if name not in but and name != (None, None)]
        if not choices:
            return None
        name = pick(self.rng, choices)
        if kind == "one" and self.rng.random() < 0.5:
            pattern = "follow-up number"
        words = naming.name(self.rng, *name, nouns=naming.ONE).behind("the ")
        question = self._write(pattern, [name], words=[words])
        if not self._matches(name):
            return replace(question, answer=self._none_of([name]))
        return {"one": self._number, "where": self._where, "colour": self._colour}[kind](question)


def _babble(rng: np.random.Generator) -> str:
    """What sounds like a word and is none."""
    while (word := unknown.babble(rng)) in known_words():
        pass
    return word


def _fits(question: Question) -> bool:
    text = conversation_text(question)
    if len(text) + len(question.answer) < LONGEST:  # no token is shorter than a character
        return True
    return sum(len(_tokenizer().encode(part, add_special_tokens=False)) for part in (text, question.answer)) < LONGEST


@cache
def _tokenizer() -> Tokenizer:
    return build_tokenizer()
