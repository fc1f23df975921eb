"""MagnifierBench, multiple choice: the letter of one of four options.

Official (scripts/evaluation/eval_magnifier.py): the options come on lines of their own, the answer is greedy, and its
letter is what `letter_of` finds. There is a rule more in the official code, for an answer that spells an option out: it
looks for options behind commas, where they no longer are, so it never applies, and is not here. A question whose right
answer is no letter is always answered wrong. The free form of the questions is judged by a model of OpenAI's, and not
here either.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from engines.checks import shown
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
    text_of,
)
from runtime.view import ImageView

QUESTIONS, IMAGES = "data_instructions.json", "images.json"
LETTERS, OTHER = "ABCD", "other"
INSTRUCTION = "\nAnswer with the option's letter from the given choices directly."
FIX = "download MagnifierBench.zip (the official README has the address) and unpack it"


def read(folder: Path) -> list[Item]:
    """The questions of data_instructions.json, whose images are in images.json. DataError for anything else."""
    path, images_path = folder / QUESTIONS, folder / IMAGES
    content, images = read_data(path, FIX), read_data(images_path, FIX)
    rows = content.get("data") if isinstance(content, dict) else None
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise DataError(f"{path} has no questions", expected='{"data": {ID: {"instruction": ...}, ...}}', fix=FIX)
    if not isinstance(images, dict):
        raise DataError(f"{images_path} has no images", expected="{ID: base64, ...}", fix=FIX)
    decoded: dict[str, bytes] = {}  # a question more about an image holds the same bytes
    return numbered([partial(_item, path, key, row, images, decoded) for key, row in rows.items()], path)


def _item(
    path: Path, key: str, row: Mapping[str, Any], images: Mapping[str, Any], decoded: dict[str, bytes], index: int
) -> Item:
    where = f"{path}, {key!r:.100}"
    instruction, right = text_of(row, "instruction", where), text_of(row, "answer", where)
    ids = row.get("image_ids")
    named = [name for name in ids if isinstance(name, str)] if isinstance(ids, list) else []
    image = next((name for name in named if name in images), None)
    if image is None:
        raise DataError(f"{where} has image_ids {shown(ids)}", expected=f"a list with an image of {IMAGES}", fix=FIX)
    if image not in decoded:
        try:
            decoded[image] = base64.b64decode(images[image])  # official: line breaks and the like are passed over
        except (TypeError, ValueError, binascii.Error) as error:
            raise DataError(f"{IMAGES}, {image!r:.100}: {error}", expected="an image in base64", fix=FIX) from None
    return Item(index, key, "multiple choice", decoded[image], instruction, prompt_of(instruction), (right,))


def prompt_of(instruction: str) -> str:
    """What is asked: the options on lines of their own, and to answer with a letter."""
    for before, after in ((" A.", "\nA."), (", B.", "\nB."), (", C.", "\nC."), (", D.", "\nD.")):
        instruction = instruction.replace(before, after)
    return instruction + INSTRUCTION


def letter_of(answer: str) -> str:
    """The letter that an answer names: behind "The answer is "; else the first of the alphabet that is in it as a
    capital; else as any letter; "other" without one."""
    if found := re.search(f"The answer is ([{LETTERS}])", answer):
        return found[1]
    return next((letter for text in (answer, answer.upper()) for letter in LETTERS if letter in text), OTHER)


def ask(engine: Engine, view: ImageView, item: Item, page_budget: int | None) -> Record:
    """Answer it. Raises what `ImageView.ask` does."""
    answer = answer_to(engine, view, item.prompt, page_budget)
    (right,) = item.references
    return answered(item, answer, lambda text: float(letter_of(text) == right), right=right)


def answer_files(records: Sequence[Record], template: str) -> Mapping[str, str]:
    """answers.jsonl, of the lines that the official script makes."""
    rows = (
        {
            "question_id": record.key,
            "prompt": template.replace("{prompt}", prompt_of(record.question)),
            "text": record.answer,
            "gt": detail_of(record, "right"),
            "prased_ans": letter_of(record.answer),  # spelt as the official script does
            "model_id": "llava-v1.5",
            "metadata": {},
        }
        for record in records
    )
    return {"answers.jsonl": json_lines(rows)}


TASK = Task(
    "magnifier",
    "MagnifierBench, multiple choice",
    graded=False,
    read=read,
    ask=ask,
    look=look_at_answer,
    answer_files=answer_files,
)
