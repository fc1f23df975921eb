"""A tokenizer.json of somebody else's, looked at before the tokenizers library is: what it would be told to do with
numbers and texts of any size, it would do, and end the process where the memory ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engines.checks import is_integer, shown
from engines.errors import TokenizerError
from plugins.files import parse_json, read_file

LIMIT = 128 << 20  # bytes of the file; the largest in use, of 256,000 tokens, has 34 MB
IDS = 1 << 22  # the library makes a row for every id up to the largest when it writes the file
GROWTH = 64  # characters that replacements, one after another, may make of one
ADDED = 4096  # characters that are put before a text; in use is one


def read_tokenizer_file(path: Path, *, fix: str) -> tuple[bytes, dict[str, Any]]:
    """The content of the tokenizer.json at `path`, and as JSON. TokenizerError, with this `fix`, for what is none, for
    ids and texts beyond the limits above, and for a tokenizer that leaves merges out at random (dropout)."""
    data = read_file(path, TokenizerError, limit=LIMIT, fix=fix)
    settings = parse_json(data, f"{path}", TokenizerError, fix=fix)
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
        raise TokenizerError(f"{path} is no tokenizer.json", expected="an object with a model", fix=fix)
    for problem, expected in _problems(settings):
        raise TokenizerError(f"{path}: {problem}", expected=expected, fix=fix)
    return data, settings


def _problems(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is found, and what was expected."""
    model = settings["model"]
    vocab, added = model.get("vocab"), settings.get("added_tokens")
    ids = [*vocab.values()] if isinstance(vocab, dict) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    odd = next((each for each in ids if not is_integer(each) or not 0 <= each < IDS), None)
    if odd is not None:
        yield f"the token id {shown(odd)}", f"0 .. {IDS - 1}"
    if model.get("dropout"):
        yield f"dropout {shown(model['dropout'])}: the same text would have other tokens every time", "no dropout"
    growth, put_before = 1, 0
    for node in _nodes([settings.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]):
        if isinstance(content := node.get("content"), str) and node.get("type") == "Replace":
            growth *= max(1, len(content))
        if isinstance(prefix := node.get("prepend"), str):
            put_before += len(prefix)
    if growth > GROWTH:
        yield f"replacements that make {shown(growth)} characters of one", f"at most {GROWTH}"
    if put_before > ADDED:
        yield f"{put_before} characters put before every text", f"at most {ADDED}"


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every object inside a JSON value."""
    if isinstance(value, dict):
        yield value
    for inside in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _nodes(inside)
