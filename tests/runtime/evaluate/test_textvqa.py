"""TextVQA: what is asked, spelt out, and the answer to it."""

from __future__ import annotations

import json

import PIL.Image
import pytest

from engines.bundle.manifest import PROMPT_TEMPLATE
from runtime import Engine
from runtime.evaluate import textvqa
from tests.runtime.evaluate.datasets import textvqa_row, write_textvqa
from tests.runtime.evaluate.greedy import FEW, ROOMY, SYSTEM, answer, watch

QUESTIONS = ("What brand is it?", "was steht da: „Straße“?")


@pytest.mark.parametrize("page_budget", [None, 2])
def test_the_official_prompt_is_answered_greedily(random_model, tmp_path, monkeypatch, page_budget):
    checkpoint, bundle = random_model("roomy", ROOMY, tokenizer=True, template=PROMPT_TEMPLATE)
    rows = [textvqa_row(index, f"i{index}", question, ["x"] * 10) for index, question in enumerate(QUESTIONS)]
    folder = write_textvqa(tmp_path / "t", rows)
    asked = watch(monkeypatch)
    items, records = textvqa.read(folder), []
    with Engine(bundle) as engine:
        for item in items:
            with engine.image(item.image, exif=False) as view:
                records.append(textvqa.ask(engine, view, item, page_budget))
    instruction = "\nAnswer the question using a single word or phrase."
    greedy = {"max_new_tokens": 512, "page_budget": page_budget}
    assert asked == [(f"{question}{instruction}", greedy) for question in QUESTIONS]
    prompts = [f"{SYSTEM} USER: <image>\n{question}{instruction} ASSISTANT:" for question in QUESTIONS]
    if page_budget is None:
        for index, (record, prompt) in enumerate(zip(records, prompts, strict=True)):
            with PIL.Image.open(folder / "train_images" / f"i{index}.jpg") as image:
                assert record.answer == answer(checkpoint, ROOMY, image.convert("RGB"), prompt)
        assert records[0].answer != records[1].answer and all(len(record.answer) >= FEW // 2 for record in records)
    lines = textvqa.answer_files(records, PROMPT_TEMPLATE)["answers.jsonl"].splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == prompts
    assert [json.loads(line)["text"] for line in lines] == [record.answer for record in records]


def test_a_short_context_ends_an_answer_sooner(random_model, tmp_path, monkeypatch):
    """By as many tokens as the prompt leaves, whose last answer token is never fed."""
    g = ROOMY
    folder = write_textvqa(tmp_path / "t", [textvqa_row(0, "i", "x" * 700, ["x"] * 10)])
    _, bundle = random_model("roomy", g, tokenizer=True, template=PROMPT_TEMPLATE)
    asked, (item,) = watch(monkeypatch), textvqa.read(folder)
    with Engine(bundle) as engine, engine.image(item.image, exif=False) as view:
        textvqa.ask(engine, view, item, None)
        prompt = view.ask(item.prompt).stats.prompt_tokens
    assert asked[0][1]["max_new_tokens"] == g.context + 1 - prompt < 512
