"""A server under load: `python -m tests.bench.serving [BUNDLE]`, the table of docs/reliability.md.

The server is the real command in a process of its own, its clients are on the loopback. Questions are about held-out
scenes of the default model; an answer is right if it is the one that `Engine` gives, token for token, in order.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import http.client
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import httpx
import numpy as np

from export.build import BuildOptions, build
from runtime import Engine
from runtime.view import ImageView
from tests.bench.serving.clients import (
    PATIENCE,
    TOKENS,
    Address,
    Asked,
    Reply,
    beside_slow_readers,
    disconnect,
    half_requests,
    load,
    questions,
    too_many,
)  # fmt: skip
from tests.runtime.serve.command import serving

QUEUE = 32  # requests that may wait: more than there are clients
MANY = 80  # requests at a time, more than may wait
POOL = 40  # threads of Starlette, which come and go
CANCELLED = 'flex_answers_total{end="cancelled"}'


@dataclass(frozen=True)
class Resources:
    """What a process holds: memory in bytes, threads, open files."""

    memory: int
    threads: int
    files: int


@dataclass(frozen=True)
class Watched:
    """A running server, seen from outside. address: where it is asked. process: its number."""

    address: Address
    process: int

    def metrics(self) -> dict[str, float]:
        """By name, with its labels as /metrics writes them."""
        lines = httpx.get(f"{self.address.url}/metrics").text.splitlines()
        values = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in values}

    def resources(self) -> Resources:
        """From /proc."""
        folder = Path(f"/proc/{self.process}")
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        kilobytes, threads = int(status["VmRSS"].split()[0]), int(status["Threads"])
        return Resources(kilobytes << 10, threads, len(list((folder / "fd").iterdir())))

    def settled(self, files: int) -> Resources:
        """Once what clients left is gone: nothing runs and no more than so many files are open, or after 10 s."""
        for _ in range(100):
            if (found := self.resources()).files <= files and not self.metrics()["flex_running"]:
                break
            sleep(0.1)
        return found


@dataclass(frozen=True)
class Overhead:
    """What answers over HTTP take longer than those of the engine, in milliseconds, by answer and by token."""

    answer: float
    token: float

    def __str__(self) -> str:
        return f"{self.token:.2f} ms a token, {self.answer:.1f} ms an answer"


def overhead(
    server: Watched, engine: Engine, asked: Sequence[Asked], rounds: int, *, image: bool = True, **options: Any
) -> Overhead:
    """Each question is streamed by one client, and by the engine in this process, by turns. image: the request brings
    its image, which both have encoded: what a new one costs is vision's, on both sides; else questions are text alone.
    What a question takes is the least of so many rounds, as others use the machine, too.

    Not told apart by token: while the first waits for a core that the engine has, the next ones catch up with it.
    """
    connection = http.client.HTTPConnection(*server.address.place, timeout=PATIENCE)
    longer, tokens = 0.0, 0
    for each in asked:
        body = json.dumps(each.body(server.address.model, image=image, **options)).encode()
        with engine.image(base64.b64decode(each.url.partition(",")[2]) if image else None) as view:
            tokens += len(view.ask(each.question, max_new_tokens=TOKENS).token_ids)
            _http(connection, body)  # now both have the image, and the question in their cache
            theirs, ours = [], []
            for _ in range(rounds):
                theirs.append(_http(connection, body))
                ours.append(_engine(view, each.question))
        longer += min(theirs) - min(ours)
    connection.close()
    return Overhead(1e3 * longer / len(asked), 1e3 * longer / tokens)


def _http(connection: http.client.HTTPConnection, body: bytes) -> float:
    """Seconds until the end of the stream."""
    begin, last = perf_counter(), b""
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    while line := response.readline():
        last = line if line.strip() else last
    assert last == b"data: [DONE]\n", last
    return perf_counter() - begin


def _engine(view: ImageView, question: str) -> float:
    """The same of the engine."""
    begin = perf_counter()
    for _ in view.stream(question, max_new_tokens=TOKENS).steps():
        pass
    return perf_counter() - begin


def measure(bundle: Path, scenes: int, clients: int, count: int, rounds: int, slots: int = 1) -> list[tuple[str, str]]:
    """The rows of the table. AssertionError when something is not as it should be."""
    with Engine(bundle) as engine, tempfile.TemporaryDirectory() as folder:
        asked = questions(engine, scenes)
        rows = [(f"right answers of Engine itself, about {scenes} images", _share([e.text == e.right for e in asked]))]
        with serving(bundle, "--queue", QUEUE, "--slots", slots, log=Path(folder) / "log") as running:
            server = Watched(Address.of(running.url), running.process.pid)
            fresh = server.resources()
            asyncio.run(load(server.address, asked, 2, len(asked)))
            replies = asyncio.run(too_many(server.address, asked, MANY))
            rows.append((f"{MANY} requests at a time, room for {QUEUE} to wait", refused(replies)))
            rows += _load(server, asked, clients, count, fresh)
            rows += _faults(server, asked, clients, fresh)
            rows += _overheads(server, engine, asked, rounds)
            rows.append(
                ("memory, threads, open files: fresh -> in the end", _change(fresh, server.settled(fresh.files)))
            )
            assert running.end() == 0, running.log.read_text()
    return rows


def _load(server: Watched, asked: list[Asked], clients: int, count: int, fresh: Resources) -> list[tuple[str, str]]:
    """Every image was asked about before."""
    held, counted = server.settled(fresh.files), server.metrics()
    replies, seconds = asyncio.run(load(server.address, asked, clients, count))
    holds, counts = server.settled(fresh.files), server.metrics()
    require_no_leak(held, holds)
    grown = {name: counts[name] - counted.get(name, 0.0) for name in counts}
    hits, misses = grown["flex_view_cache_hits_total"], grown["flex_view_cache_misses_total"]
    waited = grown["flex_queue_seconds_sum"] / grown["flex_queue_seconds_count"]
    tokens = grown["flex_answer_tokens_total"]
    return [
        (f"{count} requests of {clients} clients, equal to Engine's", f"{len(replies)}"),
        ("latency, p50 / p95", _milliseconds([reply.seconds for reply in replies])),
        ("time in the queue, mean", f"{1e3 * waited:.0f} ms"),
        ("time to first token, p50 / p95", _milliseconds([reply.first for reply in replies])),
        ("throughput", f"{len(replies) / seconds:.1f} answers/s, {tokens / seconds:.0f} tokens/s"),
        ("images found encoded", f"{hits:.0f} of {hits + misses:.0f}"),
        ("memory, threads, open files: before -> after", _change(held, holds)),
    ]


def _faults(server: Watched, asked: list[Asked], clients: int, fresh: Resources) -> list[tuple[str, str]]:
    """What some do to others, whose latency is compared with that without them."""

    async def work() -> list[Reply]:
        return (await load(server.address, asked, clients, 4 * clients))[0]

    def told(replies: list[Reply]) -> str:
        return f"{len(replies)} right, p50 {1e3 * median(reply.seconds for reply in replies):.0f} ms"

    rows = [("answers beside nobody else", told(asyncio.run(work())))]
    held = server.settled(fresh.files)
    replies, read = asyncio.run(beside_slow_readers(server.address, asked, 8, work))
    rows.append((f"beside 8 clients that read a byte a second, {read} so far", told(replies)))
    with half_requests(server.address, asked, 50):
        rows.append(("beside 50 half requests left open", told(asyncio.run(work()))))
    before = server.metrics().get(CANCELLED, 0.0)
    asyncio.run(disconnect(server.address, asked, 50))
    holds = server.settled(held.files)
    cancelled = server.metrics().get(CANCELLED, 0.0) - before
    rows.append((f"after 50 disconnects, {cancelled:.0f} before the answer's end", told(asyncio.run(work()))))
    require_no_leak(held, holds)
    return rows


def _overheads(server: Watched, engine: Engine, asked: list[Asked], rounds: int) -> list[tuple[str, str]]:
    kilobytes = sum(len(each.url) for each in asked) / len(asked) / 1e3
    ways: dict[str, dict[str, Any]] = {
        f"with an image of {kilobytes:.0f} kB": {},
        "and the selection of each token": {"flex": {"selection": True}},
        "text alone": {"image": False},
    }
    few = asked[::4]
    return [
        (f"longer than Engine, {way}", str(overhead(server, engine, few, rounds, **options)))
        for way, options in ways.items()
    ]


def require_no_leak(held: Resources, holds: Resources) -> None:
    """AssertionError when a server holds more files than it held, or more threads than a pool may have grown by."""
    assert holds.files <= held.files and holds.threads <= held.threads + POOL, (held, holds)


def refused(replies: list[Reply]) -> str:
    """How many were answered and how many refused. AssertionError unless there are both, and nothing else."""
    statuses = [reply.status for reply in replies]
    answered, late = statuses.count(200), statuses.count(429)
    assert answered + late == len(statuses) and answered and late, statuses
    return f"{answered} answered, {late} refused (429)"


def _share(right: list[bool]) -> str:
    return f"{sum(right)} of {len(right)}"


def _milliseconds(values: list[float]) -> str:
    middle, high = (1e3 * float(np.percentile(values, share)) for share in (50, 95))
    return f"{middle:.0f} / {high:.0f} ms"


def _change(before: Resources, after: Resources) -> str:
    memory = [f"{each.memory / 1e6:.0f}" for each in (before, after)]
    return f"{' -> '.join(memory)} MB, {before.threads} -> {after.threads}, {before.files} -> {after.files}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", help="of the default model; None = one that is built")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--slots", type=int, default=1, help="of the server")
    parser.add_argument("--scenes", type=int, default=10, help="images, with some nine questions each")
    parser.add_argument(
        "--rounds", type=int, default=15, help="how often every fourth question is timed for the overhead"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = given.bundle or build(BuildOptions(out=Path(folder) / "bundle", check="none")).path
        rows = measure(bundle, given.scenes, given.clients, given.requests, given.rounds, given.slots)
    print("\n".join(f"| {name} | {value} |" for name, value in [("", ""), ("---", "---:"), *rows]))


if __name__ == "__main__":
    main()
