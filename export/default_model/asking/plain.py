"""Questions about what is in a scene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import numpy as np

from export.default_model.asking import names as naming
from export.default_model.asking import patterns
from export.default_model.asking.names import Name, Words, article, called
from export.default_model.asking.patterns import pick
from export.default_model.asking.question import Mention, Question, larger, zone
from export.default_model.scenes import COLOURS, SHAPES, Thing

APART = 45  # pixels: the least distance along an axis that is asked for
SENTENCE, ONE_WORD = 0.12, 0.08  # shares of questions that ask for such an answer
MANY = 3  # things from which counting is hard
AXES = (("left", "right"), ("above", "below"))  # smaller and larger x, y
NEAR = 0.7  # share of missing things whose colour and shape are in the scene, though not together


class PlainAsker:
    """Asks about one scene. Each kind's method returns None where the scene allows none."""

    def __init__(
        self, rng: np.random.Generator, things: tuple[Thing, ...], size: tuple[int, int], wording: str
    ) -> None:
        self.rng, self.things, self.size, self.wording = rng, things, size, wording
        self.held_out = wording == "held out"
        self.plain = False  # within conversations answers are short, and nobody asks for that
        self.hard = False  # compare close numbers, count many things, read or compare cut digits, if there are any

    def one(self) -> Question:
        cut = self._cut()
        names = [self._name_of(pick(self.rng, cut) if cut else self._any())]
        return self._number(self._write("one", names, style := self._style()), style)

    def _number(self, question: Question, style: str = "") -> Question:
        (mention,), thing = question.mentions, meant(question)
        number = self.things[thing].number
        lead = f"the number in the {called(mention.colour, mention.shape)} is " if style == "sentence" else ""
        reads = tuple((len(lead) + digit, thing, digit) for digit in range(len(number)))
        return replace(question, answer=lead + number, reads=reads, about=(thing,))

    def two(self) -> Question | None:
        if len(self.things) < 2:
            return None
        order, cut = self.rng.permutation(len(self.things)).tolist(), self._cut()
        if cut and not {*order[:2]} & {*cut}:
            order[int(self.rng.integers(2))] = pick(self.rng, cut)
        first, second = order[:2]
        question = self._write("two", [self._name_of(first), self._name_of(second)])
        return self._numbers(question, first, second)

    def _numbers(self, question: Question, first: int, second: int, tail: str = "") -> Question:
        a, b = self.things[first].number, self.things[second].number
        begin = len(a) + len(" and ")
        reads = [(digit, first, digit) for digit in range(len(a))]
        reads += [(begin + digit, second, digit) for digit in range(len(b))]
        return replace(question, answer=f"{a} and {b}{tail}", reads=tuple(reads), about=(first,))

    def is_there(self) -> Question:
        there = self.rng.random() < 0.5
        name = self._name_of(self._any(), unique=False) if there else self._missing()
        return self._existence("yes/no", name, self._style())

    def _existence(self, kind: str, name: Name, style: str = "", pattern: str | None = None) -> Question:
        colour, shape = name
        matches = self._matches(name)
        if shape is None and self.rng.random() < 0.5:
            words = Words(f"{colour}", (0, len(f"{colour}"))).behind("anything ")
        else:
            words = naming.name(self.rng, colour, shape)
            words = words.behind(article(words.text))
        question = self._write(pattern or kind, [name], style, words=[words])
        answer = "yes" if matches else "no"
        if style == "sentence":
            text = called(colour, shape)
            answer += f", there is {article(text) if matches else 'no '}{text}"
        return replace(question, kind=kind, answer=answer, about=matches)

    def count(self, but: Sequence[Name] = (), pattern: str = "count") -> Question:
        """`but`: what was counted before; what follows is never about all things."""
        rng = self.rng
        while (name := self._to_count()) in but or (but and name == (None, None)):
            pass
        style = self._style()
        nouns = naming.ONE if but and rng.random() < 0.5 else naming.THING
        words = naming.name(rng, *name, many=True, nouns=nouns)
        question = self._write(pattern, [name], style, words=[words])
        (mention,), matches = question.mentions, self._matches(name)
        answer = str(len(matches))
        if style == "sentence":
            is_one = len(matches) == 1
            answer = f"there {'is' if is_one else 'are'} {answer} {called(*name, many=not is_one)}"
        return replace(question, kind="count", answer=answer, about=matches, mentions=(replace(mention, thing=None),))

    def colour(self) -> Question | None:
        thing = self._alone("shape")
        if thing is None:
            return None
        return self._colour(self._write("colour", [(None, thing.shape)], style := self._style()), style)

    def _colour(self, question: Question, style: str = "") -> Question:
        index = meant(question)
        thing = self.things[index]
        answer = f"the {thing.shape} is {thing.colour}" if style == "sentence" else thing.colour
        return replace(question, answer=answer, about=(index,))

    def shape(self) -> Question | None:
        thing = self._alone("colour")
        if thing is None:
            return None
        question = self._write("shape", [(thing.colour, None)])
        return replace(question, answer=thing.shape, about=(meant(question),))

    def where(self) -> Question | None:
        clear = [index for index, thing in enumerate(self.things) if zone(thing.centre, self.size)]
        if not clear:
            return None
        style = self._style()
        return self._where(self._write("where", [self._name_of(pick(self.rng, clear))], style), style)

    def _where(self, question: Question, style: str = "") -> Question:
        (mention,), index = question.mentions, meant(question)
        answer = zone(self.things[index].centre, self.size)
        assert answer, "near a border"
        if style == "sentence":
            answer = f"the {called(mention.colour, mention.shape)} is at the {answer}"
        return replace(question, answer=answer, about=(index,))

    def side(self) -> Question | None:
        axis, yes = int(self.rng.integers(2)), self.rng.random() < 0.5
        for tried in (axis, 1 - axis):
            pairs = [
                (first, second)
                for first, second in permutations(range(len(self.things)), 2)
                if self.things[second].centre[tried] - self.things[first].centre[tried] >= APART
            ]
            if pairs:
                break
        else:
            return None
        first, second = pick(self.rng, pairs)  # the first is left of, or above, the second
        direction = int(self.rng.integers(2))
        if yes == bool(direction):  # "right of" is true of the second
            first, second = second, first
        relation = AXES[tried][direction]
        question = self._write("side", [self._name_of(first), self._name_of(second)], relation=relation)
        return replace(question, answer="yes" if yes else "no", about=(first, second))

    def compare(self) -> Question | None:
        values = [int(thing.number) for thing in self.things]
        pairs = [pair for pair in permutations(range(len(values)), 2) if values[pair[0]] != values[pair[1]]]
        if not pairs:
            return None
        cut = self._cut()
        close = [(a, b) for a, b in pairs if self.hard and values[a] // 10 == values[b] // 10 > 0]
        hard = [some for some in (close, [pair for pair in pairs if {*pair} & {*cut}]) if some]
        first, second = pick(self.rng, pick(self.rng, hard) if hard else pairs)
        relation = pick(self.rng, ("larger", "smaller"))
        holds = (values[first] > values[second]) == (relation == "larger")
        which = self.rng.random() < 0.3
        names = [self._name_of(index, full=which) for index in (first, second)]
        question = self._write("which" if which else "compare", names, relation=relation)
        wins = self.things[first if holds else second]
        last = f"the {called(wins.colour, wins.shape)}" if which else "yes" if holds else "no"
        tail = f", {larger(values[first], values[second])}, {last}"
        return replace(self._numbers(question, first, second, tail), kind="compare")

    def _to_count(self) -> Name:
        """Half of the time every number that can be the answer is as likely; else what is likely to be asked. Where it
        shall be hard every one from MANY up."""
        rng = self.rng
        names: list[Name] = [
            *((colour, None) for colour in COLOURS),
            *((None, shape) for shape in SHAPES),
            (None, None),
        ]
        counts = [len(self._matches(name)) for name in names]
        many = sorted({count for count in counts if count >= MANY}) if self.hard else []
        if many or rng.random() < 0.5:
            wanted = pick(rng, many or sorted(set(counts)))
            return pick(rng, [name for name, count in zip(names, counts, strict=True) if count == wanted])
        choice = rng.random()
        if choice < 0.1:
            return None, None
        thing = self.things[self._any()] if rng.random() < 0.7 else None
        colour, shape = (thing.colour, thing.shape) if thing else (pick(rng, tuple(COLOURS)), pick(rng, SHAPES))
        return (colour, None) if choice < 0.5 else (None, shape) if choice < 0.9 else (colour, shape)

    def _cut(self) -> list[int]:
        """Where it shall be hard things whose digits are cut by the border of a tile."""
        return [index for index, thing in enumerate(self.things) if self.hard and thing.cut]

    def _any(self) -> int:
        return int(self.rng.integers(len(self.things)))

    def _matches(self, name: Name) -> tuple[int, ...]:
        """Things of the scene that a name fits."""
        return naming.matches(name, self.things)

    def _alone(self, what: str) -> Thing | None:
        """A thing that is the only one of its "colour" or "shape"."""
        values = [getattr(thing, what) for thing in self.things]
        alone = [thing for thing, value in zip(self.things, values, strict=True) if values.count(value) == 1]
        return pick(self.rng, alone) if alone else None

    def _name_of(self, index: int, *, unique: bool = True, full: bool = False) -> Name:
        """Mostly colour and shape; one alone where that is enough (`unique`) to know the thing."""
        thing, choice = self.things[index], self.rng.random()
        short: Name = (None, thing.shape) if choice < 0.12 else (thing.colour, None)
        if full or choice > 0.2 or (unique and len(self._matches(short)) > 1):
            return thing.colour, thing.shape
        return short

    def _missing(self, kind: str = "") -> Name:
        """Of something that is not there: for a question of "colour" a shape, for one of "shape" a colour."""
        rng = self.rng
        colours, shapes = {thing.colour for thing in self.things}, {thing.shape for thing in self.things}
        choice = rng.random()
        if kind == "colour" or (not kind and choice < 0.12):
            absent = [shape for shape in SHAPES if shape not in shapes]
            if absent or kind:
                return None, pick(rng, absent) if absent else None
        elif kind == "shape" or choice < 0.2:
            absent = [colour for colour in COLOURS if colour not in colours]
            if absent or kind:
                return pick(rng, absent) if absent else None, None
        near = [(colour, shape) for colour in sorted(colours) for shape in sorted(shapes)]
        pairs = [pair for pair in near if not self._matches(pair)] if rng.random() < NEAR else []
        pairs = pairs or [(c, s) for c in COLOURS for s in SHAPES if not self._matches((c, s))]
        return pick(rng, pairs)

    def _style(self) -> str:
        """How the answer shall be: "" short, "sentence" or "one word"."""
        choice = self.rng.random()
        if self.plain or choice >= SENTENCE + ONE_WORD:
            return ""
        return "sentence" if choice < SENTENCE else "one word"

    def _write(
        self,
        pattern: str,
        names: Sequence[Name],
        style: str = "",
        *,
        relation: str = "",
        words: Sequence[Words] | None = None,
    ) -> Question:
        """The question without its answer; `pattern` is also its kind. `words`: what fills its slots, if not `names`
        as anybody calls them."""
        rng = self.rng
        if words is None and pattern == "shape":  # its patterns have the noun
            (colour, _), words = names[0], []
            said = naming.name(rng, colour, None).text.split()[0]
            words = [Words(said, (0, len(said)))]
        elif words is None:
            words = [naming.name(rng, *name, nouns=naming.THING + naming.ONE) for name in names]
        template = patterns.draw(rng, pattern, self.held_out)
        if relation:
            said = pick(rng, patterns.RELATIONS[relation])
            template = template.replace("{r}", said)
        if style:
            template = patterns.draw(rng, style, self.held_out).replace("@", template[:-1]).replace("$", template[-1])
        if rng.random() < patterns.NO_MARK:
            template = template[:-1]
        text, placed = naming.fill(template, words)
        mentions = []
        for name, at in zip(names, placed, strict=False):  # words that are unknown on purpose have no name
            matches = self._matches(name)
            mentions.append(Mention(*name, matches[0] if len(matches) == 1 else None, at.colour_at, at.shape_at))
        question = Question(pattern, text, "", tuple(mentions))
        return replace(question, relation=relation, relation_at=patterns.key_word(text, said)) if relation else question


def meant(question: Question) -> int:
    """The one thing that a question's first mention means."""
    thing = question.mentions[0].thing
    assert thing is not None, question.text
    return thing
