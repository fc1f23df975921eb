"""What goes wrong, as clients of OpenAI's API read it: a status and {"error": {message, type, param, code, fix}}."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from engines.errors import ContextError, FlexError, ImageError, OptionError, PromptError

_log = logging.getLogger(__name__)

RETRY_AFTER = {"Retry-After": "1"}  # seconds; an answer of a small model takes less, and nobody knows of a large one
_TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}
# What the engine says of a request. Everything else of its errors is of the server, names its files, and is logged.
_OF_ENGINE: dict[type[FlexError], tuple[int, str]] = {
    ContextError: (400, "context_length_exceeded"),
    PromptError: (400, "invalid_prompt"),
    OptionError: (400, "invalid_option"),
    ImageError: (422, "invalid_image"),
}


# What a fix of the engine says to who calls it in Python, in the words of a request.
_WORDS = (
    (re.compile(r"chat\.keep\((\d+)\), which forgets all but the last \d+ turns"), r"send only the last \1 turns"),
    (re.compile("max_new_tokens"), "max_tokens"),
)


class ApiError(Exception):
    """An error that a client is told. status: of HTTP. code: a word for programs. param: where in the request it is,
    such as "messages[0].content". fix: what helps. headers: of the response."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        fix: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.fix = status, message, code, param, fix
        self.headers = dict(headers or {})

    def content(self) -> dict[str, Any]:
        """What the body holds."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code, "fix": self.fix}
        # A request may hold half a character, which no response can.
        return {
            "error": {key: text and text.encode("utf-8", "backslashreplace").decode() for key, text in error.items()}
        }

    def response(self) -> JSONResponse:
        """The whole."""
        return JSONResponse(self.content(), self.status, self.headers)


def told(error: Exception) -> ApiError:
    """What a client is told of an error. Of one that nobody raised on purpose, only that there was one: its message may
    hold anything. Of one of the server's bundle or device the same: it names paths of this machine."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, FlexError):
        known = next((found for kind, found in _OF_ENGINE.items() if isinstance(error, kind)), None)
        if known is None:
            return no_engine("the server cannot answer now", "its log says why")
        status, code = known
        message = error.found if error.expected is None else f"{error.found}\n  expected: {error.expected}"
        return ApiError(status, _in_words(message), code=code, fix=error.fix and _in_words(error.fix))
    if isinstance(error, MemoryError):
        return ApiError(503, "there is no memory left for this request", code="out_of_memory", headers=RETRY_AFTER)
    return ApiError(500, "the server failed", code="internal_error", fix="its log says where")


def _in_words(text: str) -> str:
    for pattern, words in _WORDS:
        text = pattern.sub(words, text)
    return text


def no_engine(message: str, fix: str) -> ApiError:
    """The engine cannot answer."""
    return ApiError(503, message, code="engine_unavailable", fix=fix)


def unavailable() -> ApiError:
    """The server is about to end."""
    return ApiError(
        503, "this server is ending", code="ending", fix="ask again later, or another one", headers=RETRY_AFTER
    )


def queue_full(message: str) -> ApiError:
    """More is asked than may wait."""
    return ApiError(429, message, code="queue_full", fix="ask again later", headers=RETRY_AFTER)


def late(timeout: float, fix: str) -> ApiError:
    """There was no answer in time, which is so many seconds."""
    message = f"no answer within {timeout:g} s, waiting included"
    return ApiError(503, message, code="timeout", fix=fix, headers=RETRY_AFTER)


async def on_api_error(request: Request, error: Exception) -> JSONResponse:
    """Handler of `ApiError` and `FlexError`."""
    answer = told(error)
    if isinstance(error, FlexError) and answer.status >= 500:  # of the server: who runs it hears what
        _log.error("a request failed: %s", error)
    return answer.response()


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Handler of what Starlette itself raises: no such path, no such method."""
    status = getattr(error, "status_code", 500)
    headers = getattr(error, "headers", None)
    if status == 405:
        allowed = (headers or {}).get("Allow", "another method")
        return ApiError(405, "not with this method", code="method_not_allowed", fix=allowed, headers=headers).response()
    if status == 404:
        return ApiError(404, "there is nothing at this path", code="not_found", fix="see docs/server.md").response()
    return ApiError(status, "this cannot be answered", code="http_error", headers=headers).response()
