"""TextVQA, the validation set of 0.5.1: a short answer, compared with those of ten people.

Official (scripts/evaluation/eval_textvqa.py): greedy, no OCR tokens in the prompt, the question as it is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from engines.errors import DataError
from runtime.engine import Engine
from runtime.evaluate.task import (
    SHORT_ANSWER,
    Item,
    Record,
    Task,
    answer_to,
    answered,
    detail_of,
    json_lines,
    look_at_answer,
    numbered,
    read_data,
    require_images,
    text_of,
    texts_of,
)
from runtime.evaluate.vqa_accuracy import PEOPLE, accuracy
from runtime.view import ImageView

QUESTIONS, IMAGES = "TextVQA_0.5.1_val.json", "train_images"
FIX = (
    f"curl -LO https://dl.fbaipublicfiles.com/textvqa/data/{QUESTIONS}, and unpack "
    "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip beside it"
)


def read(folder: Path) -> list[Item]:
    """The questions of TextVQA_0.5.1_val.json, whose images are train_images/IMAGE_ID.jpg. DataError for anything
    else."""
    path = folder / QUESTIONS
    content = read_data(path, FIX)
    rows = content.get("data") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} has no list of questions", expected='{"data": [{"question": ...}, ...]}', fix=FIX)
    # Official: the scorer finds an answer's question by its image and its text, of which the last row counts.
    answers = {}
    for place, row in enumerate(rows):
        where = f"{path}, question {place}"
        answers[_name(row, where)] = texts_of(row, "answers", where, PEOPLE, PEOPLE)
    made = [partial(_item, folder, row, answers[_name(row, "")]) for row in rows]
    return require_images(numbered(made, path), FIX)


def _name(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    image, question = text_of(row, "image_id", where), text_of(row, "question", where)
    if PurePosixPath(image).name != image:
        raise DataError(f"{where} has image_id {image!r:.100}", expected=f"the name of a file in {IMAGES}", fix=FIX)
    return image, question.lower()


def _item(folder: Path, row: Mapping[str, Any], answers: tuple[str, ...], index: int) -> Item:
    question, image = row["question"], folder / IMAGES / f"{row['image_id']}.jpg"
    key = str(row.get("question_id", index))
    return Item(index, key, "validation", image, question, question + SHORT_ANSWER, answers)


def ask(engine: Engine, view: ImageView, item: Item, page_budget: int | None) -> Record:
    """Answer it. Raises what `ImageView.ask` does."""
    assert isinstance(item.image, Path)
    answer = answer_to(engine, view, item.prompt, page_budget)
    return answered(item, answer, lambda text: accuracy(text, item.references), image=item.image.name)


def answer_files(records: Sequence[Record], template: str) -> Mapping[str, str]:
    """answers.jsonl, which llava/eval/eval_textvqa.py scores."""
    rows = (
        {
            "question_id": detail_of(record, "image"),  # official: the image's file name, not the question's id
            "prompt": template.replace("{prompt}", record.question + SHORT_ANSWER),
            "text": record.answer,
            "answer_id": str(record.index),
            "model_id": "llava-v1.5",
            "metadata": {},
        }
        for record in records
    )
    return {"answers.jsonl": json_lines(rows)}


TASK = Task("textvqa", "TextVQA", graded=True, read=read, ask=ask, look=look_at_answer, answer_files=answer_files)
