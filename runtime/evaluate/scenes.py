"""Questions with one right answer each: the default model's held-out scenes, or pictures of your own.

DIR/questions.json: [{"image": "0000.png", "question": "...", "answer": "...", "kind": "..."}, ...]. `image` is a file
in DIR, `kind` the row of the table, which may be left out. An answer is right if it is that text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from engines.errors import DataError
from runtime.engine import Engine
from runtime.evaluate.task import (
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
)
from runtime.view import ImageView

QUESTIONS = "questions.json"
FIX = "python -m export.default_model.evaluate --write DIR, then --data DIR"


def read(folder: Path) -> list[Item]:
    """The questions of a folder. DataError for one of another layout."""
    path = folder / QUESTIONS
    rows = read_data(path, FIX)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} is no list", expected='[{"image": ..., "question": ..., "answer": ...}, ...]', fix=FIX)
    return require_images(numbered([partial(_item, path, row) for row in rows], path), FIX)


def _item(path: Path, row: Mapping[str, Any], index: int) -> Item:
    where = f"{path}, question {index}"
    image, question, right = (text_of(row, name, where) for name in ("image", "question", "answer"))
    kind = text_of(row, "kind", where) if "kind" in row else "questions"
    inside = PurePosixPath(image)
    if inside.is_absolute() or ".." in inside.parts:
        raise DataError(f"{where} has image {image!r:.100}", expected="a file in the same folder", fix=FIX)
    return Item(index, f"{index} {image}", kind, path.parent / inside, question, question, (right,))


def ask(engine: Engine, view: ImageView, item: Item, page_budget: int | None) -> Record:
    """Answer it. Raises what `ImageView.ask` does."""
    (right,) = item.references
    answer = answer_to(engine, view, item.prompt, page_budget)
    return answered(item, answer, lambda text: float(text == right), right=right)


def answer_files(records: Sequence[Record], template: str) -> Mapping[str, str]:
    """answers.jsonl: question, answer and the right one."""
    rows = (
        {"question": record.question, "answer": record.answer, "right": detail_of(record, "right")}
        for record in records
    )
    return {"answers.jsonl": json_lines(rows)}


TASK = Task("scenes", "scenes", graded=False, read=read, ask=ask, look=look_at_answer, answer_files=answer_files)
