"""An ASGI app asked directly, without a network: what a client sends when, and when it leaves, is the test's to say."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

COMPLETIONS = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
HOST = {"host": "localhost:8000"}


@dataclass
class Reply:
    """What an app answered: pieces as they were sent."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[bytes] = field(default_factory=list)
    complete: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]

    @property
    def chunks(self) -> list[Any]:
        """The data of server-sent events; "[DONE]" as text."""
        events = [event.removeprefix("data: ") for event in self.body.decode().split("\n\n") if event]
        return [event if event == "[DONE]" else json.loads(event) for event in events]

    @property
    def text(self) -> str:
        """The text of a stream."""
        choices = [choice for chunk in self.chunks if chunk != "[DONE]" for choice in chunk.get("choices", ())]
        return "".join(choice["delta"].get("content", "") for choice in choices)


async def send_request(
    app: Callable[..., Any],
    method: str,
    path: str,
    body: bytes | Sequence[bytes] = b"",
    headers: dict[str, str] | None = None,
    *,
    root_path: str = "",
    leave: asyncio.Event | None = None,
    sent: Callable[[Reply], Any] | None = None,
    endless: bool = False,
) -> Reply:
    """One request. `leave`: set, the client is gone. `sent`: called, and awaited, after each piece that arrives.
    `endless`: after `body` nothing comes, nor its end."""
    reply, leave = Reply(), leave or asyncio.Event()
    pieces = [body] if isinstance(body, bytes) else list(body)
    path, _, query = path.partition("?")

    async def receive() -> dict[str, Any]:
        if pieces:
            piece = pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(pieces) or endless}
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            return
        reply.pieces.append(message.get("body", b""))
        reply.complete = not message.get("more_body", False)
        if sent is not None:
            await sent(reply)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": root_path + path, "raw_path": (root_path + path).encode(), "query_string": query.encode(),
        "root_path": root_path, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
        "headers": [(name.lower().encode(), value.encode()) for name, value in {**HOST, **(headers or {})}.items()],
    }  # fmt: skip
    await app(scope, receive, send)
    return reply


def get(app: Callable[..., Any], path: str, **headers: str) -> Reply:
    """GET, in a loop of its own."""
    return asyncio.run(send_request(app, "GET", path, headers=headers))


def post(app: Callable[..., Any], asked: object, **more: Any) -> Reply:
    """A chat completion, in a loop of its own."""
    return asyncio.run(post_request(app, asked, **more))


async def post_request(app: Callable[..., Any], asked: object, **more: Any) -> Reply:
    """A chat completion; `asked`: JSON, or the body itself."""
    body = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
    headers = {**JSON, **more.pop("headers", {})}
    return await send_request(app, "POST", COMPLETIONS, body, headers, **more)


def png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def data_url(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def user(text: str, image: str | None = None) -> dict[str, Any]:
    """A user's message; `image`: a URL."""
    if image is None:
        return {"role": "user", "content": text}
    return {
        "role": "user",
        "content": [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": image}}],
    }
