"""What a server allows and how long it waits: every knob, its default and its range."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from engines.checks import require_integer, shown
from engines.errors import OptionError
from plugins.files import read_file
from runtime.image import MAX_PIXELS

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")  # as a Host header has them
ANY_HOST = "*"
KEY_VARIABLE = "FLEX_API_KEY"  # of the environment
SHORTEST_KEY = 16  # characters; a shorter one can be guessed
_KEY = re.compile(r"[\x21-\x7e]+")  # what a header can hold, without spaces


def _count(default: int, help: str, low: int = 1, high: int = 2**48) -> int:
    """A field that holds a whole number, from `low` to `high`; `help`: its line of --help."""
    made: int = field(default=default, metadata={"help": help, "low": low, "high": high})
    return made


def _seconds(default: float, help: str) -> float:
    """A field that holds a time."""
    made: float = field(default=default, metadata={"help": help})
    return made


@dataclass(frozen=True)
class Settings:
    """Of one server. Times in seconds; raises OptionError for a value out of range.

    api_key: who asks must send it as "Authorization: Bearer KEY"; None = nobody must. no_auth: no key, and requests
    addressed to any host: whoever can connect may ask. hosts: names that requests may be addressed to, their Host
    header without the port, ("*",) = any; None = this machine's own names, which a foreign web page that has its own
    name point here cannot use; any name with a key or with no_auth. media: folder of the images that "file:" and
    "media:" URLs may name; None = there is none.
    """

    api_key: str | None = field(default=None, repr=False)
    no_auth: bool = False
    hosts: tuple[str, ...] | None = None
    media: Path | None = None
    max_tokens: int = _count(256, "answer tokens of a request that names no number, where the context has room")
    messages: int = _count(128, "messages of a conversation at most")
    characters: int = _count(100_000, "characters of all messages at most; the model's context is a limit of its own")
    pixels: int = _count(MAX_PIXELS, "pixels of an image at most", high=MAX_PIXELS)
    body_bytes: int = _count(24 << 20, "bytes of a request's body, or of an image of --media, at most", low=1024)
    all_bodies_bytes: int = _count(256 << 20, "bytes of the bodies of all requests at a time at most", low=1024)
    header_bytes: int = _count(16 << 10, "bytes of a request's headers at most", low=1024)
    view_bytes: int = _count(4 << 30, "bytes of encoded images kept for their next question", low=0)
    queue: int = _count(32, "requests that wait at most, beside the one that runs; 429 past them")
    connections: int = _count(256, "open connections at most; 503 past them")
    timeout: float = _seconds(300.0, "seconds until a request's answer must be ready, waiting included; then 503")
    body_timeout: float = _seconds(30.0, "seconds until the body of a request must be there; then 408")
    head_timeout: float = _seconds(
        10.0, "seconds that a connection waits for the headers of a request, or the next one"
    )
    read_timeout: float = _seconds(30.0, "seconds until a client must have read what was sent; then it is cut off")
    grace: float = _seconds(20.0, "seconds that running requests get to end in when the server is asked to end")

    def __post_init__(self) -> None:
        key = self.api_key
        if key is not None and not (isinstance(key, str) and len(key) >= SHORTEST_KEY and _KEY.fullmatch(key)):
            raise OptionError(
                "the API key is too short, or holds what no header can",
                expected=f"{SHORTEST_KEY} or more letters, digits and signs of ASCII, without spaces",
                fix="make one: openssl rand -hex 24",
            )
        if not isinstance(self.no_auth, bool):
            raise OptionError(f"no_auth={shown(self.no_auth)}", expected="True or False")
        if key is not None and self.no_auth:
            raise OptionError("an API key and no_auth", expected="one of them", fix="leave one out")
        if self.hosts is not None and (
            isinstance(self.hosts, str) or not all(isinstance(host, str) and host for host in self.hosts)
        ):
            raise OptionError(f"hosts={shown(self.hosts)}", expected="several host names, such as ('example.org',)")
        for each in fields(self):
            if "low" in each.metadata:
                value, low, high = getattr(self, each.name), each.metadata["low"], each.metadata["high"]
                require_integer(value, f"{each.name}={shown(value)}", low, high)
            elif each.metadata:
                _require_seconds(each.name, getattr(self, each.name))
        if self.media is not None:
            try:
                folder = Path(self.media).resolve(strict=True)
            except (OSError, TypeError, ValueError):
                folder = None
            if folder is None or not folder.is_dir():
                raise OptionError(f"media={shown(str(self.media))} is no folder", expected="an existing folder")
            object.__setattr__(self, "media", folder)

    @property
    def allowed_hosts(self) -> tuple[str, ...]:
        """Host names that requests may be addressed to, in small letters; "*" among them: any."""
        if self.hosts is not None:
            return tuple(host.lower() for host in self.hosts)
        return LOOPBACK if self.api_key is None and not self.no_auth else (ANY_HOST,)


def read_api_key(path: Path | None) -> str | None:
    """The API key in the file at `path`, or in the environment; None where neither has one. Never from the command
    line, which every user of the machine can read. OptionError, also when both have one."""
    found = os.environ.get(KEY_VARIABLE)
    if path is None:
        return found or None
    if found:
        raise OptionError(f"--api-key-file and {KEY_VARIABLE}", expected="one of them", fix=f"unset {KEY_VARIABLE}")
    key = read_file(path, OptionError, limit=4096, fix=f"openssl rand -hex 24 > {path}").decode("ascii", "replace")
    return key.strip()


def _require_seconds(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not 0 < value <= 86_400:
        raise OptionError(f"{name}={shown(value)}", expected="seconds: a number above 0, at most 86400")
