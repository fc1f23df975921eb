"""The front: takes requests from Ray Serve's HTTP proxy, finds out which image they are about, and passes them to the
replica that has it.

Ray's proxy chooses a replica before it has read a body, and knows no more than the headers. So somebody must read the
body first; clients that would send a header of their own do not exist. What the front does beside that only somebody
before the replicas can do: ask a second replica when the first died before it had said anything.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from time import perf_counter

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import Message, Receive, Scope, Send

from engines.errors import FlexError
from runtime.serve.application import COMPLETIONS
from runtime.serve.completions import as_event
from runtime.serve.errors import RETRY_AFTER, ApiError, late, on_api_error, on_http_error, queue_full
from runtime.serve.guard import Bodies, Guard, keyed
from runtime.serve.media import read_image
from runtime.serve.metrics import Metrics
from runtime.serve.schema import read
from runtime.serve.settings import Settings

_log = logging.getLogger(__name__)

TRIES = 2  # replicas that are asked one request: one that has killed two is not given a third
_SCOPE = (  # of ASGI's, what is plain data and says something about the request
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers",
    "client", "server",
)  # fmt: skip


class Front:
    """What @serve.ingress wraps."""

    def __init__(self, settings: Settings, replicas: DeploymentHandle) -> None:
        """replicas: a handle of the deployment of `Replica`."""
        self._settings, self._replicas = settings, replicas

    def __serve_build_asgi_app__(self) -> Starlette:
        """Ray Serve asks for it once, in each front."""
        return front(self._settings, self._replicas)


def front(settings: Settings, replicas: DeploymentHandle) -> Starlette:
    """The ASGI app of a front: the paths, checks and errors are those of `runtime.serve.app`, the answers its own."""
    relay = Relay(settings, replicas)
    return Starlette(
        routes=[
            Route(COMPLETIONS, keyed(relay.completion, settings), methods=["POST"]),
            Route("/metrics", keyed(_no_metrics, settings)),
            Mount("/", relay.other),
        ],
        middleware=[Middleware(Guard, settings=settings, metrics=Metrics(), ending=lambda: False)],
        exception_handlers={ApiError: on_api_error, FlexError: on_api_error, HTTPException: on_http_error},
    )


async def _no_metrics(request: Request) -> Response:
    raise ApiError(
        404, "no replica can speak for all of them", code="not_found",
        fix="let Prometheus collect Ray's metrics, in which flex_* of each replica are: docs/scaling.md",
    )  # fmt: skip


class Relay:
    """Passes requests on."""

    def __init__(self, settings: Settings, replicas: DeploymentHandle) -> None:
        self._settings, self._bodies = settings, Bodies(settings)
        self._ask = replicas.options(stream=True, method_name="ask")

    async def completion(self, request: Request) -> Response:
        """A question, to the replica of its image. ApiError for what no replica need be asked."""
        async with AsyncExitStack() as held:
            body = await held.enter_async_context(self._bodies.read(request))
            image = await run_in_threadpool(image_key, body, self._settings)
            return _Passed(self, image, body, held.pop_all())

    async def other(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Everything else, none of which has a body, to any replica."""
        await _Passed(self, "", b"", AsyncExitStack())(scope, receive, send)

    async def messages(self, image: str, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
        """What a replica's app sends, from the first piece of its body on: until then, a second replica is asked when
        the first dies. ApiError."""
        plain = {name: scope[name] for name in _SCOPE if name in scope}
        deadline = perf_counter() + self._settings.timeout
        for tries in range(1, TRIES + 1):
            answer, start = self._ask.remote(image, plain, body), None
            begun = False
            try:
                while True:
                    left = None if begun else max(0.0, deadline - perf_counter())  # then it is the replica's to say
                    message = await asyncio.wait_for(anext(answer), left)
                    if message["type"] == "http.response.start":
                        start = message
                        continue
                    begun = True
                    if start is not None:
                        yield start
                        start = None
                    yield message
            except StopAsyncIteration:
                return
            except (asyncio.TimeoutError, TimeoutError):  # one and the same from Python 3.11 on
                raise late(self._settings.timeout, "ask again when fewer others ask") from None
            except BackPressureError:
                raise queue_full("too many requests are waiting already") from None
            except (RayActorError, DeploymentUnavailableError) as error:
                _log.warning("a replica was lost, try %d: %s", tries, type(error).__name__)
                if begun or tries == TRIES:
                    raise ApiError(
                        503, "the replica that was answering is gone", code="replica_lost", fix="ask again",
                        headers=RETRY_AFTER,
                    ) from None  # fmt: skip
            finally:
                answer.cancel()  # the client has left, or nothing is left to cancel


class _Passed(Response):
    """A replica's answer on its way to the client."""

    def __init__(self, relay: Relay, image: str, body: bytes, held: AsyncExitStack) -> None:
        """held: ended with the response, as long as which a second replica may need the body."""
        self._relay, self._image, self._body, self._held = relay, image, body, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_stream = False
        try:
            async with self._held, aclosing(self._relay.messages(self._image, scope, self._body)) as messages:
                async for message in messages:
                    is_stream = is_stream or _is_stream(message)
                    await send(message)
        except ApiError as error:
            if not is_stream:
                raise  # nothing was sent; or half a body, and the connection will be closed
            await send({"type": "http.response.body", "body": as_event(error.content()), "more_body": False})


def image_key(body: bytes, settings: Settings) -> str:
    """The SHA-256, in hex, of the image that a chat completion is about: that of its bytes, however they are sent;
    empty without one. ApiError for a request that no replica would answer."""
    asked = read(body, settings)
    if asked.image is None:
        return ""
    return hashlib.sha256(read_image(asked.image, settings.media, settings.body_bytes)).hexdigest()


def _is_stream(message: Message) -> bool:
    """Whether a message begins server-sent events, in which an error can be told."""
    headers = message.get("headers", ())
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers)
