"""The accuracy of a short answer that ten people also gave: VQA's, as the evaluator of M4C computes it.

On PyPI it is only inside lmms-eval and MMF, which bring torch and datasets. Its published definition has rules that
never apply, because others have taken away what they look for (a comma between digits, capitals); those are not here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PEOPLE = 10  # answers to a question
ENOUGH = 3  # people of the others whose answer it must be to count in full
PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
ARTICLES = {"a", "an", "the"}
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# A word that lacks one of its apostrophes -> the word. And one that the definition has the wrong way round.
CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in CONTRACTED.split() for at, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32  # are taken away at most: the definition passes a flag where `re.sub` takes a count


def normalised(answer: str) -> str:
    """An answer in the form in which answers are compared."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.strip().replace("\n", " ").replace("\t", " ").strip()
    spaced = text
    for mark in PUNCTUATION:
        apart = f"{mark} " in text or f" {mark}" in text
        spaced = spaced.replace(mark, "" if apart else " ")
    spaced = _PERIOD.sub("", spaced, count=_PERIODS)
    words = [NUMBERS.get(word, word) for word in spaced.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def accuracy(answer: str, people: Sequence[str]) -> float:
    """0 .. 1: the mean, over leaving out each of the ten, of min(1, how many of the others gave this answer / 3)."""
    text, given = normalised(answer), [normalised(each) for each in people]
    matches = given.count(text)
    return sum(min(1.0, (matches - (each == text)) / ENOUGH) for each in given) / len(given) if matches else 0.0
