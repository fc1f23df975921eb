"""A replica asked directly: its health is a token, and who stops listening has left."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator

import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")

from runtime.serve import Settings
from runtime.serve.ray.replica import Replica
from tests.runtime.questions import PHOTO
from tests.runtime.serve.asgi import COMPLETIONS, data_url, png, user

KEY = "a-key-of-24-characters-x"
OPENING = {"backend": None, "device": None, "threads": 1, "verify": True}
SCOPE = {
    "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
    "path": COMPLETIONS, "raw_path": COMPLETIONS.encode(), "query_string": b"", "root_path": "", "client": None,
    "server": None, "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
}  # fmt: skip


@pytest.fixture(params=[Settings(), Settings(api_key=KEY), Settings(hosts=("example.org",))])
def replica(request, chat_bundle) -> Iterator[Replica]:
    made = Replica(str(chat_bundle), None, None, request.param, OPENING)
    yield made
    made.__del__()


def asked(**more: object) -> bytes:
    message = user("hello", data_url(png(PHOTO)))
    return json.dumps({"model": "serve-fp32", "messages": [message], "max_tokens": 200, **more}).encode()


def counted(replica: Replica, name: str, **labels: str) -> float:
    return replica._metrics.registry.get_sample_value(name, labels) or 0.0


def test_health_is_a_token(replica):
    """Whether or not clients need a key or a name that it does not know of itself."""
    for checks in (1, 2):
        asyncio.run(replica.check_health())
        assert counted(replica, "flex_answer_tokens_total") == checks


def test_an_engine_that_does_not_answer_is_not_healthy(replica):
    asyncio.run(replica.check_health())
    replica._engine.close()
    with pytest.raises(RuntimeError, match="status 503"):
        asyncio.run(replica.check_health())


def test_an_engine_that_hangs_is_not_healthy(chat_bundle, monkeypatch):
    replica = Replica(str(chat_bundle), None, None, Settings(queue=1), OPENING)
    ends = threading.Event()

    def image(*_: object) -> None:
        ends.wait(30)
        raise MemoryError

    monkeypatch.setattr(type(replica._engine), "image", image)

    async def check() -> None:
        await asyncio.wait_for(replica.check_health(), 1)  # as Ray Serve does

    for _ in range(4):  # also when its queue is full of them
        with pytest.raises(asyncio.TimeoutError):
            asyncio.run(check())
    ends.set()
    replica.__del__()


def test_somebody_elses_tokens_are_proof_enough(chat_bundle):
    replica = Replica(str(chat_bundle), None, None, Settings(), OPENING)

    async def use() -> None:
        async for _ in replica.ask("", SCOPE, asked(max_tokens=3)):
            pass
        await replica.check_health()

    asyncio.run(use())
    assert counted(replica, "flex_answer_tokens_total") == 3
    replica.__del__()


def test_who_stops_listening_has_left(chat_bundle):
    replica = Replica(str(chat_bundle), None, None, Settings(), OPENING)

    async def use() -> None:
        answer = replica.ask("", SCOPE, asked(stream=True))
        assert (await anext(answer))["status"] == 200
        await anext(answer)
        await answer.aclose()
        while counted(replica, "flex_answers_total", end="cancelled") < 1:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(use(), 20))
    replica.__del__()
