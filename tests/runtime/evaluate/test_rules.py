"""How answers are judged: worked examples of the published rules, and the figures that go with a share."""

from __future__ import annotations

import json
from math import comb, sqrt
from pathlib import Path

import pytest

from runtime.evaluate.magnifier import letter_of, prompt_of
from runtime.evaluate.significance import estimate, exact_p
from runtime.evaluate.vqa_accuracy import CONTRACTIONS, accuracy, normalised


@pytest.mark.parametrize(
    "answer, form",
    [
        ("The Dog", "dog"),
        ("  a an the  ", ""),
        ("Two dogs, one cat.", "2 dogs 1 cat"),
        ("None", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # two apostrophes missing are none of the forms
        ("couldn'tve", "couldn't've"),
        ("yalld've", "yalld've"),
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),  # the published table has this one the wrong way round
        ("Mike's", "mike 's"),
        ("it's", "it 's"),
        ("3.50", "3.50"),
        ("U.S.A.", "usa"),
        ("1,000", "1000"),
        ("10:30", "10:30"),
        ("a-b", "b"),  # a space for the hyphen, and then the article goes
        ("x-ray", "x ray"),
        ("x -ray", "x ray"),  # beside a space it is dropped
        ("coca-cola -", "cocacola"),  # and then everywhere in the answer
        ("$5!", "$5"),
        ("(left)", "left"),
        ("line\nline\tline", "line line line"),
        ("Straße", "straße"),
        ("." * 40, "." * 8),  # 32 are dropped: a flag of the published code counts as a number
        ("", ""),
    ],
)
def test_answers_are_compared_in_this_form(answer, form):
    assert normalised(answer) == form


def test_every_contraction_lacks_one_apostrophe():
    """But for the one that the published table has the wrong way round."""
    assert len(CONTRACTIONS) == 114  # as many as the published table has that can apply
    lacking = {form: word for form, word in CONTRACTIONS.items() if form != "somebody'd"}
    assert all(
        len(form) == len(word) - 1 and form.replace("'", "") == word.replace("'", "") for form, word in lacking.items()
    )


@pytest.mark.parametrize(
    "matches, expected",
    # Of those who gave it, (matches - 1) others count; of the rest, all: (m min(1, (m-1)/3) + (10-m) min(1, m/3)) / 10.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_leaves_each_person_out(matches, expected):
    people = ["The Nokia."] * matches + [f"other {index}" for index in range(10 - matches)]
    assert accuracy("nokia", people) == pytest.approx(expected, abs=1e-12)


PUBLISHED = json.loads((Path(__file__).parent / "published_vqa.json").read_text())


def test_answers_take_the_form_that_the_published_evaluator_gives_them():
    """Recorded: every contraction, number and mark of its rules, and made-up answers of them."""
    assert len(PUBLISHED["forms"]) > 500
    assert {answer: normalised(answer) for answer, _ in PUBLISHED["forms"]} == dict(PUBLISHED["forms"])


def test_accuracies_are_those_of_the_published_evaluator():
    """Recorded: of whole questions."""
    found = [accuracy(each["answer"], each["people"]) for each in PUBLISHED["questions"]]
    assert found == pytest.approx([each["accuracy"] for each in PUBLISHED["questions"]], abs=1e-12)
    assert {0.0, 0.3, 0.6, 0.9, 1.0} == {round(each, 6) for each in found}


def test_magnifier_puts_options_on_lines_of_their_own():
    asked = prompt_of("What is it? A. a cat, B. a dog, C. a hat, D. a bat.")
    assert asked == (
        "What is it?\nA. a cat\nB. a dog\nC. a hat\nD. a bat.\n"
        "Answer with the option's letter from the given choices directly."
    )


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"),
        ("D. A thing. The answer is C", "C"),
        ("B or A", "A"),  # the first of the alphabet, not of the answer
        ("Dogs", "D"),
        ("a dog", "A"),  # no capital: as any letter
        ("bed", "B"),
        ("nothing", "other"),
        ("the answer is d", "A"),  # only with capitals; then the a of answer
        ("", "other"),
    ],
)
def test_the_letter_of_an_answer(answer, letter):
    assert letter_of(answer) == letter


def test_a_share_has_wilsons_interval():
    """Of 56 of 115, as the file of results once committed to the official repository has it."""
    found = estimate([1.0] * 56 + [0.0] * 59, graded=False)
    z, n, p = 1.959963984540054, 115, 56 / 115
    middle, half = (
        (p + z * z / (2 * n)) / (1 + z * z / n),
        z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n),
    )
    assert (found.count, found.mean) == (115, pytest.approx(0.487, abs=5e-4))
    assert (found.low, found.high) == (pytest.approx(middle - half), pytest.approx(middle + half))
    sure = estimate([1.0] * 5, graded=False)
    assert (sure.high, sure.low) == (1.0, pytest.approx(5 / (5 + z * z)))


def test_graded_scores_have_students_interval():
    found = estimate([0.0, 0.3, 0.6, 0.9, 1.0], graded=True)
    spread = sqrt(sum((x - 0.56) ** 2 for x in (0.0, 0.3, 0.6, 0.9, 1.0)) / 4 / 5)
    assert found.mean == pytest.approx(0.56)
    assert found.low == pytest.approx(0.56 - 2.7764451052 * spread) and found.high == 1.0  # it ends at 1
    assert estimate([0.3], graded=True).low is None and estimate([1.0, 1.0], graded=True).high is None


@pytest.mark.parametrize("gained, lost", [(0, 0), (1, 0), (3, 9), (9, 3), (5, 5), (0, 12)])
def test_mcnemars_exact_test(gained, lost):
    """Twice the smaller tail of a fair coin."""
    n, k = gained + lost, min(gained, lost)
    tail = 2 * sum(comb(n, i) for i in range(k + 1)) / 2**n
    assert exact_p(gained, lost) == pytest.approx(min(1.0, tail))
