"""Reading JSON settings files into typed objects, with errors that name the file and the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from engines.errors import ConfigError

Settings = TypeVar("Settings", bound=BaseModel)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in file `path`. Raises ConfigError when it is missing, not JSON, or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})", expected="a readable JSON file") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error})", fix="download or save the file again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds a JSON {type(value).__name__}", expected="a JSON object")
    return value


def parse(kind: type[Settings], raw: Any, path: Path) -> Settings:
    """Validate `raw`, read from `path`, as a `kind`. Raises one ConfigError that lists every bad key of it."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        found, expected = [], []
        for problem in error.errors(include_url=False):
            key = ".".join(map(str, problem["loc"])) or "the whole object"
            missing = problem["type"] == "missing"
            found.append(f"{key} is missing" if missing else f"{key} is {problem['input']!r}")
            expected.append(f"{key}: {problem['msg']}")
        raise ConfigError(f"{path}: {'; '.join(found)}", expected="; ".join(expected)) from None
