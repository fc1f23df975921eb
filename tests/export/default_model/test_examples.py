"""The shipped examples are what their command draws, and their answers are true."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from export.default_model import examples
from export.default_model.asking.tokenizer import known_words
from export.default_model.questions import LONGEST, Question, build_tokenizer, conversation_text
from tests.paths import ROOT

FOLDER = ROOT / "examples"
ROWS = json.loads((FOLDER / "examples.json").read_text())


@pytest.fixture(scope="module")
def scenes() -> dict:
    return {name: examples.draw(name) for name in examples.SCENES}


def test_the_files_are_what_the_command_writes(scenes):
    assert [row for name, scene in scenes.items() for row in examples.rows(name, scene)] == ROWS
    assert len(scenes) == 12 and len(ROWS) == 36
    images = {}
    for name, scene in scenes.items():
        with Image.open(FOLDER / f"{name}.png") as image:
            assert image.mode == "RGB"
            if examples.SCENES[name][1].quality is None:  # libjpeg's versions differ
                assert np.array_equal(np.asarray(image), np.asarray(scene.image)), name
            images[name] = image.copy()
    with Image.open(FOLDER / "strip.png") as strip:
        assert np.array_equal(np.asarray(strip.convert("RGBA")), np.asarray(examples.strip(images)))
    assert (FOLDER / "strip.png").stat().st_size < 400_000


def test_every_kind_is_asked_in_words_that_the_model_knows():
    kinds = {turns[-1][0] for rows in examples.QUESTIONS.values() for turns in rows}
    assert kinds == {"one", "two", "yes/no", "count", "colour", "shape", "where", "side", "compare", "which", "unknown"}
    assert sum("history" in row for row in ROWS) >= 3
    tokenizer = build_tokenizer()
    for row in ROWS:
        words = set(re.findall("[a-z]+", f"{row['question']} {row['answer']}"))
        assert words - known_words() <= {"dog"}
        said = tuple((question, answer) for question, answer in row.get("history", ()))
        text = conversation_text(Question("", row["question"], row["answer"], history=said)) + row["answer"]
        assert len(tokenizer.encode(text, add_special_tokens=False)) < LONGEST


@pytest.mark.parametrize(
    "image, question, answer",
    [  # as read off the pictures by eye
        ("poster", "what numbers are in the red star and the cyan circle?", "30 and 98"),
        ("window", "what number is in the green triangle?", "96"),
        ("photo", "how many hearts are there?", "8"),
        ("night", "how many yellow shapes are there?", "0"),
        ("postcard", "count the stars.", "5"),
        ("postcard", "what number is in the green star?", "there is no green star"),
        ("night", "where is the green star?", "top left"),
        ("evening", "is the yellow triangle below the red triangle?", "no"),
        ("plaza", "and how many red ones?", "1"),
        ("window", "where is the purple heart? answer in a sentence.", "the purple heart is at the top right"),
    ],
)
def test_answers_are_true(image, question, answer):
    (found,) = [row["answer"] for row in ROWS if (row["image"], row["question"]) == (f"{image}.png", question)]
    assert found == answer


def test_a_question_without_one_right_answer_is_refused(scenes):
    with pytest.raises(ValueError, match="one of 5"):
        examples.answer("one", "what number is in the [star]?", scenes["postcard"])
    with pytest.raises(ValueError, match="border"):
        examples.answer("where", "where is the [pink cross]?", scenes["garden"])
