"""Questions of the default model: answers against a second reading of the scene, places of words, the tokenizer."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

from export.default_model.asking import names, patterns, unknown
from export.default_model.asking.plain import APART
from export.default_model.asking.tokenizer import known_words
from export.default_model.learning.packing import READS, arranged
from export.default_model.questions import (
    KINDS,
    LONGEST,
    SHARES,
    TEMPLATE,
    TURN,
    Question,
    ask,
    build_tokenizer,
    conversation_text,
    draw_kind,
    zone,
)
from export.default_model.scenes import CANVAS, COLOURS, SHAPES
from runtime.text.prompter import IMAGE_TOKEN, Prompter

PLAIN = KINDS[:-2]  # all but "honest" and "follow-up"
WORDINGS = ("train", "held out")
OTHER_WORDS = {"violet": "purple", "turquoise": "cyan", "disc": "circle", "disk": "circle", "round shape": "circle",
               "box": "square", "rhombus": "diamond", "plus": "cross"}  # fmt: skip
SHAPE = r"(?:round shape|circle|disc|disk|square|box|triangle|diamond|rhombus|star|heart|cross|plus)"
COLOUR = f"(?:{'|'.join([*COLOURS, 'violet', 'turquoise'])})"
NOUN = f"(?:{SHAPE}|shape|thing|figure|object|one)(?:e?s)?"
NAME = rf"(?:{COLOUR}(?: {NOUN})?|{SHAPE}(?:e?s)?|anything {COLOUR}|(?:shape|thing|figure|object|one)s)"
ARTICLE = "(?:the |an? )?"
OF_RELATION = {
    "left": ("left",), "right": ("right",), "above": ("above", "over", "higher"), "below": ("below", "under", "lower"),
    "larger": ("larger", "bigger", "higher", "greater"), "smaller": ("smaller", "lower"),
}  # fmt: skip


def make_scene(rng) -> tuple[tuple[SimpleNamespace, ...], tuple[int, int]]:
    aspect = np.exp(rng.uniform(-0.5, 0.5))
    size = (CANVAS, round(CANVAS / aspect)) if aspect >= 1 else (round(CANVAS * aspect), CANVAS)
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    things = []
    for index in rng.permutation(len(pairs))[: rng.integers(2, 10)]:
        x, y = ((CANVAS - length) / 2 + rng.uniform(40, length - 40) for length in size)
        number = str(rng.integers(10)) if rng.random() < 0.3 else str(rng.integers(10, 100))
        kind = {"colour": pairs[index][0], "shape": pairs[index][1]}
        things.append(SimpleNamespace(**kind, number=number, centre=(x, y), parts=lambda digit: [digit]))
    return tuple(things), size


@pytest.fixture(scope="module", params=WORDINGS)
def asked(request) -> list[tuple[tuple, tuple[int, int], Question]]:
    """Two questions of each kind about 300 scenes."""
    rng, found = np.random.default_rng(WORDINGS.index(request.param)), []
    for _ in range(300):
        things, size = make_scene(rng)
        for kind in KINDS * 2:
            question = ask(rng, things, size, kind, wording=request.param)
            if question is not None:
                assert question.kind == kind
                found.append((things, size, question))
    assert min(Counter(question.kind for _, _, question in found).values()) > 400
    return found


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def named(text: str) -> list[tuple[str | None, str | None]]:
    """Colours and shapes that a text names, read by themselves."""
    found = []
    for match in re.finditer(rf"\b(?:({COLOUR})(?: {NOUN})?|{SHAPE}(?:e?s)?)\b", text):
        colour, shape = match[1], re.search(rf"\b{SHAPE}", match[0])
        found.append((OTHER_WORDS.get(colour, colour), shape and OTHER_WORDS.get(shape[0], shape[0])))
    return found


def those(things, name) -> list:
    return [thing for thing in things if name[0] in (None, thing.colour) and name[1] in (None, thing.shape)]


def expected(kind: str, text: str, things, size) -> str:
    """The short answer, worked out from the text alone."""
    mentions = named(text)
    if kind == "count":
        return str(len(those(things, mentions[0]) if mentions else things))
    if kind == "yes/no":
        return "yes" if those(things, mentions[0]) else "no"
    for colour, shape in mentions:
        if not those(things, (colour, shape)):
            return f"there is no {colour + ' ' if colour else ''}{shape}" if shape else f"there is nothing {colour}"
    meant = [those(things, name) for name in mentions]
    assert all(len(one) == 1 for one in meant), f"ambiguous: {text}"
    first, second = meant[0][0], meant[-1][0]
    if kind in ("one", "colour", "shape"):
        assert len(meant) == 1
        return {"one": first.number, "colour": first.colour, "shape": first.shape}[kind]
    numbers = f"{first.number} and {second.number}"
    if kind == "two":
        return numbers
    if kind == "where":
        x, y = (3 * (at - (CANVAS - length) / 2) / length for at, length in zip(first.centre, size, strict=True))
        assert min(abs(x - 1), abs(x - 2), abs(y - 1), abs(y - 2)) > 0.1
        return (
            " ".join(word for word in (("top", "", "bottom")[int(y)], ("left", "", "right")[int(x)]) if word)
            or "centre"
        )
    x, y = (a - b for a, b in zip(second.centre, first.centre, strict=True))
    if kind == "side":
        asked = re.search("left|right (?:of|than)|above|over|higher|below|under|lower", text)[0].split()[0]
        apart = {"left": x, "right": -x, "above": y, "over": y, "higher": y}.get(asked, -y)
        assert abs(apart) >= APART
        return "yes" if apart > 0 else "no"
    more, a, b = re.search("larger|bigger|higher|greater", text), int(first.number), int(second.number)
    assert a != b
    numbers += f", the {'first' if a > b else 'second'} is larger"
    if re.search(" or (in |on )?the |, which has ", text):
        winner = first if (a > b) == bool(more) else second
        return f"{numbers}, the {winner.colour} {winner.shape}"
    return f"{numbers}, {'yes' if (a > b) == bool(more) else 'no'}"


@cache
def forms() -> list[tuple[str, re.Pattern]]:
    """Of each pattern: the kind it asks for, and what its texts look like."""
    found = []
    for group in (patterns.TRAIN, patterns.HELD_OUT):
        for kind, several in group.items():
            for pattern in several:
                escaped = re.sub(r"[?.]", r"\\\g<0>", pattern[:-1])
                text = escaped.replace("{r}", "[a-z ]+").replace("{}", ARTICLE + NAME)
                found.append(({"which": "compare"}.get(kind, kind.split()[0]), re.compile(text + "[?.]?")))
    return found


def kinds_of(text: str) -> set[str]:
    """Kinds whose patterns fit a text, that of the follow-ups among them."""
    return {kind for kind, form in forms() if form.fullmatch(text)}


def test_answers_are_what_the_picture_says(asked):
    for things, size, question in asked:
        if question.kind in PLAIN:
            answer = expected(question.kind, question.text, things, size)
            if "sentence" not in question.text:
                assert question.answer == answer, question.text
                continue
            (colour, shape), name = (named(question.text) or [(None, None)])[0], ""
            name = f"{colour + ' ' if colour else ''}{shape or 'shape'}"
            many = answer != "1"
            article = "an" if name[0] in "aeiou" else "a"
            plural = {"cross": "crosses"}.get(shape, f"{shape or 'shape'}s")
            assert (
                question.answer
                == {
                    "one": f"the number in the {name} is {answer}",
                    "colour": f"the {name} is {answer}",
                    "where": f"the {name} is at the {answer}",
                    "yes/no": f"{answer}, there is {article if answer == 'yes' else 'no'} {name}",
                    "count": f"there {'are' if many else 'is'} {answer} "
                    + (f"{colour + ' ' if colour else ''}{plural}" if many else name),
                }[question.kind]
            ), question.text


def test_what_is_not_there_is_said(asked):
    unknown_words, missing = 0, 0
    for things, size, question in asked:
        if question.kind == "honest" and question.answer == unknown.ANSWER:
            unknown_words += 1
            assert not question.mentions and not question.reads and not question.about
        elif question.kind == "honest":
            missing += 1
            assert question.answer == expected("one", question.text, things, size)
            assert any(mention.thing is None for mention in question.mentions) and not question.about
    assert 0.24 < unknown_words / (unknown_words + missing) < 0.38


def test_unknown_words_are_no_words_of_the_questions():
    train, held_out = (
        {*unknown.NOUNS[wording], *unknown.COLOURS[wording], *unknown.SENTENCES[wording]} for wording in WORDINGS
    )
    assert not train & held_out
    for wording in WORDINGS:
        assert not known_words() & {*unknown.NOUNS[wording], *unknown.COLOURS[wording]}


def test_follow_ups_are_about_what_was_asked_before(asked):
    fresh, twice, total = 0, 0, 0
    for things, size, question in asked:
        if question.kind != "follow-up":
            assert not question.history
            continue
        total += 1
        twice += len(question.history) == 2
        assert 1 <= len(question.history) <= 2
        first, _ = question.history[0]
        topic = kinds_of(first) & set(PLAIN)
        for text, answer in (*question.history, (question.text, question.answer)):
            own = kinds_of(text)
            if answer == unknown.ANSWER or not own:
                assert answer == unknown.ANSWER, text
                continue
            own = own & set(PLAIN) or topic
            assert answer in {expected(kind, text, things, size) for kind in own}, (text, answer, own)
        fresh += "follow-up" not in kinds_of(question.text)
    assert 0.2 < fresh / total < 0.5 and 0.1 < twice / total < 0.35


def test_digits_words_and_things_are_where_they_are_said_to_be(asked):
    for things, _, question in asked:
        read = [(thing, digit) for _, thing, digit in question.reads]
        for at, thing, digit in question.reads:
            assert question.answer[at] == things[thing].number[digit]
        if question.kind in ("one", "two", "compare"):
            digits = sum(character.isdigit() for character in question.answer)
            assert len(read) == len(set(read)) == digits
            assert question.about == (question.mentions[0].thing,) == (read[0][0],)
        if question.kind in ("yes/no", "count", "colour", "shape", "where", "side"):
            assert not read
        if question.kind == "count":
            assert len(question.about) == int(re.search(r"\d+", question.answer)[0])
        for mention in question.mentions:
            for word, span, others in (
                (mention.colour, mention.colour_at, OTHER_WORDS),
                (mention.shape, mention.shape_at, {**OTHER_WORDS, "round": "circle"}),
            ):
                assert (word is None) == (span is None)
                if word:
                    text = question.text[slice(*span)]
                    assert re.fullmatch("[a-z]+", text) and word in {others.get(stem, stem) for stem in stems(text)}
            if mention.thing is not None:
                assert those(things, (mention.colour, mention.shape)) == [things[mention.thing]]


def test_relations_are_where_they_are_said_to_be_and_packed_with_what_is_so(asked, tokenizer):
    """What training is told of sides and comparisons, against the scene and the text."""
    seen = set()
    for things, _, question in asked:
        assert (question.relation_at is None) == (question.relation == "")
        if question.kind not in ("side", "compare"):
            continue
        word = question.text[slice(*question.relation_at)]
        assert word in OF_RELATION[question.relation], (question.text, word)
        row = arranged(question, things, tokenizer)
        first, second = (things[mention.thing] for mention in question.mentions)
        (x, y), (right, down) = first.centre, second.centre
        more = {"left": x > right, "right": x > right, "above": y > down, "below": y > down}
        assert row["more"] == more.get(question.relation, int(first.number) > int(second.number))
        assert list(patterns.RELATIONS)[row["relation"]] == question.relation
        seen.add((question.relation, bool(row["more"]), bool(row["holds"])))
        if question.kind == "compare":
            token = row["decided"]
            assert tokenizer.decode([row["ids"][row["words"][token, 0]]]).strip() == word == word.strip()
            assert tokenizer.decode([row["answer"][token]]) in ("yes", "no", "the")
    assert len(seen) == 12  # of six relations each holds or does not


def stems(word: str) -> set[str]:
    return {word, word.removesuffix("s"), word.removesuffix("es")}


def test_half_of_the_answers_are_no(asked):
    for kind in ("yes/no", "side", "compare"):
        answers = Counter(
            re.search(r"\b(yes|no)\b", q.answer)[0]
            for _, _, q in asked
            if q.kind == kind and not re.search("the [a-z]+ [a-z]+$", q.answer)
        )
        assert 0.42 < answers["no"] / answers.total() < 0.58, kind


def test_counts_reach_from_none_to_all(asked):
    counts = {q.answer for _, _, q in asked if q.kind == "count"}
    assert {str(count) for count in range(10)} <= counts


def test_answers_in_a_sentence_and_in_one_word():
    rng, shares = np.random.default_rng(5), Counter()
    things, size = make_scene(rng)
    for _ in range(3000):
        text = ask(rng, things, size, "one").text
        shares["sentence"] += "sentence" in text
        shares["word"] += "word" in text
    assert 0.1 < shares["sentence"] / 3000 < 0.14 and 0.065 < shares["word"] / 3000 < 0.095


def test_zones():
    assert zone((30, 30), (504, 504)) == "top left" and zone((252, 252), (504, 504)) == "centre"
    assert zone((480, 252), (504, 504)) == "right" and zone((252, 480), (504, 504)) == "bottom"
    assert (
        zone((252, 150), (504, 252)) == "top" and zone((130, 252), (252, 504)) == "left"
    )  # of the picture, not the square
    assert zone((168, 30), (504, 504)) is None and zone((30, 340), (504, 504)) is None


@pytest.mark.parametrize(
    ("kind", "things"),
    [
        ("two", [("red", "star", "5", 60)]),
        ("compare", [("red", "star", "5", 60), ("blue", "star", "5", 250)]),
        ("colour", [("red", "star", "5", 60), ("blue", "star", "6", 250)]),
        ("shape", [("red", "star", "5", 60), ("red", "circle", "6", 250)]),
        ("side", [("red", "star", "5", 60), ("red", "circle", "6", 80)]),
        ("where", [("red", "star", "5", 168), ("red", "circle", "6", 168)]),
    ],
)
def test_none_where_the_scene_allows_no_such_question(kind, things):
    things = tuple(
        SimpleNamespace(colour=colour, shape=shape, number=number, centre=(at, at))
        for colour, shape, number, at in things
    )
    assert all(ask(np.random.default_rng(seed), things, (CANVAS, CANVAS), kind) is None for seed in range(20))


def test_other_kinds_and_wordings_are_refused():
    things, size = make_scene(np.random.default_rng(0))
    with pytest.raises(ValueError, match="'weather'"):
        ask(np.random.default_rng(0), things, size, "weather")
    with pytest.raises(ValueError, match="'test'"):
        ask(np.random.default_rng(0), things, size, "one", wording="test")


def test_the_same_seed_asks_the_same():
    def some() -> list[Question | None]:
        rng = np.random.default_rng(3)
        scenes = [make_scene(rng) for _ in range(10)]
        return [ask(rng, *scene, draw_kind(rng)) for scene in scenes for _ in range(10)]

    assert some() == some()


def test_kinds_are_drawn_by_their_shares():
    rng = np.random.default_rng(0)
    drawn = Counter(draw_kind(rng) for _ in range(20000))
    assert abs(sum(SHARES.values()) - 1) < 1e-9
    for kind, share in SHARES.items():
        assert abs(drawn[kind] / 20000 - share) < 0.012


def test_wordings_are_many_and_those_held_out_are_new():
    forms = {
        wording: {
            kind: {form for pattern in several for form in patterns.expand(pattern)} for kind, several in group.items()
        }
        for wording, group in zip(WORDINGS, (patterns.TRAIN, patterns.HELD_OUT), strict=True)
    }
    assert forms["train"].keys() == forms["held out"].keys()
    trained = {form for several in forms["train"].values() for form in several}
    for kind, several in forms["held out"].items():
        assert len(patterns.HELD_OUT[kind]) >= 2 and not several & trained
        assert kind.startswith("follow-up ") or len(forms["train"][kind]) >= 12
    assert min(len(forms["train"][kind]) for kind in ("one", "count", "yes/no")) >= 100
    for several in patterns.TRAIN.values():
        assert len(several) == len(set(several))


def test_an_and_a(asked):
    for _, _, question in asked:
        for text in (question.text, question.answer):
            for found, word in re.findall(r"\b(an?) ([a-z]+)", text):
                assert (found == "an") == (word[0] in "aeiou"), text


def test_tokens(asked, tokenizer):
    assert tokenizer.get_vocab_size() <= 480
    assert tokenizer.encode("58", add_special_tokens=False).tokens == ["▁5", "8"]
    answers = set()
    for _, _, question in asked:
        answers.add(question.answer)
        text = conversation_text(question)
        encoding, answer = (tokenizer.encode(part, add_special_tokens=False) for part in (text, question.answer))
        assert len(encoding.ids) + len(answer.ids) + 1 <= LONGEST
        assert "<unk>" not in encoding.tokens and "<unk>" not in answer.tokens
        spelled = [token for token in encoding.tokens if re.fullmatch("▁|[a-z]", token)]
        asks_unknown = question.answer == unknown.ANSWER or unknown.ANSWER in dict(question.history).values()
        assert asks_unknown or not spelled, text
        begin = len(text) - len(" answer:") - len(question.text)
        assert text[begin:] == f"{question.text} answer:"
        for mention in question.mentions:
            for span in (mention.colour_at, mention.shape_at):
                if span:
                    token = encoding.tokens[encoding.char_to_token(begin + span[0])]
                    assert token == "▁" + question.text[slice(*span)]
        for at, _, _ in question.reads:
            assert answer.tokens[answer.char_to_token(at)].strip("▁") == question.answer[at]
    for text in answers:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text
        assert len(tokenizer.encode(text).ids) < READS
    assert build_tokenizer().to_str() == tokenizer.to_str()


def test_conversations_are_put_together_as_the_runtime_does(asked, tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_str(), encoding="utf-8")
    prompter = Prompter(
        path, template=TEMPLATE, turn=TURN, bos_id=1, vocab=tokenizer.get_vocab_size(), image_tokens=4, ends=[2]
    )
    by_kind = defaultdict(list)
    for _, _, question in asked:
        by_kind[question.kind].append(question)
    some = [*by_kind["follow-up"][:40], *by_kind["one"][:5]]
    for question in [*some, replace(some[-1], text=some[-1].text.upper())]:
        messages = [{"role": "user", "content": question.text}]
        for text, answer in reversed(question.history):
            messages[:0] = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        ids = tokenizer.encode(conversation_text(question), add_special_tokens=False).ids
        assert prompter.encode(messages, True) == [1, IMAGE_TOKEN, *ids]


def test_names_of_things():
    rng = np.random.default_rng(0)
    said = Counter(names.name(rng, "purple", "square").text for _ in range(4000))
    assert set(said) == {"purple square", "violet square", "purple box", "violet box"}
    assert 0.07 < (said["violet square"] + said["violet box"]) / 4000 < 0.13
    assert set(SHAPES) <= set(names.SHAPE_NAMES) and set(names.COLOUR_NAMES) <= set(COLOURS)
