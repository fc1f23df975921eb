"""`POST /v1/chat/completions`: a question in, an answer out, whole or token by token as server-sent events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from engines.bundle.geometry import Geometry
from runtime.answer import Token
from runtime.serve.errors import ApiError, late
from runtime.serve.guard import Bodies
from runtime.serve.media import read_image
from runtime.serve.schema import Asked, ImageUrl, read
from runtime.serve.settings import Settings
from runtime.serve.worker import Event, Failed, Finished, Job, Started, Worker

_GONE = Failed(ApiError(499, "the client is gone", code="gone"))  # nobody is told
_SSE_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # a proxy passes each event on at once


@dataclass(frozen=True)
class Model:
    """What answers name: the bundle's name, what tells it from another of that name, and its shapes."""

    name: str
    fingerprint: str
    geometry: Geometry


class Completions:
    """The endpoint."""

    def __init__(self, model: Model, worker: Worker, settings: Settings, bodies: Bodies) -> None:
        self._model, self._worker, self._settings, self._bodies = model, worker, settings, bodies
        self._files = ThreadPoolExecutor(1, "flexattention-media")  # a disk may be slow

    async def __call__(self, request: Request) -> Response:
        """Answers, or raises ApiError. A stream begins with the first token: what goes wrong before has a status."""
        arrived = time.perf_counter()
        async with self._bodies.read(request) as body:
            asked = read(body, self._settings)
            del body
            if asked.model != self._model.name:
                raise ApiError(
                    404, f"the model {asked.model[:100]!r} is not here", code="model_not_found", param="model",
                    fix=f'"model": {json.dumps(self._model.name)}',
                )  # fmt: skip
            image = None
            if asked.image is not None:
                image = await self._read_image(asked.image)
                asked = replace(asked, image=None)  # a long text, which nobody needs any more
            exchange = Exchange(self._worker, self._settings.timeout, request.receive)
            events = exchange.events(asked, image, arrived)
            del image
            start = await anext(events)
            assert isinstance(start, Started)  # whatever else comes first is raised
            first = await anext(events)
        reply = _Reply(self._model, asked, start, self._worker.page_bytes)
        if asked.stream:
            return _EventStream(reply, first, events)
        async with aclosing(events):
            return JSONResponse(await reply.whole(first, events), headers={"Cache-Control": "no-store"})

    async def _read_image(self, image: ImageUrl) -> bytes:
        """Reading base64 holds the interpreter's lock: in another thread it would keep everybody waiting all the same,
        and each of many threads would keep memory of its own for it. Files may be slow."""
        where = image, self._settings.media, self._settings.body_bytes
        if image.is_data:
            return read_image(*where)
        return await asyncio.get_running_loop().run_in_executor(self._files, read_image, *where)


class Exchange:
    """One question on its way through the worker, seen from the event loop: ended by its answer, by its timeout, or by
    the client's leaving."""

    def __init__(self, worker: Worker, timeout: float, receive: Receive) -> None:
        self._worker, self._timeout, self._receive = worker, timeout, receive
        self._queue = asyncio.Queue[Event]()  # an answer is small: the engine never waits for who reads it

    async def events(self, asked: Asked, image: bytes | None, arrived: float) -> AsyncGenerator[Event, None]:
        """Started, tokens, Finished. Raises ApiError for what goes wrong. Whoever stops iterating ends the question."""
        loop = asyncio.get_running_loop()

        def tell(event: Event) -> None:
            with suppress(RuntimeError):  # the loop was closed: nobody is left to tell
                loop.call_soon_threadsafe(self._queue.put_nowait, event)

        job = Job(asked.messages, image, asked.max_tokens, asked.options, tell, arrived)
        del image
        self._worker.submit(job)
        left = max(0.0, self._timeout - (time.perf_counter() - arrived))
        error = late(self._timeout, "ask for fewer tokens (max_tokens), or when fewer others ask")
        timer = loop.call_later(left, self._queue.put_nowait, Failed(error))
        watcher = loop.create_task(self._watch())
        try:
            while True:
                event = await self._queue.get()
                if isinstance(event, Failed):
                    raise event.error
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            timer.cancel()
            watcher.cancel()
            self._worker.cancel(job)

    async def _watch(self) -> None:
        """Tell when the client has left."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._queue.put_nowait(_GONE)


@dataclass
class _Reply:
    """One answer in OpenAI's words."""

    model: Model
    asked: Asked
    start: Started
    page_bytes: int
    begun: bool = False  # some text of the answer was given
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self, first: Event, events: AsyncGenerator[Event, None]) -> dict[str, Any]:
        """The answer in one piece."""
        tokens = [first] if isinstance(first, Token) else []
        finished = first if isinstance(first, Finished) else None
        async for event in events:
            if isinstance(event, Token):
                tokens.append(event)
            elif isinstance(event, Finished):
                finished = event
        assert finished is not None  # or an error was raised
        message = {"role": "assistant", "content": (finished.answer.text or "").lstrip(), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finished.answer.finish_reason}
        content = {**self._head("chat.completion"), "choices": [choice], "usage": _usage(finished)}
        if self.asked.flex:
            told: dict[str, Any] = {}
            if self.asked.selection:
                told = {**self._map(), "tokens": self._listed(tokens)}
            content["flex"] = {**told, "stats": self._stats(finished)}
        return content

    def _listed(self, tokens: list[Token]) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = []
        for each in tokens:
            text = self._shown(each.text)
            if each.id is None:  # what was held back until the last had come
                listed[-1]["text"] += text
            else:
                listed.append({"token": each.id, "text": text, "cells": _cells(each)})
        return listed

    def opening(self) -> bytes:
        """The first chunk."""
        flex = self._map() if self.asked.selection else None
        return self._chunk({"role": "assistant", "content": "", "refusal": None}, flex=flex)

    def token(self, token: Token) -> bytes:
        """The chunk of a token; nothing for one without text, unless the selection was asked for."""
        text = self._shown(token.text)
        if self.asked.selection and token.id is not None:
            return self._chunk({"content": text}, flex={"token": token.id, "cells": _cells(token)})
        return self._chunk({"content": text}) if text else b""

    def _shown(self, text: str) -> str:
        """A piece of the answer; the space before the whole is left out, as the official code leaves it out of what it
        says and of what it remembers."""
        if not self.begun:
            text = text.lstrip()
            self.begun = bool(text)
        return text

    def end(self, finished: Finished) -> bytes:
        """The chunks behind the last token."""
        flex = {"stats": self._stats(finished)} if self.asked.flex else None
        last = self._chunk({}, finish_reason=finished.answer.finish_reason, flex=flex)
        if self.asked.include_usage:
            last += as_event({**self._head("chat.completion.chunk"), "choices": [], "usage": _usage(finished)})
        return last + b"data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": self.model.fingerprint,
        }

    def _chunk(
        self, delta: dict[str, Any], *, finish_reason: str | None = None, flex: dict[str, Any] | None = None
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        content = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self.asked.include_usage:
            content["usage"] = None
        if flex is not None:
            content["flex"] = flex
        return as_event(content)

    def _map(self) -> dict[str, Any]:
        """What the cells of the tokens mean."""
        size = self.start.size
        return {
            "grid": self.model.geometry.cells,
            "layers": list(self.model.geometry.reading_layers),
            "image": None if size is None else {"width": size[0], "height": size[1]},
        }

    def _stats(self, finished: Finished) -> dict[str, Any]:
        stats = finished.answer.stats
        return {
            "first_token_ms": round(1000 * finished.first_token, 3),
            "tokens_per_second": round(stats.tokens_per_second, 3),
            "pages_read": round(float(stats.pages_read.mean()), 3) if stats.pages_read.size else 0.0,
            "page_bytes": int(stats.pages_read.sum()) * self.page_bytes,
            "vision_ms": round(stats.vision_ms, 3),
            "prefill_ms": round(stats.prefill_ms, 3),
            "reused_tokens": stats.reused_tokens,
            "view_cached": self.start.cached,
        }


class _EventStream(Response):
    """Server-sent events, token by token; what is ready together is sent together."""

    media_type = "text/event-stream"

    def __init__(self, reply: _Reply, first: Event, events: AsyncGenerator[Event, None]) -> None:
        super().__init__(headers=_SSE_HEADERS)
        del self.headers["content-length"]  # nobody knows it yet
        self._reply, self._first, self._events = reply, first, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        async with aclosing(self._events):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await write(self._reply.opening() + self._written(self._first))
            try:
                async for event in self._events:
                    if data := self._written(event):
                        await write(data)
            except ApiError as error:
                if error is not _GONE.error:
                    await write(as_event(error.content()), more=False)
                return
            await write(b"", more=False)

    def _written(self, event: Event) -> bytes:
        if isinstance(event, Token):
            return self._reply.token(event)
        return self._reply.end(event) if isinstance(event, Finished) else b""


def as_event(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _usage(finished: Finished) -> dict[str, Any]:
    stats = finished.answer.stats
    answered = len(finished.answer.token_ids)
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": answered,
        "total_tokens": stats.prompt_tokens + answered,
        "prompt_tokens_details": {"cached_tokens": stats.reused_tokens},
    }


def _cells(token: Token) -> list[list[int]]:
    """For each layer that reads, the cells it read: those that the layer before it had selected."""
    return [np.flatnonzero(layer).tolist() for layer in token.cells[:-1]]
