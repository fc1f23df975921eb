"""A replica: one engine behind the app that one machine alone would serve, asked by the front instead of a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray.serve.metrics import Gauge
from starlette.types import Message

from runtime.engine import Engine
from runtime.serve.application import COMPLETIONS, app
from runtime.serve.ray.bundles import local_bundle
from runtime.serve.settings import Settings

_TOKENS = "flex_answer_tokens_total"
_LOOK = 0.05  # seconds between two looks at a health check that runs


class Replica:
    """What Ray Serve starts as often as it is told: the engine, its queue, and the images it has encoded."""

    def __init__(
        self, bundle: str, digest: str | None, cache: Path | None, settings: Settings, opening: dict[str, Any]
    ) -> None:
        """bundle, digest, cache: see local_bundle. opening: of `Engine`, beside the bundle."""
        place = local_bundle(bundle, digest, cache)
        self._engine = Engine(place, expect=digest, **opening)
        self._settings = settings
        self._app = app(self._engine, settings)
        self._metrics = self._app.state.service.metrics
        self._gauges: dict[str, Gauge] = {}
        self._tokens = 0.0

    def __del__(self) -> None:
        """Ray Serve calls it when the last request has ended."""
        if hasattr(self, "_app"):
            service = self._app.state.service
            service.worker.drain(0.0)
            service.scenes.close()
            self._engine.close()

    async def ask(self, image: str, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """Let the app answer one HTTP request; yields what it sends. image: for the router alone. Whoever stops
        iterating is, for the app, a client that has left."""
        sent = asyncio.Queue[Message | None]()
        gone = asyncio.Event()
        body_left = [body]

        async def receive() -> Message:
            if body_left:
                return {"type": "http.request", "body": body_left.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        answering = asyncio.ensure_future(self._app(scope, receive, sent.put))
        del body
        answering.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while (message := await sent.get()) is not None:
                yield message
            await answering  # raises what it raised
        finally:
            gone.set()
            with suppress(Exception):
                await answering

    async def check_health(self) -> None:
        """Returns when the engine has decoded a token since the last check: for whoever asked, or for this check, which
        asks it for one when nobody did. Raises RuntimeError when it says that it will not. How long that may take is
        Ray Serve's health_check_timeout_s."""
        self._publish()
        asking = None
        try:
            while (now := self._decoded()) == self._tokens:
                if asking is None:
                    asking = asyncio.ensure_future(self._decode_one())
                if asking.done() and (refused := asking.result()):
                    raise RuntimeError(refused)
                await asyncio.sleep(_LOOK)
            self._tokens = now
        finally:
            if asking is not None:
                asking.cancel()

    def _decoded(self) -> float:
        """Answer tokens so far."""
        return float(self._metrics.registry.get_sample_value(_TOKENS))

    async def _decode_one(self) -> str | None:
        """Ask for one token, as a client would. None, also when others wait in such numbers that it is not let in: they
        will see to it that there are tokens; or why there is none."""
        asked = {"model": self._engine.manifest.name, "messages": [{"role": "user", "content": "?"}], "max_tokens": 1}
        headers = {"host": self._settings.allowed_hosts[0], "content-type": "application/json"}
        if self._settings.api_key is not None:
            headers["authorization"] = f"Bearer {self._settings.api_key}"
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": COMPLETIONS, "raw_path": COMPLETIONS.encode(), "query_string": b"", "root_path": "",
            "client": None, "server": None,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }  # fmt: skip
        status, text = 0, b""
        async for message in self.ask("", scope, json.dumps(asked).encode()):
            status = message.get("status", status)
            text += message.get("body", b"")
        return None if status in (200, 429) else f"status {status}: {text[:500].decode(errors='replace')}"

    def _publish(self) -> None:
        """The metrics of this replica as gauges of Ray's, which adds whose they are, and which Prometheus collects from
        every machine: one address cannot speak for all replicas."""
        for family in self._metrics.registry.collect():
            for name, labels, value, *_ in family.samples:
                if name.endswith("_created"):
                    continue
                if name not in self._gauges:
                    self._gauges[name] = Gauge(name, description=family.documentation, tag_keys=tuple(labels))
                self._gauges[name].set(value, tags=labels)
