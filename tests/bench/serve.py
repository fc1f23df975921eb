"""A server under load: `python -m tests.bench.serve [BUNDLE]`, the table of docs/reliability.md.

The server is the real command in a process of its own, its clients are on the loopback. Questions are about held-out
scenes of the default model; an answer is right if it is the one that `Engine` gives, token for token, in order.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import httpx
import numpy as np

from export.build import BuildOptions, build
from export.default_model.evaluate import scenes_with_questions
from runtime import Engine
from runtime.view import ImageView
from tests.paths import ROOT

QUESTIONS = 9  # of a scene
SEED = 2026  # of the scenes
START = 120.0  # seconds until a server must be ready
PATIENCE = 120.0  # seconds until an answer must be there
TOKENS = 8  # of an answer, at most


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
            for question in of_scene[:QUESTIONS]:
                answer = view.ask(question.text, max_new_tokens=TOKENS)
                asked.append(Asked(index, url, question.text, answer.token_ids, str(answer.text), question.answer))
    return [asked[index] for index in np.random.default_rng(SEED).permutation(len(asked))]


@dataclass(frozen=True)
class Resources:
    """What a process holds: memory in bytes, threads, open files."""

    memory: int
    threads: int
    files: int


class Server:
    """`python -m runtime.serve BUNDLE` on a free port of the loopback, from `start` to `stop`."""

    def __init__(self, bundle: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        line = [sys.executable, "-m", "runtime.serve", str(bundle), "--port", str(self.port), *options]
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(line, cwd=ROOT, stdout=self.log, stderr=self.log)
        end = perf_counter() + START
        while not self._ready():
            if self.process.poll() is not None or perf_counter() > end:
                self.stop()
                raise RuntimeError(f"the server did not start: {self.said()}")
            sleep(0.1)
        self.model: str = httpx.get(f"{self.url}/v1/models").json()["data"][0]["id"]

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def said(self) -> str:
        """What it wrote."""
        self.log.seek(0)
        return self.log.read()

    def stop(self) -> int:
        """End it as a service manager does; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    def metrics(self) -> dict[str, float]:
        """By name, with its labels as /metrics writes them."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        values = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in values}

    def resources(self) -> Resources:
        """From /proc."""
        folder = Path(f"/proc/{self.process.pid}")
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        kilobytes, threads = int(status["VmRSS"].split()[0]), int(status["Threads"])
        return Resources(kilobytes << 10, threads, len(os.listdir(folder / "fd")))

    def settled(self, files: int) -> Resources:
        """Once what clients left is gone: when no more than so many files are open, or after some seconds."""
        for _ in range(100):
            if (found := self.resources()).files <= files and not self.metrics()["flex_running"]:
                break
            sleep(0.1)
        return found


@contextmanager
def serving(bundle: Path, *options: str) -> Iterator[Server]:
    """A server for a block; RuntimeError if it does not end well."""
    server = Server(bundle, *options)
    try:
        yield server
    except BaseException:
        server.process.kill()
        server.process.wait()
        raise
    if status := server.stop():
        raise RuntimeError(f"the server ended with status {status}: {server.said()}")


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


def connected(server: Server) -> httpx.AsyncClient:
    """A client of the server, with a connection for each request under way."""
    return httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, limits=httpx.Limits(max_connections=None))


async def load(server: Server, asked: Sequence[Asked], clients: int, count: int) -> tuple[list[Reply], float]:
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


async def too_many(server: Server, asked: Sequence[Asked], count: int) -> list[Reply]:
    """So many questions at a time, those that find the queue full left at that."""
    async with connected(server) as client:
        return list(await asyncio.gather(*(ask(client, server.model, asked[n % len(asked)]) for n in range(count))))


async def disconnect(server: Server, asked: Sequence[Asked], count: int) -> None:
    """So many requests that go away in the middle: every other one at the first chunk, the others before it."""

    async def one(client: httpx.AsyncClient, index: int) -> None:
        body = asked[index % len(asked)].body(server.model)
        request = client.build_request("POST", "/v1/chat/completions", json=body)
        if index % 2:
            with suppress_timeout():
                await asyncio.wait_for(client.send(request, stream=True), 0.05)
            return
        response = await client.send(request, stream=True)
        async for _ in response.aiter_lines():
            break
        await response.aclose()

    async with connected(server) as client:
        for begin in range(0, count, 10):
            await asyncio.gather(*(one(client, index) for index in range(begin, min(begin + 10, count))))


@contextmanager
def suppress_timeout() -> Iterator[None]:
    try:
        yield
    except (asyncio.TimeoutError, TimeoutError):
        pass


def raw(server: Server, body: dict[str, Any]) -> bytes:
    """The request as it goes over the wire."""
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


@contextmanager
def half_requests(server: Server, asked: Sequence[Asked], count: int) -> Iterator[None]:
    """So many connections that sent a half of a request, by turns of the head and of the body, for a block."""
    held = []
    for index in range(count):
        data = raw(server, asked[index % len(asked)].body(server.model))
        held.append(socket.create_connection(("127.0.0.1", server.port)))
        held[-1].sendall(data[:40] if index % 2 else data[: len(data) // 2])
    try:
        yield
    finally:
        for each in held:
            each.close()


async def beside_slow_readers(
    server: Server, asked: Sequence[Asked], readers: int, work: Callable[[], Awaitable[Any]]
) -> tuple[Any, int]:
    """What `work` returns while so many clients read their answers a byte a second; bytes that these read."""
    read = 0

    async def one(index: int) -> None:
        nonlocal read
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the smallest that there is
        client.connect(("127.0.0.1", server.port))
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        with client:
            await loop.sock_sendall(client, raw(server, asked[index % len(asked)].body(server.model)))
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


@dataclass(frozen=True)
class Overhead:
    """Of requests over the engine, in milliseconds. whole: all that they took longer, divided by their tokens. request:
    what one took longer until its first token. token: what each token after the first took longer."""

    whole: float
    request: float
    token: float

    def __str__(self) -> str:
        return f"{self.whole:.2f} ms a token: {self.request:.2f} ms a request, {self.token:.2f} ms each token more"


def overhead(
    server: Server, engine: Engine, asked: Sequence[Asked], rounds: int, *, image: bool = True, **options: Any
) -> Overhead:
    """Each question is streamed by one client and by the engine in this process, taking turns, and each by turns first.
    image: the request brings its image, which both have encoded: what a new one costs is vision's, on both sides; else
    questions are text alone. What one question took longer is the median of so many rounds."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    views: dict[int, ImageView] = {}
    first, rest, tokens = [], [], 0
    for each in asked:
        number = each.scene if image else -1
        if number not in views:
            views[number] = engine.image(base64.b64decode(each.url.partition(",")[2]) if image else None)
        body = json.dumps(each.body(server.model, image=image, **options)).encode()
        sides = [lambda: _http(connection, body), lambda: _engine(views[number], each.question)]  # noqa: B023
        differences = []
        for turn in range(rounds + 1):
            order = (0, 1) if turn % 2 else (1, 0)
            found = {side: sides[side]() for side in order}
            if turn:  # before, the image was encoded
                differences.append(np.subtract(found[0], found[1]))
        middle = np.median(differences, axis=0)
        first.append(middle[0])
        rest.append(middle[1])
        tokens += views[number].ask(each.question, max_new_tokens=TOKENS).stats.decode_ms.size
    for view in views.values():
        view.close()
    after = tokens - len(asked)
    return Overhead(*(1e3 * float(each) for each in (sum(first + rest) / tokens, np.median(first), sum(rest) / after)))


def _http(connection: http.client.HTTPConnection, body: bytes) -> tuple[float, float]:
    """Seconds until the first token's chunk, and from it to the end."""
    begin, first = perf_counter(), 0.0
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    while line := response.readline():
        if not first and b'"content":' in line and b'"role"' not in line:
            first = perf_counter() - begin
    return first, perf_counter() - begin - first


def _engine(view: ImageView, question: str) -> tuple[float, float]:
    """The same of the engine."""
    begin, first = perf_counter(), 0.0
    for _ in view.stream(question, max_new_tokens=TOKENS).steps():
        first = first or perf_counter() - begin
    return first, perf_counter() - begin - first


def measure(bundle: Path, scenes: int, clients: int, count: int, rounds: int) -> list[tuple[str, str]]:
    """The rows of the table. AssertionError when something is not as it should be."""
    engine = Engine(bundle)
    asked = questions(engine, scenes)
    rows = [("questions, of images", f"{len(asked)} of {scenes}")]
    rows.append(("right answers of the engine itself", _share([each.text == each.right for each in asked])))
    with serving(bundle) as server:
        rows.append(("80 requests at a time, a queue of 32", _refused(asyncio.run(too_many(server, asked, 80)))))
        asyncio.run(load(server, asked, 2, len(asked)))  # now every image is encoded, every pool is grown
        before = server.settled(files=0), server.metrics()
        replies, seconds = asyncio.run(load(server, asked, clients, count))
        after = server.settled(before[0].files), server.metrics()
        rows += _of_load(replies, seconds, clients, *before, *after)
        rows += _of_faults(server, asked, clients, before[0], median(reply.seconds for reply in replies))
        kilobytes = sum(len(each.url) for each in asked) / len(asked) / 1e3
        name, few = "overhead over Engine", asked[::4]
        rows.append((f"{name}, images of {kilobytes:.0f} kB", str(overhead(server, engine, few, rounds))))
        selection = overhead(server, engine, few, rounds, flex={"selection": True})
        rows.append((f"{name}, and each token's selection", str(selection)))
        rows.append((f"{name}, text alone", str(overhead(server, engine, few, rounds, image=False))))
        last = server.settled(before[0].files)
        rows.append(("in the end: memory, threads, open files", _resources(before[0], last)))
    engine.close()
    return rows


def _of_load(
    replies: list[Reply], seconds: float, clients: int,
    held: Resources, counted: dict[str, float], holds: Resources, counts: dict[str, float],
) -> list[tuple[str, str]]:  # fmt: skip
    def grown(name: str) -> float:
        return counts[name] - counted[name]

    hits, misses = grown("flex_view_cache_hits_total"), grown("flex_view_cache_misses_total")
    waited = grown("flex_queue_seconds_sum") / grown("flex_queue_seconds_count")
    latencies, firsts = ([getattr(reply, name) for reply in replies] for name in ("seconds", "first"))
    tokens = grown("flex_answer_tokens_total")
    return [
        (f"answers equal to Engine's, in order, {clients} clients", f"{len(replies)} of {len(replies)}"),
        ("latency, p50 / p95", _milliseconds(latencies)),
        ("time in the queue, mean", f"{1e3 * waited:.0f} ms"),
        ("time to first token, p50 / p95", _milliseconds(firsts)),
        ("throughput", f"{len(replies) / seconds:.1f} answers/s, {tokens / seconds:.0f} tokens/s"),
        ("view cache", f"{hits:.0f} hits, {misses:.0f} misses"),
        ("memory, threads, open files", _resources(held, holds)),
    ]


def _of_faults(
    server: Server, asked: list[Asked], clients: int, held: Resources, usual: float
) -> list[tuple[str, str]]:
    """What some do to others."""
    rows = []

    async def work() -> list[Reply]:
        return (await load(server, asked, clients, 4 * clients))[0]

    replies, read = asyncio.run(beside_slow_readers(server, asked, 8, work))
    latency = median(reply.seconds for reply in replies)
    rows.append(
        (
            f"beside 8 readers of a byte a second ({read} bytes)",
            f"{len(replies)} right, {latency / usual:.2f} x the p50",
        )
    )
    with half_requests(server, asked, 50):
        replies = asyncio.run(work())
    rows.append(
        ("beside 50 half requests", f"{len(replies)} right, {median(r.seconds for r in replies) / usual:.2f} x")
    )
    cancelled = server.metrics().get('flex_answers_total{end="cancelled"}', 0.0)
    asyncio.run(disconnect(server, asked, 50))
    found = server.settled(held.files)
    cancelled = server.metrics().get('flex_answers_total{end="cancelled"}', 0.0) - cancelled
    replies = asyncio.run(work())
    rows.append((f"after 50 disconnects ({cancelled:.0f} answers cancelled)", f"{len(replies)} right"))
    assert found.files <= held.files and found.threads <= held.threads, (held, found)
    return rows


def _refused(replies: list[Reply]) -> str:
    statuses = sorted(reply.status for reply in replies)
    answered, refused = statuses.count(200), statuses.count(429)
    assert answered + refused == len(statuses) and answered and refused, statuses
    return f"{answered} answered, {refused} refused (429)"


def _share(right: list[bool]) -> str:
    return f"{sum(right)} of {len(right)}"


def _milliseconds(values: list[float]) -> str:
    middle, high = (1e3 * float(np.percentile(values, share)) for share in (50, 95))
    return f"{middle:.0f} / {high:.0f} ms"


def _resources(before: Resources, after: Resources) -> str:
    memory = [f"{each.memory / 1e6:.0f}" for each in (before, after)]
    return f"{' -> '.join(memory)} MB, {before.threads} -> {after.threads}, {before.files} -> {after.files}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", help="of the default model; None = one that is built")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--scenes", type=int, default=10, help=f"images, with {QUESTIONS} questions each")
    parser.add_argument(
        "--rounds", type=int, default=15, help="how often every fourth question is timed for the overhead"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = given.bundle or build(BuildOptions(out=Path(folder) / "bundle", check="none")).path
        rows = measure(bundle, given.scenes, given.clients, given.requests, given.rounds)
    print("\n".join(f"| {name} | {value} |" for name, value in [("", ""), ("---", "---:"), *rows]))


if __name__ == "__main__":
    main()
