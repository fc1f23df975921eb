"""What is measured: one engine's times, and questions a second through a server and through replicas of it."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from runtime import Engine
from tests.bench.scaling.simulate import Service
from tests.runtime.serve.asgi import COMPLETIONS, JSON, data_url, user
from tests.runtime.serve.command import serving
from tests.runtime.serve.many.cluster import processes_of, running
from tests.runtime.serve.many.pictures import ANSWER, QUESTION, picture

IMAGES, QUESTIONS = 40, 4  # QUESTIONS of each image
PEOPLE = 8  # who ask at a time, each the next question as soon as the last is answered
_number = itertools.count()  # every image is a new one


@dataclass(frozen=True)
class Rate:
    """A closed loop of PEOPLE. rate: questions a second. p50, p95: seconds to an answer. hits: share of the questions
    whose image was encoded already."""

    name: str
    rate: float
    p50: float
    p95: float
    hits: float


def service_times(bundle: Path) -> Service:
    """Of one engine with one thread, nobody else asking: processor time of that thread, which others of the machine do
    not lengthen much."""
    miss, hit = [], []
    with Engine(bundle, threads=1) as engine:
        engine.generate(picture(next(_number)), QUESTION)
        for _ in range(IMAGES):
            with engine.image(picture(next(_number))) as view:
                for turn in range(QUESTIONS):
                    begun = time.thread_time()
                    answer = view.ask(QUESTION)
                    (hit if turn else miss).append(time.thread_time() - begun)
                    assert answer.text.strip() == ANSWER
    return Service(np.array(miss), np.array(hit))


@dataclass(frozen=True)
class Memory:
    """Bytes of a replica and of the front after their questions, and of all that Ray runs, these included; what
    processes share counts once."""

    replica: int
    front: int
    all: int


def rates(bundle: Path, seconds: float, rounds: int, folder: Path) -> tuple[list[Rate], Memory]:
    """One server; then Ray Serve with one replica, with two, and with two that get their questions by Ray's router.
    The best round of each, of so many seconds: others of the machine only take."""

    def best(name: str, url: str) -> Rate:
        return max((asyncio.run(_closed_loop(name, url, seconds)) for _ in range(rounds)), key=lambda each: each.rate)

    with serving(bundle, "--threads", 1, log=folder / "log") as server:
        found = [best("one server, no Ray", server.url)]
    with running() as cluster:
        for name, arguments in (
            ("Ray Serve, 1 replica", {"replicas": 1}),
            ("Ray Serve, 2 replicas", {"replicas": 2}),
            ("Ray Serve, 2 replicas, without affinity", {"replicas": 2, "affinity": False}),
        ):
            content = {
                "http_options": {"host": "127.0.0.1", "port": cluster.port},
                "applications": [
                    {
                        "name": "flexattention",
                        "import_path": "runtime.serve.ray:deployment",
                        "args": {"bundle": str(bundle), "cpus": 0.5, **arguments},
                    }
                ],
            }
            with _deployed(cluster, content, int(arguments["replicas"])):
                found.append(best(name, cluster.url))
        memory = Memory(
            max(map(_bytes, cluster.replicas().values())),
            max(map(_bytes, cluster.replicas(deployment="Front").values())),
            sum(map(_bytes, processes_of(cluster.leader))),
        )
    return found, memory


def _bytes(pid: int) -> int:
    """The proportional set size of a process."""
    rolled = Path(f"/proc/{pid}/smaps_rollup").read_text().split()
    return 1024 * int(rolled[rolled.index("Pss:") + 1])


@contextmanager
def _deployed(cluster: Any, content: dict[str, Any], replicas: int) -> Iterator[None]:
    before = set(cluster.replicas())
    cluster.rest("/api/serve/applications/", content)
    cluster.until(
        lambda: (
            cluster.application().get("status") == "RUNNING"
            and len(now := set(cluster.replicas())) == replicas
            and (not before or now != before)
        )
    )
    yield


async def _closed_loop(name: str, url: str, seconds: float) -> Rate:
    times, hits = [], []
    async with httpx.AsyncClient(timeout=120) as client:
        (model,) = (await client.get(f"{url}/v1/models")).json()["data"]

        async def ask(body: bytes) -> None:
            begun = time.perf_counter()
            reply = (await client.post(f"{url}{COMPLETIONS}", content=body, headers=JSON)).json()
            times.append((begun, time.perf_counter()))
            assert reply["choices"][0]["message"]["content"] == ANSWER, reply
            hits.append(reply["flex"]["stats"]["view_cached"])

        def body() -> bytes:
            message = user(QUESTION, data_url(picture(next(_number))))
            return json.dumps({"model": model["id"], "messages": [message], "flex": {}}).encode()

        bodies = [[body() for _ in range(round(2 * seconds))] for _ in range(PEOPLE)]  # before the clock runs

        async def person(own: list[bytes]) -> None:
            for each in itertools.cycle(own):
                for _ in range(QUESTIONS):
                    if time.perf_counter() > end:
                        return
                    await ask(each)

        begun = time.perf_counter()
        end = begun + seconds * 1.2
        await asyncio.gather(*map(person, bodies))
    counted = [last - first for first, last in times if last > begun + seconds * 0.2]  # after a warm-up
    p50, p95 = np.percentile(counted, [50, 95])
    return Rate(name, len(counted) / (max(last for _, last in times) - begun - seconds * 0.2), p50, p95, np.mean(hits))
