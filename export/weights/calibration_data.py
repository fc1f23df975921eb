"""What `--calibrate` reads: pictures with questions, and what becomes of them before the first decoder layer.

One JSON list, or one JSON object a line, in the format of examples/examples.json. Pictures and questions go through the
runtime's own code, so that calibration sees what a request will show the model.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from tokenizers import Tokenizer

from engines.bundle.geometry import Geometry
from engines.bundle.pages import margins
from engines.errors import ConfigError, ImageError, OptionError, PromptError
from export.checkpoint.config import ModelConfig
from export.checkpoint.settings import parse
from export.checkpoint.tokenizer import read_tokenizer
from plugins.files import read_file
from runtime.image import load_image
from runtime.preprocess import preprocess
from runtime.text.conversation import Conversation, History, Prompt
from runtime.text.prompter import Prompter

_LIMIT = 256 << 20  # bytes of the list
ENDINGS = (".json", ".jsonl")
FORMAT = '[{"image": "photo.jpg", "question": "what does the sign say?", "answer": "stop"}, ...]'


Turn = Annotated[list[str], Field(min_length=2, max_length=2)]  # question, answer


class Entry(BaseModel):
    """One line of the data. `image`: relative to the file. The answer is optional: it adds decoding steps, which are
    what reads hi-res pages. `history`: question and answer of each turn before it. `input_ids` and `answer_ids` are for
    models without a tokenizer; -200 is the image."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image: str
    question: str | None = None
    answer: str | None = None
    history: list[Turn] = Field(default_factory=list)
    input_ids: list[int] | None = None
    answer_ids: list[int] | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> Entry:
        if (self.question is None) == (self.input_ids is None):
            raise ValueError("one question, or input_ids")
        if self.answer is not None and self.answer_ids is not None:
            raise ValueError("one answer, or answer_ids")
        if self.history and self.question is None:
            raise ValueError("history stands before a question in words")
        return self


@dataclass(frozen=True)
class Request:
    """A request as the decoder gets it."""

    name: str  # where it is from, for messages
    image: Path
    ids: np.ndarray  # [S] int64; -1-j stands for image feature j
    begin: int  # position of image feature 0
    answer: tuple[int, ...]  # tokens fed one by one after the prompt


@dataclass(frozen=True)
class Picture:
    """An image as the vision tower and the selection get it."""

    tiles: np.ndarray  # [1 + zoom * zoom, 3, lowres, lowres] float32: the whole, then its hi-res tiles
    margins: tuple[int, int]  # rows, columns of the map zeroed at each end


def data_file(path: Path) -> Path:
    """The file that `path` names: itself, or the one list in a folder. OptionError if there is none, or several."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise OptionError(
            f"no calibration data {path}", expected=FORMAT, fix="--calibrate examples, or a file of yours"
        )
    found = sorted(file for file in path.iterdir() if file.suffix in ENDINGS)
    if len(found) != 1:
        raise OptionError(
            f"{len(found)} files in {path} could be the calibration data",
            expected=f"one file that ends in {' or '.join(ENDINGS)}",
            fix="name the file",
        )
    return found[0]


def read_entries(file: Path) -> list[Entry]:
    """Every entry of a file, in order. ConfigError for what is no such list, an empty one, or a bad entry."""
    try:
        text = read_file(file, ConfigError, limit=_LIMIT, fix="check the file").decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: cannot be read ({error})", expected=FORMAT, fix="check the file") from None
    raw = _parsed(text, file)
    if not raw:
        raise ConfigError(
            f"{file}: no entries", expected=FORMAT, fix="a few dozen questions are enough, one is the least"
        )
    return [parse(Entry, item, Path(f"{file}, entry {number}")) for number, item in enumerate(raw, 1)]


def _parsed(text: str, file: Path) -> list[Any]:
    try:
        whole = json.loads(text)
        return whole if isinstance(whole, list) else [whole]
    except (ValueError, RecursionError):
        pass
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                lines.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ConfigError(
                    f"{file}: neither a JSON list nor JSON lines (line {number}: {error!s:.200})", expected=FORMAT
                ) from None
    return lines


def read_requests(path: Path, model: Path, config: ModelConfig) -> list[Request]:
    """The requests of a file or folder for the checkpoint in folder `model`. Opens no image.

    Raises OptionError, ConfigError; PromptError for a question that does not fit, or one in words where the checkpoint
    has no tokenizer.
    """
    file = data_file(path)
    entries = read_entries(file)
    info = read_tokenizer(model, config.geometry.vocab)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer.json" if info else None
        if info and tokenizer:
            tokenizer.write_bytes(info.content)
        prompter = Prompter(
            tokenizer,
            template=config.prompt_template,
            turn=config.turn_template,
            bos_id=info.bos_id if info else config.bos_token_id,
            vocab=config.geometry.vocab,
            image_tokens=config.geometry.image_tokens,
        )
        words = Tokenizer.from_file(str(tokenizer)) if tokenizer else None
    return [
        _request(entry, f"{file}, entry {n}", file.parent, prompter, words, config)
        for n, entry in enumerate(entries, 1)
    ]


def read_pictures(requests: Sequence[Request], g: Geometry) -> dict[Path, Picture]:
    """The pictures of the requests, each opened once. ImageError, which names the first entry about it, for one that is
    missing or none."""
    pictures: dict[Path, Picture] = {}
    for request in requests:
        if request.image not in pictures:
            try:
                image = load_image(request.image)
            except ImageError as error:
                fix = error.fix or "paths are relative to the file of the data"
                raise ImageError(f"{request.name}: {error.found}", expected=error.expected, fix=fix) from error
            pictures[request.image] = Picture(preprocess(image, g), margins(*image.size, g.grid))
    return pictures


def _request(
    entry: Entry, name: str, folder: Path, prompter: Prompter, words: Tokenizer | None, config: ModelConfig
) -> Request:
    g = config.geometry
    if words is None and (entry.question is not None or entry.answer is not None):
        raise PromptError(
            f"{name} is in words, and the checkpoint has no tokenizer", fix="give input_ids and answer_ids"
        )
    try:
        raw: Sequence[int] = entry.input_ids if entry.question is None else prompter.encode(_prompt(entry), True)
        ids, begin = prompter.expand(raw, True)
        answer = _ids(words, entry.answer) if words and entry.answer else entry.answer_ids or []
        outside = [token for token in answer if not 0 <= token < g.vocab]
        if outside:
            raise PromptError(f"answer token {outside[0]}", expected=f"0 .. {g.vocab - 1}")
        if len(ids) + len(answer) > g.context:
            raise PromptError(f"{len(ids) + len(answer)} tokens with the image", expected=f"at most {g.context}")
    except PromptError as error:
        raise PromptError(f"{name}: {error.found}", expected=error.expected, fix=error.fix) from error
    return Request(name, folder / entry.image, ids, begin, tuple(answer))


def _prompt(entry: Entry) -> Prompt:
    """An entry's question, behind its history if it has one, as the prompter takes it."""
    assert entry.question is not None
    turns = tuple((question, answer) for question, answer in entry.history)
    return Conversation(entry.question, History(turns)).prompt


def _ids(words: Tokenizer, answer: str) -> list[int]:
    """The answer as token ids; PromptError for a character that a tokenizer without an unknown token has none for."""
    try:
        return list(words.encode(answer, add_special_tokens=False).ids)
    except Exception as error:  # the Rust library raises nothing more specific
        raise PromptError(f"the answer {answer!r:.60}: {error!s:.100}", expected="text of the tokenizer's") from error
