"""What every request passes before anything looks at what it asks: who, from where, how large; and what every response
says to browsers."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import perf_counter

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.serve.errors import RETRY_AFTER, ApiError, told, unavailable
from runtime.serve.metrics import Metrics
from runtime.serve.settings import ANY_HOST, Settings

_log = logging.getLogger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]

# What the page needs, and nothing else: its own scripts, styles and requests; images also from files and examples.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
}
_HOST = re.compile(r"(\[[^][]*\]|[^:\[\]]+)(?::[0-9]*)?")
_COUNTED = ("/", "/v1/chat/completions", "/v1/models", "/health", "/health/ready", "/metrics")
_FOLDERS = ("/page/", "/flex/")  # counted as one each
_CLOSE = {"Connection": "close"}  # where the rest of a body is not waited for
_DISCARDED = 4  # times the limit of a body: so much of a longer one is read away, so that its client hears why


class Guard:
    """ASGI middleware: hosts, headers, content type; headers of the response; one line of the log and one count for
    each request, of its path and nothing else; an error of the API for whatever fails."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, ending: Callable[[], bool]) -> None:
        """`ending`: whether no more questions are taken."""
        self._app, self._settings, self._metrics, self._ending = app, settings, metrics, ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, path = perf_counter(), 0, _counted(scope)  # now: a mount below changes what the scope says

        async def guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, guarded)
        except ClientDisconnect:
            pass
        except asyncio.CancelledError:
            if not self._ending():
                raise
            if not status:  # a body that was still on its way when the server under us would wait no longer
                await unavailable().response()(scope, receive, guarded)
        except Exception as error:
            if not isinstance(error, ApiError):  # its message may hold what somebody asked
                where = "".join(traceback.format_tb(error.__traceback__))
                _log.error("a request failed: %s\n%s", type(error).__name__, where)
            if status:
                raise _CutOff from None  # it is too late to say so
            await told(error).response()(scope, receive, guarded)
        finally:
            self._metrics.requests.labels(path, str(status or 499)).inc()
            elapsed = 1000 * (perf_counter() - begun)
            _log.info("%s %s %d %.0f ms", scope["method"][:10], path, status or 499, elapsed)

    def _check(self, scope: Scope) -> None:
        """ApiError for a request that is refused whatever it asks."""
        headers = Headers(scope=scope)
        length = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if length > self._settings.header_bytes:
            raise ApiError(
                431, f"headers of {length} bytes; expected at most {self._settings.header_bytes}", code="too_large"
            )
        allowed = self._settings.allowed_hosts
        if ANY_HOST not in allowed and _host(headers.get("host", "")) not in allowed:
            # A web page of somebody else, whose name was made to point here, asks under that name.
            raise ApiError(
                421, "this server is not known under this name", code="unknown_host",
                fix=f"address it as {allowed[0]}" if allowed else None,
            )  # fmt: skip
        if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            raise ApiError(403, "a page of another site asks", code="cross_site", fix="open this server's own page")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            # A browser asks before it lets a foreign page send this kind, and is refused.
            raise ApiError(
                415, "the body is not said to be JSON", code="unsupported_media_type",
                fix="send the header Content-Type: application/json",
            )  # fmt: skip


class _CutOff(Exception):
    """A response that was begun cannot be ended: the server closes the connection."""


def keyed(endpoint: Endpoint, settings: Settings) -> Endpoint:
    """The same endpoint for those who have the key, if there is one. Others get ApiError (401)."""
    if settings.api_key is None:
        return endpoint
    expected = settings.api_key.encode()

    async def checked(request: Request) -> Response:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), expected)
        if scheme.lower() != "bearer" or not right:
            raise ApiError(
                401, "no API key, or not the right one", code="invalid_api_key",
                fix="send the header Authorization: Bearer KEY", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        return await endpoint(request)

    return checked


class Bodies:
    """Reads bodies, each and all together up to so many bytes."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._held = settings, 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """A request's body; counted until the block ends. ApiError: 413 for a longer one, 503 when too many are being
        read, 408 for one that does not come."""
        held = 0

        def hold(count: int) -> None:
            nonlocal held
            held += count
            self._held += count

        try:
            yield await self._read(request, hold)
        finally:
            self._held -= held

    async def _read(self, request: Request, hold: Callable[[int], None]) -> bytes:
        try:  # one deadline for the whole: a byte now and then keeps no connection open
            return await asyncio.wait_for(self._collect(request, hold), self._settings.body_timeout)
        except (asyncio.TimeoutError, TimeoutError):  # one and the same from Python 3.11 on
            raise ApiError(
                408, f"the body was not there within {self._settings.body_timeout:g} s", code="timeout",
                headers=_CLOSE,
            ) from None  # fmt: skip

    async def _collect(self, request: Request, hold: Callable[[int], None]) -> bytes:
        most, chunks, length = self._settings.body_bytes, list[bytes](), 0
        said = request.headers.get("content-length", "")
        length_said = int(said) if said.isascii() and said.isdigit() and len(said) < 20 else 0
        if length_said <= most * _DISCARDED:
            async for chunk in request.stream():
                length += len(chunk)
                if length > most * _DISCARDED:
                    break
                if max(length_said, length) > most:
                    chunks.clear()
                    continue
                hold(len(chunk))
                if self._held > self._settings.all_bodies_bytes:
                    raise ApiError(
                        503, "too many large requests at a time", code="busy", fix="ask again later",
                        headers={**RETRY_AFTER, **_CLOSE},
                    )  # fmt: skip
                chunks.append(chunk)
        length = max(length_said, length)
        if length > most:
            raise ApiError(
                413, f"a body of {length} bytes; expected at most {most}", code="too_large",
                fix="shrink the image first: the model sees it at its own resolution anyway", headers=_CLOSE,
            )  # fmt: skip
        return b"".join(chunks)


def _host(header: str) -> str:
    """The name in a Host header, without the port; empty for what is no such header."""
    found = _HOST.fullmatch(header)
    return found[1].lower() if found else ""


def _counted(scope: Scope) -> str:
    """The path of a request, as far as it is one of ours: others could have any number of names."""
    root = scope.get("root_path", "")
    path: str = scope["path"].removeprefix(root) if root else scope["path"]
    if path in _COUNTED:
        return path
    return next((f"{folder}*" for folder in _FOLDERS if path.startswith(folder)), "other")
