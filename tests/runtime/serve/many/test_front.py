"""The front with replicas that a test plays: who is asked, what is passed on, and what happens when one is lost."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")

from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from runtime.serve import Settings
from runtime.serve.ray.front import front
from tests.runtime.questions import PHOTO
from tests.runtime.serve.asgi import Reply, data_url, get, png, post, post_request, user

IMAGE = png(PHOTO)
ASKED = {"model": "m", "messages": [user("hello", data_url(IMAGE))]}
LOST = ActorDiedError()


def head(kind: str) -> dict[str, Any]:
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind.encode())]}


def body(text: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text, "more_body": more}


class Replicas:
    """A handle. plays: what each of the replicas that are asked sends, in turn: messages, an error to raise, or None to
    hang."""

    def __init__(self, *plays: list[Any]) -> None:
        self.plays, self.asked, self.cancelled = list(plays), [], 0

    def options(self, **_: object) -> Replicas:
        return self

    def remote(self, image: str, scope: dict[str, Any], sent: bytes) -> Answer:
        self.asked.append((image, scope["path"], sent))
        return Answer(self, self.plays.pop(0))


class Answer:
    def __init__(self, replicas: Replicas, play: list[Any]) -> None:
        self.replicas, self.messages = replicas, self._messages(play)

    async def _messages(self, play: list[Any]) -> AsyncIterator[dict[str, Any]]:
        for each in play:
            if each is None:
                await asyncio.sleep(60)
            if isinstance(each, Exception):
                raise each
            yield each

    def __anext__(self) -> Any:
        return anext(self.messages)

    def cancel(self) -> None:
        self.replicas.cancelled += 1


WHOLE = [head("application/json"), body(b'{"a": 1}')]
STREAM = [head("text/event-stream"), body(b"data: 1\n\n", True), body(b"data: [DONE]\n\n", True), body(b"")]


def reply(replicas: Replicas, **settings: object) -> Reply:
    return post(front(Settings(**settings), replicas), ASKED)


def test_the_key_is_that_of_the_images_bytes():
    replicas = Replicas(WHOLE, STREAM, WHOLE)
    app = front(Settings(), replicas)
    assert post(app, ASKED).json == {"a": 1}
    streamed = post(app, ASKED)
    assert streamed.body == b"data: 1\n\ndata: [DONE]\n\n" and streamed.complete and len(streamed.pieces) == 3
    post(app, {"model": "m", "messages": [user("hello")]})
    expected = hashlib.sha256(IMAGE).hexdigest()
    assert [image for image, *_ in replicas.asked] == [expected, expected, ""]


def test_one_that_dies_before_it_said_anything_is_not_missed():
    for said in ([], [head("application/json")]):
        replicas = Replicas([*said, LOST], WHOLE)
        assert reply(replicas).json == {"a": 1} and len(replicas.asked) == 2
        assert replicas.asked[0] == replicas.asked[1]


def test_a_request_that_kills_two_is_given_to_no_third():
    found = reply(Replicas([LOST], [LOST], WHOLE))
    assert found.status == 503 and found.error["code"] == "replica_lost" and found.headers["retry-after"] == "1"


def test_a_stream_that_is_cut_says_so():
    found = reply(Replicas([*STREAM[:2], LOST], STREAM))
    first, error = found.chunks
    assert first == 1 and error["error"]["code"] == "replica_lost" and found.complete


def test_half_an_answer_is_never_taken_for_a_whole():
    with pytest.raises(Exception, match=r"^$"):  # as for any server: it closes the connection
        reply(Replicas([head("application/json"), body(b'{"a"', True), LOST]))


def test_nobody_waits_for_ever():
    replicas = Replicas([None])
    found = reply(replicas, timeout=0.2)
    assert found.status == 503 and found.error["code"] == "timeout" and replicas.cancelled == 1


def test_too_many_wait():
    found = reply(Replicas([BackPressureError(num_queued_requests=9, max_queued_requests=9)]))
    assert found.status == 429 and found.error["code"] == "queue_full"


def test_what_no_replica_would_answer_reaches_none():
    replicas = Replicas()
    app = front(Settings(api_key="a-key-of-24-characters-x", body_bytes=2000), replicas)
    key = {"authorization": "Bearer a-key-of-24-characters-x"}
    assert post(app, ASKED).status == 401
    assert post(app, b"{" * 3000, headers=key).status == 413
    assert post(app, {"model": "m"}, headers=key).error["param"] == "messages"
    wrong = {"model": "m", "messages": [user("hello", "https://example.org/a.png")]}
    assert post(app, wrong, headers=key).error["code"] == "invalid_image_url"
    assert get(app, "/metrics", **key).error["fix"].endswith("docs/scaling.md")
    assert not replicas.asked


def test_bodies_count_as_long_as_they_are_kept():
    """Also while their requests wait for a replica."""
    size = len(json.dumps(ASKED))
    replicas = Replicas(WHOLE, [*STREAM[:2], None], WHOLE)
    app = front(Settings(body_bytes=1024 + size, all_bodies_bytes=1024 + size * 3 // 2), replicas)

    async def use() -> None:
        assert (await post_request(app, ASKED)).status == 200
        asking = asyncio.create_task(post_request(app, ASKED))
        await asyncio.sleep(0.1)
        assert (await post_request(app, {**ASKED, "user": "x" * 1000})).error["code"] == "busy"
        asking.cancel()
        await asyncio.wait([asking])
        assert (await post_request(app, ASKED)).status == 200

    asyncio.run(use())


def test_the_rest_goes_to_any():
    replicas = Replicas(WHOLE)
    assert get(front(Settings(), replicas), "/v1/models").json == {"a": 1}
    assert replicas.asked == [("", "/v1/models", b"")]


def test_a_client_that_leaves_ends_it():
    replicas = Replicas([*STREAM[:2], None])

    async def use() -> None:
        asking = asyncio.create_task(post_request(front(Settings(), replicas), ASKED))
        await asyncio.sleep(0.1)
        asking.cancel()  # what Ray Serve does then
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(use())
    assert replicas.cancelled == 1
