"""Reading JSON settings files into typed objects, with errors that name the file and the key."""

from __future__ import annotations

import os
import reprlib
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from engines.errors import ConfigError, FlexError
from engines.files import read_json

Settings = TypeVar("Settings", bound=BaseModel)

# Ceilings: far above every Llama or CLIP there is, and low enough that nothing made of these numbers alone (names of
# tensors, rotary tables, the order of pages) takes noticeable memory before the weights are compared with them.
LAYERS = 1_000  # Llama 3.1 405B has 126
WIDTH = 65_536  # of hidden states, and heads; the same model has 16,384
INNER = 1 << 20  # of an MLP; the same model has 53,248
VOCABULARY = 4_000_000
CONTEXT = 1 << 20  # tokens; two rotary tables of 256 MB at heads of 128
PIXELS = 16_384  # per side of an image
_LISTED = 5  # bad keys spelt out in one error

Layers = Annotated[int, Field(gt=0, le=LAYERS)]
Width = Annotated[int, Field(gt=0, le=WIDTH)]
Inner = Annotated[int, Field(gt=0, le=INNER)]
Side = Annotated[int, Field(gt=0, le=PIXELS)]
Epsilon = Annotated[float, Field(gt=0, lt=1)]  # of a norm


def shown(value: Any) -> str:
    """A value of somebody else's file for a message: its repr, cut to a length that can be read."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    return short.repr(value)


def present(path: Path) -> bool:
    """Whether there is anything at `path`: also a link to nothing, which reading then names."""
    return os.path.lexists(path)


def read_object(path: Path, error: type[FlexError] = ConfigError) -> dict[str, Any]:
    """The JSON object in file `path`. `error` when it is missing or no ordinary file, not JSON, or not an object."""
    value = read_json(path, error, fix="download or save the file again")
    if not isinstance(value, dict):
        raise error(f"{path}: holds a JSON {type(value).__name__}", expected="a JSON object")
    return value


def parse(kind: type[Settings], raw: Any, path: Path | str) -> Settings:
    """Validate `raw`, read from `path`, as a `kind`. Raises one ConfigError that lists the first bad keys of it."""
    try:
        return kind.model_validate(raw)
    except (ValidationError, OverflowError) as error:
        if isinstance(error, OverflowError):  # an integer of hundreds of digits where a fraction is meant
            raise ConfigError(f"{path}: a number is too large ({error})", expected="numbers a model can have") from None
        problems = error.errors(include_url=False)
        found, expected = [], []
        for problem in problems[:_LISTED]:
            key = ".".join(map(str, problem["loc"])) or "the whole object"
            missing = problem["type"] == "missing"
            found.append(f"{key:.80} is missing" if missing else f"{key:.80} is {shown(problem['input'])}")
            expected.append(f"{key:.80}: {problem['msg']:.200}")
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ConfigError(f"{path}: {'; '.join(found)}{more}", expected="; ".join(expected)) from None
