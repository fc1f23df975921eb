"""Clients of a server: those that ask and read as they should, and those that do not."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

from export.default_model.evaluate import scenes_with_questions
from runtime import Engine

SEED = 2026  # of the scenes
PATIENCE = 120.0  # seconds until an answer must be there
TOKENS = 16  # of an answer, at most


@dataclass(frozen=True)
class Asked:
    """A question about an image, and what the engine answers. scene: number of the image. right: what it shows."""

    scene: int
    url: str
    question: str
    tokens: list[int]
    text: str
    right: str

    def body(self, model: str, image: bool = True, **options: Any) -> dict[str, Any]:
        """Of the request, streamed."""
        content: list[dict[str, Any]] = [{"type": "text", "text": self.question}]
        content += [{"type": "image_url", "image_url": {"url": self.url}}] if image else []
        messages = [{"role": "user", "content": content}]
        return {"model": model, "messages": messages, "stream": True, "max_tokens": TOKENS, **options}


def questions(engine: Engine, scenes: int) -> list[Asked]:
    """Those of so many scenes, in an order in which neighbours are about different images."""
    asked: list[Asked] = []
    for index, (scene, of_scene) in enumerate(scenes_with_questions(scenes, SEED)):
        file = io.BytesIO()
        scene.image.save(file, "png")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        with engine.image(file.getvalue()) as view:
            for question in (each for each in of_scene if not each.history):
                answer = view.ask(question.text, max_new_tokens=TOKENS)
                asked.append(Asked(index, url, question.text, answer.token_ids, str(answer.text), question.answer))
    return [asked[index] for index in np.random.default_rng(SEED).permutation(len(asked))]


@dataclass(frozen=True)
class Address:
    """Of a server, and the model that it serves."""

    url: str
    model: str

    @classmethod
    def of(cls, url: str) -> Address:
        """Asks the server at `url` for its model."""
        return cls(url, httpx.get(f"{url}/v1/models").json()["data"][0]["id"])

    @property
    def place(self) -> tuple[str, int]:
        """Host and port."""
        found = urlsplit(self.url)
        return str(found.hostname), int(found.port or 80)


@dataclass
class Reply:
    """What came of a request: its chunks, and the times until the first token and the end, in seconds."""

    status: int
    first: float = 0.0
    seconds: float = 0.0
    chunks: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False

    def wrong(self, asked: Asked) -> str | None:
        """What is not as it should be; None: the answer is the engine's, its tokens in their order."""
        if self.status != 200 or not self.done:
            return f"status {self.status}, done {self.done}"
        choices = [chunk["choices"][0] for chunk in self.chunks if chunk["choices"]]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        tokens = [chunk["flex"]["token"] for chunk in self.chunks if "token" in chunk.get("flex", {})]
        found = {
            "text": (text, asked.text),
            "tokens": ([token for token in tokens if token is not None and token >= 0], asked.tokens),
            "ids": (len({chunk["id"] for chunk in self.chunks}), 1),
            "role": (choices[0]["delta"].get("role"), "assistant"),
            "ends": ([choice["finish_reason"] for choice in choices[:-1]], [None] * (len(choices) - 1)),
            "end": (choices[-1]["finish_reason"], "stop"),
            "usage": (self.chunks[-1]["usage"]["completion_tokens"], len(asked.tokens)),
        }
        return next((f"{name}: {got!r}, expected {want!r}" for name, (got, want) in found.items() if got != want), None)


async def ask(client: httpx.AsyncClient, model: str, asked: Asked) -> Reply:
    """Ask and read to the end."""
    body = asked.body(model, stream_options={"include_usage": True}, flex={"selection": True})
    begin = perf_counter()
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        reply = Reply(response.status_code)
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                reply.done = True
            elif line.startswith("data: "):
                reply.chunks.append(json.loads(line[6:]))
                if not reply.first and "token" in reply.chunks[-1].get("flex", {}):
                    reply.first = perf_counter() - begin
    reply.seconds = perf_counter() - begin
    return reply


def connected(server: Address) -> httpx.AsyncClient:
    """A client of the server, with a connection for each request under way."""
    return httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, limits=httpx.Limits(max_connections=None))


async def load(server: Address, asked: Sequence[Asked], clients: int, count: int) -> tuple[list[Reply], float]:
    """So many questions by so many clients, each of which asks its next when it has an answer: (replies, seconds).
    AssertionError for an answer that is not the engine's."""
    left = iter([asked[index % len(asked)] for index in range(count)])
    replies: list[Reply] = []

    async def one(client: httpx.AsyncClient) -> None:
        for question in left:
            reply = await ask(client, server.model, question)
            assert (problem := reply.wrong(question)) is None, problem
            replies.append(reply)

    async with connected(server) as client:
        begin = perf_counter()
        await asyncio.gather(*(one(client) for _ in range(clients)))
        return replies, perf_counter() - begin


async def too_many(server: Address, asked: Sequence[Asked], count: int) -> list[Reply]:
    """So many questions at a time, those that find the queue full left at that."""
    async with connected(server) as client:
        return list(await asyncio.gather(*(ask(client, server.model, asked[n % len(asked)]) for n in range(count))))


async def disconnect(server: Address, asked: Sequence[Asked], count: int) -> None:
    """So many requests that go away in the middle: every other one at the first chunk, the others before it."""

    async def one(client: httpx.AsyncClient, index: int) -> None:
        body = asked[index % len(asked)].body(server.model)
        request = client.build_request("POST", "/v1/chat/completions", json=body)
        if index % 2:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(client.send(request, stream=True), 0.05)
            return
        response = await client.send(request, stream=True)
        async for _ in response.aiter_lines():
            break
        await response.aclose()

    async with connected(server) as client:
        for begin in range(0, count, 10):
            await asyncio.gather(*(one(client, index) for index in range(begin, min(begin + 10, count))))


def raw(server: Address, body: dict[str, Any]) -> bytes:
    """The request as it goes over the wire."""
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {server.place[0]}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


@contextmanager
def half_requests(server: Address, asked: Sequence[Asked], count: int) -> Iterator[None]:
    """So many connections that sent a half of a request, by turns of the head and of the body, for a block."""
    held = []
    for index in range(count):
        data = raw(server, asked[index % len(asked)].body(server.model))
        held.append(socket.create_connection(server.place))
        held[-1].sendall(data[:40] if index % 2 else data[: len(data) // 2])
    try:
        yield
    finally:
        for each in held:
            each.close()


async def beside_slow_readers(
    server: Address, asked: Sequence[Asked], readers: int, work: Callable[[], Awaitable[Any]]
) -> tuple[Any, int]:
    """What `work` returns while so many clients read their answers a byte a second; bytes that these read."""
    read = 0

    async def one(index: int) -> None:
        nonlocal read
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the smallest that there is
        client.connect(server.place)
        client.setblocking(False)
        loop, question = asyncio.get_running_loop(), asked[index % len(asked)]
        with client:
            await loop.sock_sendall(client, raw(server, question.body(server.model, flex={"selection": True})))
            while True:
                read += len(await loop.sock_recv(client, 1))
                await asyncio.sleep(1)

    slow = [asyncio.create_task(one(index)) for index in range(readers)]
    try:
        return await work(), read
    finally:
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
