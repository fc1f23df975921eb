"""MagnifierBench: what is asked, spelt out, the answer to it, and whether it is right."""

from __future__ import annotations

import io
import json

import PIL.Image
import pytest

from engines.bundle.manifest import PROMPT_TEMPLATE
from engines.errors import ImageError
from runtime import Answer, Engine
from runtime.evaluate import magnifier
from tests.runtime.evaluate.datasets import magnifier_row, write_magnifier
from tests.runtime.evaluate.greedy import ROOMY, SYSTEM, answer, watch

PROMPT = (
    "What is it?\nA. a cat\nB. a dog\nC. a hat\nD. a bat.\n"
    "Answer with the option's letter from the given choices directly."
)


@pytest.fixture(scope="module")
def model(random_model):
    """(checkpoint, bundle) with the official template."""
    return random_model("roomy", ROOMY, tokenizer=True, template=PROMPT_TEMPLATE)


def test_the_official_prompt_is_answered_greedily(model, tmp_path, monkeypatch):
    checkpoint, bundle = model
    row = magnifier_row("What is it? A. a cat, B. a dog, C. a hat, D. a bat.", "B", ["IMG_1"])
    (item,), asked = magnifier.read(write_magnifier(tmp_path / "m", {"q": row})), watch(monkeypatch)
    with Engine(bundle) as engine, engine.image(item.image, exif=False) as view:
        record = magnifier.ask(engine, view, item, None)
    assert asked == [(PROMPT, {"max_new_tokens": 512, "page_budget": None})]
    prompt = f"{SYSTEM} USER: <image>\n{PROMPT} ASSISTANT:"
    with PIL.Image.open(io.BytesIO(item.image)) as image:
        assert record.answer == answer(checkpoint, ROOMY, image.convert("RGB"), prompt) != ""
    (line,) = magnifier.answer_files([record], PROMPT_TEMPLATE)["answers.jsonl"].splitlines()
    written = json.loads(line)
    assert (written["prompt"], written["text"], written["gt"]) == (prompt, record.answer, "B")
    assert record.score == float(written["prased_ans"] == "B")


@pytest.mark.parametrize(
    ("right", "said", "score"), [("B", "B. a dog", 1.0), ("B", "A", 0.0), ("E", "E", 0.0), ("b", "B", 0.0)]
)
def test_what_is_right(model, tmp_path, monkeypatch, right, said, score):
    """An answer of the data set that is no letter of the four makes a question that nobody answers, officially too."""
    row = magnifier_row("What is it? A. a cat, B. a dog, C. a hat, D. a bat.", right, ["IMG_1"])
    (item,) = magnifier.read(write_magnifier(tmp_path / "m", {"q": row}))
    watch(monkeypatch)
    monkeypatch.setattr(Answer, "__str__", lambda _: said)
    with Engine(model[1]) as engine, engine.image(item.image, exif=False) as view:
        assert magnifier.ask(engine, view, item, None).score == score


def test_base64_of_what_is_no_image(model, tmp_path):
    row = magnifier_row("What? A. x, B. y, C. z, D. w", "A", ["BAD"])
    (item,) = magnifier.read(write_magnifier(tmp_path / "m", {"q1": row}, BAD="AAEC\nAwQ="))
    with Engine(model[1]) as engine, pytest.raises(ImageError), engine.image(item.image, exif=False) as view:
        magnifier.ask(engine, view, item, None)
