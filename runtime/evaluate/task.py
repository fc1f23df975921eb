"""What a benchmark is: questions about images, how one is asked and judged, and the files its authors would write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engines.checks import shown
from engines.errors import DataError
from plugins.files import open_file, read_file, read_json
from runtime.answer import Answer
from runtime.engine import Engine
from runtime.request import answer_room
from runtime.view import ImageView

LARGEST = 4 << 30  # bytes of a data set's JSON; MagnifierBench keeps all its images in one
MAX_NEW_TOKENS = 512  # official: of every answer that is generated
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."  # official: behind questions of V* and TextVQA
LOOKED_AT = 8  # tokens of a generated answer that a picture shows
NAMED = 3  # files or questions that a message names; of the others it tells the number
Looked = tuple[np.ndarray, list[str]]
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Item:
    """One question of a data set.

    index: its place among all of them. key: its name, unique. subset: part of the data set it is counted in. image: a
    file, or an encoded image. question: as the data set has it. prompt: as the engine is asked. references: what
    answers are compared with; of V* the options, the right one first.
    """

    index: int
    key: str
    subset: str
    image: Path | bytes
    question: str
    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """What came of one question.

    index, key, subset, question: of its item. answer: text, without white space around it; of V* the option with the
    lowest loss. score: 0 .. 1. pages_read: mean over the layers that read pages, and the tokens. details: what else the
    benchmark's own files hold, as JSON. image: `image_digest` of the image that was asked about; `asking.evaluate`,
    which asks all questions about one, puts it there.
    """

    index: int
    key: str
    subset: str
    question: str
    answer: str
    score: float
    pages_read: float
    details: Mapping[str, Any] = field(default_factory=dict)
    image: str = ""


@dataclass(frozen=True)
class Task:
    """One benchmark.

    name: on the command line. title: in tables. graded: a score may lie between 0 and 1; else an answer is right or
    wrong. read: the items of a data folder; raises DataError. ask: puts an item to the view of its image, with a page
    budget (None: the bundle's); raises what the view does. look: where the model looked, bool [T, M, C, C] of T tokens
    of its answer, and these as text. answer_files: of records and the bundle's prompt template, the text of each file
    that the authors' script would write, by what its name ends with. overall: subsets that the total is of; None = all.
    """

    name: str
    title: str
    graded: bool
    read: Callable[[Path], list[Item]]
    ask: Callable[[Engine, ImageView, Item, int | None], Record]
    look: Callable[[Engine, ImageView, Item, int | None], Looked]
    answer_files: Callable[[Sequence[Record], str], Mapping[str, str]]
    overall: tuple[str, ...] | None = None

    def counts(self, subset: str) -> bool:
        """Whether the total is of this subset, too."""
        return self.overall is None or subset in self.overall


def look_at_answer(engine: Engine, view: ImageView, item: Item, page_budget: int | None) -> Looked:
    """`Task.look` where an answer is generated; of its first tokens."""
    answer = view.ask(item.prompt, max_new_tokens=LOOKED_AT, page_budget=page_budget, trace=True)
    assert answer.trace is not None  # as it was asked for
    return answer.trace.cells, engine.prompter.captions(answer.token_ids)


def answer_to(
    engine: Engine,
    view: ImageView,
    prompt: str,
    page_budget: int | None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    **options: Any,
) -> Answer:
    """The answer, greedy unless `options` of `ImageView.ask` say otherwise: of `max_new_tokens` at most, or what the
    bundle's context has room for. Raises what `ImageView.ask` does."""
    has_image = view.size is not None
    ids, _ = engine.prompter.expand(engine.prompter.encode(prompt, has_image), has_image)
    room = max(1, answer_room(len(ids), engine.geometry.context))  # of none, `ask` says what to do
    return view.ask(prompt, max_new_tokens=min(max_new_tokens, room), page_budget=page_budget, **options)


def answered(item: Item, answer: Answer, score: Callable[[str], float], **details: Any) -> Record:
    """The record of a generated answer; `score` is given its text, without white space around it."""
    text = str(answer).strip()
    ended = {"finish_reason": answer.finish_reason}
    return recorded(item, text, score(text), [answer.stats.pages_read], **details, **ended)


def recorded(item: Item, answer: str, score: float, pages_read: Iterable[Any], **details: Any) -> Record:
    """The record of an item, before its image's digest is known; `pages_read`: arrays of page counts, of tokens and
    layers."""
    counts = [count for each in pages_read for count in each.ravel().tolist()]
    mean = round(sum(counts) / len(counts), 3) if counts else 0.0
    return Record(item.index, item.key, item.subset, item.question, answer, score, mean, details)


def detail_of(record: Record, name: str) -> str:
    """A detail that is text. DataError where a file of results lacks it."""
    value = record.details.get(name)
    if not isinstance(value, str):
        raise DataError(
            f"the result of {record.key!r:.100} has {name} {shown(value)}", expected="text", fix="evaluate it again"
        )
    return value


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """A line of JSON for each row."""
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def digest_of(items: Sequence[Item]) -> str:
    """ "sha256:..." of the questions, of what answers are compared with, and of the names of the images. What
    the images hold is in each record: hashing gigabytes before the first question is not worth it."""
    total = hashlib.sha256()
    for item in items:
        image = item.image.name if isinstance(item.image, Path) else None
        total.update(json.dumps([item.key, item.subset, item.prompt, item.references, image]).encode())
    return f"sha256:{total.hexdigest()}"


def image_digest(image: Path | bytes) -> str:
    """16 hexadecimal digits of the SHA-256 of an image's bytes. DataError for a file that is not there."""
    data = image if isinstance(image, bytes) else read_file(image, DataError, limit=LARGEST)
    return hashlib.sha256(data).hexdigest()[:16]


def numbered(items: Iterable[Callable[[int], Item]], where: Path) -> list[Item]:
    """The items with their places, from 0 on. DataError when there are none, or two of one name."""
    made = [make(index) for index, make in enumerate(items)]
    if not made:
        raise DataError(f"{where} holds no questions", expected="at least one")
    seen = set[str]()
    for item in made:
        if item.key in seen:
            raise DataError(
                f"{where}: the question {item.key!r:.100} comes twice", expected="a name of its own for each"
            )
        seen.add(item.key)
    return made


def read_data(path: Path, fix: str) -> Any:
    """What a JSON file of a data set holds. DataError, with `fix`, where it is missing or broken."""
    return read_json(path, DataError, limit=LARGEST, fix=fix)


def text_of(row: Mapping[str, Any], name: str, where: str) -> str:
    """A field that holds text, not only white space. DataError, which says `where`, for anything else."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        found = f"has {name} {shown(value)}" if name in row else f"has no {name}"
        raise DataError(f"{where} {found}", expected="text")
    return value


def texts_of(row: Mapping[str, Any], name: str, where: str, low: int, high: int) -> tuple[str, ...]:
    """A field that holds a list of `low` to `high` texts. DataError, which says `where`, for anything else."""
    value = row.get(name)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value) or not low <= len(value) <= high:
        count = f"{low}" if low == high else f"{low} to {high}"
        found = f"has {name} {shown(value)}" if name in row else f"has no {name}"
        raise DataError(f"{where} {found}", expected=f"a list of {count} texts")
    return tuple(value)


def there(path: Path, kind: Callable[[Path], bool] = Path.is_file) -> bool:
    """`kind` of a path. DataError where nobody can tell: in a folder that may not be entered, with too long a name."""
    try:
        return kind(path)
    except OSError as error:
        raise DataError(
            f"{path!s:.200} cannot be looked at: {error.strerror}", expected="a readable file or folder"
        ) from None


def require_images(items: Sequence[Item], fix: str) -> list[Item]:
    """The items, all of whose image files are there. DataError, with `fix`, which counts those that are not, and names
    the first; and for files that git keeps elsewhere."""
    paths = list(dict.fromkeys(item.image for item in items if isinstance(item.image, Path)))
    missing = [path for path in paths if not there(path)]
    if missing:
        names = ", ".join(str(path) for path in missing[:NAMED]) + (", ..." if len(missing) > NAMED else "")
        raise DataError(f"{len(missing)} of {len(paths)} images are missing: {names}", expected="all of them", fix=fix)
    for path in paths:
        if path.stat().st_size < 1024:  # of a photo it would not be worth looking
            with open_file(path, DataError, fix=fix) as file:
                if file.read(len(_POINTER)) == _POINTER:
                    raise DataError(
                        f"{path} is a pointer of Git LFS, not the image",
                        expected="the image",
                        fix="git lfs install && git lfs pull, in the data set's folder",
                    )
    return list(items)
