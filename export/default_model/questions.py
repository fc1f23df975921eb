"""Questions about a scene with their answers, and the tokenizer that fits them."""

from __future__ import annotations

import string
from dataclasses import dataclass

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from export.default_model.scenes import COLOURS, SHAPES, Thing

TEMPLATE = "<image>\n{prompt} answer:"
TURN = " {answer}\n{prompt} answer:"  # training saw no second question: of what was tried this does the least harm
ONE = (
    "what number is in the {}?",
    "what is the number in the {}?",
    "read the number on the {}.",
    "which number does the {} show?",
)
TWO = ("what numbers are in the {} and the {}?", "read the numbers on the {} and the {}.")
IS_THERE = ("is there {}?", "do you see {}?", "does the picture show {}?")
HOW_MANY = ("how many {} are there?", "count the {}.")
KINDS = ("one", "two", "yes/no", "count")
SPECIAL = ("<unk>", "<s>", "</s>")


@dataclass(frozen=True)
class Question:
    """`mentions`: the (colour, shape) pairs the text names, in order."""

    kind: str
    text: str
    answer: str
    mentions: tuple[tuple[str, str], ...]


def ask(rng: np.random.Generator, things: tuple[Thing, ...], kind: str) -> Question:
    """A random question of a kind; "two" needs two things."""
    if kind == "one":
        thing = things[rng.integers(len(things))]
        return Question(kind, _pick(rng, ONE).format(thing.name), thing.number, ((thing.colour, thing.shape),))
    if kind == "two":
        pair = [things[index] for index in rng.permutation(len(things))[:2]]
        names = [thing.name for thing in pair]
        mentions = tuple((thing.colour, thing.shape) for thing in pair)
        return Question(kind, _pick(rng, TWO).format(*names), " and ".join(t.number for t in pair), mentions)
    if kind == "yes/no":
        present = {(thing.colour, thing.shape) for thing in things}
        there = rng.random() < 0.5
        colours, shapes = sorted({colour for colour, _ in present}), sorted({shape for _, shape in present})
        while True:
            near = rng.random() < 0.7  # a colour and a shape that are there, though not together
            colour = _pick(rng, colours if near else tuple(COLOURS))
            shape = _pick(rng, shapes if near else SHAPES)
            if there:
                colour, shape = sorted(present)[rng.integers(len(present))]
            if there or (colour, shape) not in present:
                break
            if near and len(colours) * len(shapes) == len(present):
                colours, shapes = list(COLOURS), list(SHAPES)
        article = "an" if colour[0] in "aeiou" else "a"
        text = _pick(rng, IS_THERE).format(f"{article} {colour} {shape}")
        return Question(kind, text, "yes" if there else "no", ((colour, shape),))
    what, count = "shapes", len(things)
    choice = rng.random()
    if choice < 0.4:
        colour = _pick(rng, [t.colour for t in things] if rng.random() < 0.7 else tuple(COLOURS))
        what, count = f"{colour} shapes", sum(thing.colour == colour for thing in things)
    elif choice < 0.8:
        shape = _pick(rng, [t.shape for t in things] if rng.random() < 0.7 else SHAPES)
        what, count = f"{shape}s", sum(thing.shape == shape for thing in things)
    return Question(kind, _pick(rng, HOW_MANY).format(what), str(count), ())


def _pick(rng: np.random.Generator, options: object) -> str:
    return options[int(rng.integers(len(options)))]


def build_tokenizer() -> Tokenizer:
    """Whole words where the questions use them, single characters elsewhere; digits always stand alone."""
    texts = [text for group in (ONE, TWO, IS_THERE, HOW_MANY) for text in group]
    texts += ["answer: a an and yes no shapes shape picture", *COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES)]
    words = sorted({word for text in texts for word in text.replace("{}", " ").strip("?.:").split()})
    words = [word.strip("?.:") for word in words if word.strip("?.:")]
    vocabulary = [(token, 0.0) for token in SPECIAL]
    vocabulary += [(f"\u2581{word}", -4.0) for word in dict.fromkeys(words)]
    vocabulary += [(f"\u2581{digit}", -5.0) for digit in string.digits]
    vocabulary += [
        (character, -9.0) for character in ["\u2581", *string.ascii_lowercase, *string.digits, *".,:;?!'\"()-+/"]
    ]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace("\n", " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return tokenizer
