"""Reading files that somebody else made: ordinary ones, up to a size, and JSON that is nothing but JSON."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from plugins.errors import FlexError

SETTINGS_LIMIT = 16 << 20  # bytes of a settings file or an index; a 7B checkpoint's index has 0.1 MB
_MORE = 1 << 16  # bytes read at a time of what is behind the size that a file says it has
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_file(path: str | os.PathLike[str], error: type[FlexError], *, fix: str | None = None) -> BinaryIO:
    """The file at `path`, open for reading; its length is `os.fstat(file.fileno()).st_size`.

    `error` for what cannot be opened, and for what is no ordinary file: a pipe would wait for somebody to write, a
    device may have no end. Links are followed: the local Hugging Face cache is made of them. fix: of that error.
    """
    name = f"{os.fspath(path)!s:.200}"
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        dangling = Path(path).is_symlink()
        where = f" is a link to {Path(path).readlink()!s:.200}, which is not there" if dangling else " is missing"
        complete = "complete the download: the file it belongs to is not there" if dangling else None
        raise error(f"{name}{where}", expected="a file", fix=fix or complete) from None
    except (OSError, ValueError) as failure:  # ValueError: a zero character in the name
        why = failure.strerror if isinstance(failure, OSError) else failure
        if isinstance(failure, PermissionError):  # no copy, and no rebuilding, would help
            fix = "let this user read it (chmod, chown), or run this as the user who may"
        raise error(f"{name} cannot be read: {why}", expected="a readable file", fix=fix) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "no file")
        raise error(f"{name} is {kind}", expected="an ordinary file", fix=fix)
    return os.fdopen(descriptor, "rb")


def read_file(
    path: str | os.PathLike[str], error: type[FlexError], *, limit: int = SETTINGS_LIMIT, fix: str | None = None
) -> bytes:
    """The content of the file at `path`. `error` as for open_file, for more than `limit` bytes, none of which are read
    then, and for more than memory has room for."""
    with open_file(path, error, fix=fix) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise error(f"{path!s:.200} has {size} bytes", expected=f"at most {limit}", fix=fix)
        try:
            content = file.read(size)  # not of `limit`: room for all that is asked for is made before anything is read
            while len(content) <= limit and (more := file.read(_MORE)):  # written to meanwhile, or of no size: /proc
                content += more
        except MemoryError:
            raise error(f"{path!s:.200} has {size} bytes, more than memory has room for", fix=fix) from None
        except OSError as failure:  # its disk fails
            raise error(f"{path!s:.200} cannot be read: {failure.strerror}", fix=fix) from failure
    if len(content) > limit:
        raise error(f"{path!s:.200} has more than {limit} bytes", expected=f"at most {limit}", fix=fix)
    return content


def read_json(
    path: str | os.PathLike[str], error: type[FlexError], *, limit: int = SETTINGS_LIMIT, fix: str | None = None
) -> Any:
    """What the JSON file at `path` holds. `error` as for read_file, and for what is no JSON (parse_json)."""
    return parse_json(read_file(path, error, limit=limit, fix=fix), f"{path!s:.200}", error, fix=fix)


def parse_json(data: bytes, name: str, error: type[FlexError], *, fix: str | None = None) -> Any:
    """`data` as JSON and nothing else: Python's reader also takes NaN, Infinity, numbers that overflow, and a key that
    comes twice, of which it keeps the last. `error`, which calls the data `name`, for all of these."""
    try:
        return json.loads(
            data.decode("utf-8-sig"),
            parse_constant=_no_constant,
            parse_float=_finite,
            object_pairs_hook=_each_once,
        )
    except RecursionError:
        raise error(f"{name} is no JSON: nested too deep", expected="JSON", fix=fix) from None
    except ValueError as failure:  # also a number of more digits than Python reads
        raise error(f"{name} is no JSON: {failure!s:.200}", expected="JSON", fix=fix) from None


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.40} is too large a number")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r:.80} comes twice")
        found[name] = value
    return found
