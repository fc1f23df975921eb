"""V* Bench: which of two to four options the model finds likeliest. No text is generated.

Official (scripts/evaluation/eval_vbench.py): for each option the prompt, a space and the option are tokenised as one
text; its loss is the mean cross entropy of the option's tokens. Right is the first option of the file, if its loss is
the lowest; of equal ones the first counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from engines.errors import DataError
from runtime.engine import Engine
from runtime.evaluate.task import (
    SHORT_ANSWER,
    Item,
    Looked,
    Record,
    Task,
    numbered,
    read_data,
    recorded,
    require_images,
    text_of,
    texts_of,
    there,
)
from runtime.view import ImageView

SUBSETS = ("direct_attributes", "relative_position", "GPT4V-hard", "OCR")
PAPER = SUBSETS[:2]  # what the paper's overall score is of
SUFFIXES = ("jpg", "JPG", "webp", "png", "jpeg")  # official: the first that is there
FIX = "hf download craigwu/vstar_bench --repo-type dataset --local-dir vstar_bench, then --data vstar_bench"


def read(folder: Path) -> list[Item]:
    """The questions of the subsets that are there: SUBSET/NAME.json with `question` and `options`, and an image of the
    same name beside each. DataError for anything else."""
    subsets = [subset for subset in SUBSETS if there(folder / subset, Path.is_dir)]
    if not subsets:
        raise DataError(
            f"{folder} has no subset of V* Bench", expected=f"a folder with some of {list(SUBSETS)}", fix=FIX
        )
    made = []
    for subset in subsets:
        files = sorted((folder / subset).glob("*.json"))
        if not files:
            raise DataError(
                f"{folder / subset} holds no questions", expected="NAME.json and NAME.jpg for each", fix=FIX
            )
        made += [partial(_item, path, subset) for path in files]
    return require_images(numbered(made, folder), FIX)


def _item(path: Path, subset: str, index: int) -> Item:
    row = read_data(path, FIX)
    if not isinstance(row, dict):
        raise DataError(f"{path} holds no question", expected='{"question": ..., "options": [...]}', fix=FIX)
    question = text_of(row, "question", str(path))
    options = texts_of(row, "options", str(path), 2, 4)
    if not all(option.strip() for option in options):
        raise DataError(f"{path} has an empty option", expected="text to score in each", fix=FIX)
    images = [path.with_suffix(f".{suffix}") for suffix in SUFFIXES]
    image = next((image for image in images if there(image, Path.exists)), images[0])
    return Item(index, f"{subset}/{path.stem}", subset, image, question, question + SHORT_ANSWER, options)


def ask(engine: Engine, view: ImageView, item: Item, page_budget: int | None) -> Record:
    """Score every option. Raises what `ImageView.score` does."""
    scores = view.score(item.prompt, item.references, page_budget=page_budget)
    losses = [-score.mean for score in scores]
    chosen = int(np.argmin(losses))
    return recorded(
        item,
        item.references[chosen],
        float(chosen == 0),
        [score.pages_read for score in scores],
        losses=[round(loss, 6) for loss in losses],
    )


def look(engine: Engine, view: ImageView, item: Item, page_budget: int | None) -> Looked:
    """See Task.look: of the option that it finds likeliest."""
    scores = view.score(item.prompt, item.references, page_budget=page_budget)
    best = max(scores, key=lambda score: score.mean)  # the first of equal ones
    return best.cells, engine.prompter.captions(best.token_ids)


def answer_files(records: Sequence[Record], template: str) -> Mapping[str, str]:
    """vbench_SUBSET.txt of each subset: its name, how many are right, of how many, the share."""
    texts = {}
    for subset in SUBSETS:
        scores = [record.score for record in records if record.subset == subset]
        if scores:
            right = int(sum(scores))
            texts[f"vbench_{subset}.txt"] = f"{subset} {right} {len(scores)} {right / len(scores)}\n"
    return texts


TASK = Task("vstar", "V* Bench", graded=False, read=read, ask=ask, look=look, answer_files=answer_files, overall=PAPER)
