"""How questions are worded.

A pattern has choices, "(in|on) the", slots "{}" for names, "{r}" for a relation, and ends with its mark. HELD_OUT has
other combinations of the same words: training never sees them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")

_HERE = "(| in the picture| in this picture| in the image| here)"
TRAIN = {
    "one": (
        "(what|which) number is (in|on|inside) the {}?",
        "what is the number (in|on|inside|of) the {}?",
        "(|please )(read|tell me|give me|say) the number (in|on|inside|of) the {}.",
        "(can|could) you (read|tell me|give me|say) the number (in|on|inside|of) the {}?",
        "(what|which) number does the {} (show|have|carry|hold)?",
        "(what|which) number (do|can) you (see|read) (in|on|inside) the {}?",
        "what (is written|stands) (in|on|inside) the {}?",
        "what does the {} (say|show)?",
        "(the |)number (in|on|of) the {}(|, please)?",
        "(the |){}: (what|which) number?",
        "(what|which) number has the {}?",
        "i want to know the number (in|on) the {}.",
    ),
    "two": (
        "(what|which) numbers are (in|on|inside) the {} and (the |){}?",
        "what are the numbers (in|on|inside|of) the {} and the {}?",
        "(|please )(read|tell me|give me|say) the numbers (in|on|inside|of) the {} and (the |){}.",
        "(can|could) you (read|tell me) the numbers (in|on|of) the {} and the {}?",
        "(what|which) numbers do the {} and the {} (show|have|carry|hold)?",
        "what do the {} and the {} (say|show)?",
        "(the |)numbers (in|on|of) the {} and the {}(|, please)?",
        "(the |){} and (the |){}: (what|which) numbers?",
        "(what|which) number is in the {} and (what|which) number is in the {}?",
        "(read|tell me) the number (in|on) the {} and the (number|one) (in|on) the {}.",
        "(what|which) numbers (do|can) you (see|find) (in|on|inside) the {} and (|in |on )the {}?",
        "(|please )(tell me|say) what (is written|stands) (in|on) the {} and (in|on) the {}.",
        "what does the {} (say|show) and what does the {} (say|show)?",
        "the {} has (what|which) number, and the {}?",
        "i want to know the numbers (in|on) the {} and (in|on) the {}.",
        "(please |)(tell me|say) (what|which) numbers you (see|find) (in|on) the {} and (in|on) the {}.",
        "(in|on) the {} and (in|on) the {}, (what|which) numbers are there?",
        "of the {} and the {}, what are the numbers?",
        "(please |)(tell me|say) (what|which) numbers the {} and the {} (have|show).",
        "please, (what|which) numbers (do|can) you (see|find) (in|on) the {} and the {}?",
        "(can|could) you (say|see) (what|which) numbers the {} and the {} (have|show)?",
    ),
    "yes/no": (
        f"is there {{}}{_HERE}?",
        f"(do|can) you (see|find) {{}}{_HERE}?",
        "does (the|this) (picture|image) (show|have|contain) {}?",
        "is {} (in|on) (the|this) (picture|image)?",
        "(tell me|say) (if|whether) there is {}(| here| in the picture).",
        "there is {}(| here| in the picture), (yes or no|right|true)?",
        "can {} be seen(| here| in the picture)?",
        "(can|could) you (tell me|say) (if|whether) there is {}(| here)?",
        "would you say there is {}(| here)?",
        "is it true that there is {}(| here)?",
        "(please |)(tell me|say) (if|whether) you (see|find) {}.",
        "(have you|do you have) {}(| here| in the picture)?",
        "does it (have|contain|hold) {}(| here)?",
        "(in|on) (the|this) (picture|image), is there {}?",
    ),
    "count": (
        f"how many {{}} are there{_HERE}?",
        f"how many {{}} (do|can) you (see|count|find){_HERE}?",
        f"(|please )count (the|all|all the) {{}}{_HERE}.",
        "what is the (number|count) of {}(| in the picture)?",
        f"(can|could) you count (the|all|all the) {{}}{_HERE}?",
        "(tell me|say) how many {} (there are|you see).",
        "how many {} does (the|this) (picture|image) (have|show|contain)?",
        "how many {} are (in|on) (the|this) (picture|image)?",
        "(the |){}: how many?",
        "how many {}?",
        "(tell me|give me|say) the (number|count) of {}(|, please).",
        "how many {} can i (see|find|count)(| here)?",
        "(in|on) (the|this) (picture|image), how many {} (are there|do you see|can you find)?",
        "how many of the {} (do|can) you (see|find)?",
    ),
    "colour": (
        "(what|which) (colour|color) is the {}?",
        "what is the (colour|color) of the {}?",
        "(what|which) (colour|color) does the {} have?",
        "(what|which) (colour|color) has the {}?",
        "(|please )(tell me|give me|name|say) the (colour|color) of the {}.",
        "(can|could) you (tell me|name) the (colour|color) of the {}?",
        "(the |)(colour|color) of the {}(|, please)?",
        "(the |){}: (what|which) (colour|color)?",
        "the {} is (what|which) (colour|color)?",
        "in (what|which) (colour|color) is the {}?",
        "tell me (what|which) (colour|color) the {} is.",
    ),
    "shape": (
        "(what|which) (shape|figure) is {}?",
        "what is the {} (thing|object|figure|one)?",
        "(what|which) shape is the {} (thing|object|figure|one)?",
        "what kind of (shape|figure) is the {} (thing|object|one)?",
        "(what|which) shape does the {} (thing|object|figure|one) have?",
        "(|please )(tell me|give me|name|say) the shape of the {} (thing|object|figure|one).",
        "(can|could) you (tell me|name) the shape of the {} (thing|object|figure|one)?",
        "(what|which) {} (shape|figure|thing) (is there|do you see|can you see)?",
        "(the |)shape of the {} (thing|object|one)(|, please)?",
        "what is {}(| in the picture)?",
        "(what|which) shape has the (colour|color) {}?",
    ),
    "where": (
        f"where is the {{}}{_HERE}?",
        "where (do|can) you (see|find) the {}?",
        "where (can|do) i find the {}?",
        "in (what|which) (part|place) of the (picture|image) is the {}?",
        "(|please )(tell me|say) where the {} is.",
        "(can|could) you (tell me|say) where the {} is?",
        "what is the (place|position) of the {}?",
        "(|please )(tell me|give me|name) the (place|position) of the {}.",
        "(the |){}: where?",
        "(the |)(place|position) of the {}(|, please)?",
        "where in the (picture|image) is the {}?",
    ),
    "side": (
        "is the {} {r} the {}?",
        "does the {} (stand|lie) {r} the {}?",
        "(tell me|say) (if|whether) the {} is {r} the {}.",
        "(can|could) you tell me (if|whether) the {} is {r} the {}?",
        "the {} is {r} the {}, (yes or no|right|true)?",
        "would you say the {} is {r} the {}?",
        "is it true that the {} is {r} the {}?",
        "do you see the {} {r} the {}?",
    ),
    "compare": (
        "is the number (in|on|of) the {} {r} than (|the one |the number )(in|on|of) the {}?",
        "does the {} (have|show|carry|hold) a {r} number than the {}?",
        "(tell me|say) (if|whether) the number (in|on) the {} is {r} than (|the one )(in|on) the {}.",
        "(can|could) you tell me (if|whether) the number (in|on) the {} is {r} than (|the one )(in|on) the {}?",
        "the number (in|on) the {} is {r} than (|the one )(in|on) the {}, (yes or no|right|true)?",
        "is it true that the number (in|on) the {} is {r} than (|the one )(in|on) the {}?",
        "is the number {r} (in|on) the {} than (in|on) the {}?",
        "the {} has a {r} number than the {}, (yes or no|right|true)?",
        "would you say the number (in|on) the {} is {r} than (|the one |the number )(in|on) the {}?",
        "do you see a {r} number (in|on) the {} than (in|on) the {}?",
        "(tell me|say) (if|whether) the {} has a {r} number than the {}.",
        "is it the {} that has a {r} number than the {}?",
        "(in|on) the {}, is the number {r} than (in|on) the {}?",
        "the {} and the {}: does the first have the {r} number?",
    ),
    "which": (
        "which (|number )is {r}, the (number|one) (in|on) the {} or (the one |)(in|on) the {}?",
        "which (|one )has the {r} number, the {} or the {}?",
        "(what|which) is {r}: the number (in|on) the {} or (in|on) the {}?",
        "where is the number {r}, (in|on) the {} or (in|on) the {}?",
        "(tell me|say) which number is {r}, the one (in|on) the {} or the one (in|on) the {}.",
        "(tell me|say) which has the {r} number, the {} or the {}.",
        "the {} or the {}: which (|one )has the {r} number?",
        "(tell me|say) where the number is {r}, (in|on) the {} or (in|on) the {}.",
        "(in|on) the {} or (in|on) the {}: where is the number {r}?",
        "of the {} and the {}, which has the {r} number?",
        "(in|on) the {} or (in|on) the {}, (what|which) number is {r}?",
        "the {} or the {}, (what|which) has the {r} number?",
        "the number (in|on) the {} or (in|on) the {}: which (|one )is {r}?",
    ),
    "follow-up": (
        "and {}?",
        "(what|how) about {}?",
        "and (what|how) about {}?",
        "and (now|then) {}?",
        "(now|then) {}.",
        "{}?",
        "and for {}?",
        "the same for {}(|, please).",
    ),
    "follow-up number": ("and (in|on|inside) {}?", "(what|how) about (in|on) {}?", "(and |)now (in|on) {}?"),
    "follow-up count": ("and how many {}(| are there)?", "how many {}?"),
    "sentence": (  # @: the question without its mark, $: the mark
        "@, in a (|full )sentence$",
        "@$ (answer|say it) (in|with) a (|full )sentence.",
        "(in|with) a (|full )sentence: @$",
        "(|please )answer (in|with) a (|full )sentence: @$",
    ),
    "one word": (
        "@, in (one|a single) word$",
        "@$ (answer|say it) (in|with) (one|a single) word.",
        "(in|with) (one|a single) word: @$",
        "(|please )answer (in|with) (one|a single) word: @$",
    ),
}
HELD_OUT = {
    "one": (
        "can you tell me (what|which) number is (in|on) the {}?",
        "the {}, what number do you see?",
        "tell me what is written on the {}, please.",
    ),
    "two": (
        "tell me (what|which) numbers are in the {} and the {}.",
        "the {} and the {}, what numbers do you see?",
        "please, which numbers can you read in the {} and in the {}?",
    ),
    "yes/no": ("can you tell me if this picture has {}?", "say, do you see {}?", "does it show {}?"),
    "count": ("there are how many {} here?", "how many {} can be seen?", "please tell me how many {} the picture has."),
    "colour": ("can you see what (colour|color) the {} is?", "the {} has which (colour|color)?"),
    "shape": ("can you tell me what shape the {} thing is?", "the {} one is which shape?"),
    "where": ("the {}, where is it?", "could you find the place of the {}?", "say where you see the {}."),
    "side": ("can you see if the {} is {r} the {}?", "the {}, is it {r} the {}?"),
    "compare": ("the number in the {}, is it {r} than the number in the {}?", "has the {} a {r} number than the {}?"),
    "which": (
        "the one in the {} or the one in the {}, which is {r}?",
        "can you tell me which is {r}, the {} or the {}?",
    ),
    "follow-up": ("and now what about {}?", "then how about {}?", "now the same for {}."),
    "follow-up number": ("and then in {}?", "and what about in {}?"),
    "follow-up count": ("and then how many {}?", "how many are {}?"),
    "sentence": ("@$ a full sentence, please.", "please say it in a sentence: @$"),
    "one word": ("@$ one word, please.", "please say it in one word: @$"),
}
RELATIONS = {  # in pairs: less, more
    "left": ("left of", "to the left of", "on the left of", "further left than"),
    "right": ("right of", "to the right of", "on the right of", "further right than"),
    "above": ("above", "over", "higher up than"),
    "below": ("below", "under", "lower down than"),
    "smaller": ("smaller", "lower"),
    "larger": ("larger", "bigger", "higher", "greater"),
}
NO_MARK = 0.12  # share of questions whose mark was forgotten
_CHOICE = re.compile(r"\(([^()]*)\)")


def key_word(text: str, relation: str) -> tuple[int, int]:
    """Where in a text the word is that tells a relation, as RELATIONS say it, from the others."""
    word = next(word for word in relation.split() if word not in ("to", "on", "the", "further"))
    begin = text.index(word, text.index(relation))
    return begin, begin + len(word)


def pick(rng: np.random.Generator, options: Sequence[Item]) -> Item:
    """Any of `options`, each as likely."""
    return options[int(rng.integers(len(options)))]


def expand(pattern: str) -> list[str]:
    """Every text that a pattern stands for, its slots still in it."""
    parts = _CHOICE.split(pattern)
    choices = [part.split("|") if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*choices)]


def choose(rng: np.random.Generator, pattern: str) -> str:
    """Any of the texts that a pattern stands for."""
    return _CHOICE.sub(lambda choice: pick(rng, choice[1].split("|")), pattern)


def draw(rng: np.random.Generator, name: str, held_out: bool) -> str:
    """Any text of any pattern of TRAIN[name], or of HELD_OUT[name]."""
    return choose(rng, pick(rng, (HELD_OUT if held_out else TRAIN)[name]))
