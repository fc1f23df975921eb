"""Reading JSON settings files into typed objects, with errors that name the file and the key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from engines.bundle.consistency import SIZES
from engines.checks import shown
from engines.errors import ConfigError, FlexError
from plugins.files import read_json

Settings = TypeVar("Settings", bound=BaseModel)

_LISTED = 5  # bad keys spelt out in one error

# What a manifest may say, no more: a size that it refuses is refused before anything is made of it.
Layers = Annotated[int, Field(gt=0, le=SIZES["layers"][1])]
Width = Annotated[int, Field(gt=0, le=SIZES["hidden"][1])]
Inner = Annotated[int, Field(gt=0, le=SIZES["intermediate"][1])]
Heads = Annotated[int, Field(gt=0, le=SIZES["heads"][1])]
HeadWidth = Annotated[int, Field(gt=0, le=SIZES["head_dim"][1])]
Vocabulary = Annotated[int, Field(gt=0, le=SIZES["vocab"][1])]
Context = Annotated[int, Field(gt=0, le=SIZES["context"][1])]
Side = Annotated[int, Field(gt=0, le=SIZES["lowres"][1])]
Epsilon = Annotated[float, Field(gt=0, lt=1)]  # of a norm


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
