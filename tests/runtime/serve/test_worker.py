"""Who waits, who is refused, who is given up, and what is kept of an image."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from engines.ort import OrtDecoder, OrtModel
from runtime import Engine
from runtime.serve import Settings, app
from tests.runtime.questions import OTHER, PHOTO, QUESTION
from tests.runtime.serve.asgi import Reply, data_url, get, png, post, post_request, user

IMAGE, IMAGE_2 = data_url(png(PHOTO)), data_url(png(OTHER))
NAME = "serve-fp32"


def question(image: str | None = None, **options: object) -> dict:
    return {"model": NAME, "messages": [user(QUESTION, image)], "max_tokens": 12, **options}


class Steps:
    """Runs of the decoder. `hold()` lets so many more through, and the engine then waits."""

    def __init__(self) -> None:
        self.count, self._gate, self._left = 0, threading.Condition(), None

    def hold(self, left: int) -> None:
        with self._gate:
            self._left = left
            self._gate.notify_all()

    def let_go(self) -> None:
        with self._gate:
            self._left = None
            self._gate.notify_all()

    def take(self) -> None:
        with self._gate:
            assert self._gate.wait_for(lambda: self._left is None or self._left > 0, 30)
            self.count += 1
            if self._left is not None:
                self._left -= 1


@pytest.fixture
def steps(monkeypatch) -> Iterator[Steps]:
    """Of every decoder, single tokens: not the prompt's prefill."""
    counted, run = Steps(), OrtDecoder.run

    def counting(self, ids, *arguments, **options):
        if ids.shape[1] == 1:
            counted.take()
        return run(self, ids, *arguments, **options)

    monkeypatch.setattr(OrtDecoder, "run", counting)
    yield counted
    counted.let_go()


async def until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def metric(app, name: str) -> float:
    lines = get(app, "/metrics").body.decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.partition(" ")[0].partition("{")[0] == name)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_engine_within_a_step(made, steps, stream):
    app = made()

    async def leaving() -> Reply:
        leave = asyncio.Event()
        steps.hold(3)
        asked = asyncio.create_task(post_request(app, question(stream=stream, max_tokens=200), leave=leave))
        await until(lambda: steps.count == 3)
        leave.set()
        reply = await asyncio.wait_for(asked, 10)
        steps.let_go()
        worker = app.state.service.worker
        await until(lambda: not worker._running)
        return reply

    reply = asyncio.run(leaving())
    assert not reply.complete or not stream
    assert steps.count <= 4, "the step that was running when it left, and none after it"
    assert metric(app, "flex_answers_total") == 1 and metric(app, "flex_running") == 0
    assert post(app, question()).status == 200, "the next one is answered"


def test_a_stream_that_nobody_reads_on_stops_too(made, steps):
    """The server cancels the request's task, as uvicorn does when it ends by force."""
    app = made()

    async def cancelled() -> None:
        steps.hold(3)
        asked = asyncio.create_task(post_request(app, question(stream=True, max_tokens=200)))
        await until(lambda: steps.count == 3)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        steps.let_go()
        await until(lambda: not app.state.service.worker._running)

    asyncio.run(cancelled())
    assert steps.count <= 4


def test_a_slow_reader_holds_up_nobody(made):
    app = made()

    async def slow() -> tuple[Reply, Reply]:
        go_on = asyncio.Event()

        async def wait(reply: Reply) -> None:
            await go_on.wait()

        first = asyncio.create_task(post_request(app, question(stream=True, max_tokens=50), sent=wait))
        await until(lambda: app.state.service.worker._running or first.done())
        second = await asyncio.wait_for(post_request(app, question()), 30)
        assert not first.done()
        go_on.set()
        return await first, second

    first, second = asyncio.run(slow())
    assert second.status == 200 and first.complete and first.chunks[-1] == "[DONE]"


def test_a_full_queue(made, steps):
    """One runs, two wait, the next are told to come again; who waited is answered in turn."""
    app, ended = made(queue=2), []

    async def asked(name: int) -> Reply:
        reply = await post_request(app, question())
        ended.append(name)
        return reply

    async def crowd() -> tuple[list[Reply], list[Reply]]:
        steps.hold(0)
        running = [asyncio.create_task(asked(0))]
        await until(lambda: app.state.service.worker._running)
        for name in (1, 2):
            running.append(asyncio.create_task(asked(name)))
            await until(lambda: len(app.state.service.worker._waiting) == len(running) - 1)
        late = [await asked(3), await asked(4)]
        depth.append(app.state.service.metrics.queue._value.get())
        steps.let_go()
        return await asyncio.gather(*running), late

    depth: list[float] = []
    answered, late = asyncio.run(crowd())
    assert [reply.status for reply in answered] == [200] * 3 and ended == [3, 4, 0, 1, 2] and depth == [2]
    for reply in late:
        assert reply.status == 429 and int(reply.headers["retry-after"]) >= 1
        assert reply.error["code"] == "queue_full" and reply.error["type"] == "rate_limit_error" and reply.error["fix"]
    assert metric(app, "flex_queue_depth") == 0 and metric(app, "flex_queue_seconds_count") == 3


def test_who_leaves_the_queue_makes_room(made, steps):
    app = made(queue=1)

    async def crowd() -> Reply:
        steps.hold(0)
        first = asyncio.create_task(post_request(app, question()))
        await until(lambda: app.state.service.worker._running)
        leave = asyncio.Event()
        second = asyncio.create_task(post_request(app, question(), leave=leave))
        await until(lambda: app.state.service.worker._waiting)
        assert (await post_request(app, question())).status == 429
        leave.set()
        await second
        third = asyncio.create_task(post_request(app, question()))
        await until(lambda: app.state.service.worker._waiting)
        steps.let_go()
        assert (await first).status == 200
        return await third

    assert asyncio.run(crowd()).status == 200
    assert metric(app, "flex_answer_tokens_total") == 24, "nothing was computed for who left"


@pytest.mark.parametrize("stream", [True, False])
def test_a_timeout_counts_from_the_arrival(made, steps, stream):
    """Both the one that runs and the one that waits are told in time, and the engine stops."""
    app = made(timeout=0.4)

    async def late() -> list[Reply]:
        steps.hold(2)
        begun = time.monotonic()
        asked = [asyncio.create_task(post_request(app, question(stream=stream, max_tokens=100))) for _ in range(2)]
        replies = await asyncio.gather(*asked)
        assert 0.35 < time.monotonic() - begun < 5
        steps.let_go()
        await until(lambda: not app.state.service.worker._running)
        return replies

    first, second = asyncio.run(late())
    assert steps.count <= 3
    assert second.status == 503 and second.error["code"] == "timeout" and second.headers["retry-after"]
    if stream:  # it had begun: the error is its last event
        assert first.status == 200 and first.complete and first.chunks[-1]["error"]["code"] == "timeout"
    else:
        assert first.status == 503 and first.error["code"] == "timeout"


def test_an_end_lets_running_answers_end(made, steps):
    app = made()
    worker = app.state.service.worker

    async def ending() -> tuple[Reply, ...]:
        steps.hold(2)
        running = asyncio.create_task(post_request(app, question(stream=True)))
        waiting = asyncio.create_task(post_request(app, question()))
        await until(lambda: steps.count == 2 and worker._waiting)
        drained = asyncio.create_task(asyncio.to_thread(worker.drain, 30.0))
        await until(lambda: not worker.accepting)
        refused = await post_request(app, question())
        steps.let_go()
        await drained
        return await running, await waiting, refused

    running, waiting, refused = asyncio.run(ending())
    assert running.chunks[-1] == "[DONE]" and waiting.status == 200
    assert refused.status == 503 and refused.error["code"] == "ending"
    assert get(app, "/health/ready").status == 503 and get(app, "/health").status == 200


def test_an_end_does_not_wait_for_ever(made, steps):
    app = made()
    worker = app.state.service.worker

    async def ending() -> tuple[Reply, ...]:
        steps.hold(2)
        running = asyncio.create_task(post_request(app, question(stream=True, max_tokens=200)))
        waiting = asyncio.create_task(post_request(app, question()))
        await until(lambda: steps.count == 2 and worker._waiting)
        drained = asyncio.create_task(asyncio.to_thread(worker.drain, 0.2))
        replies = await running, await waiting
        steps.let_go()
        await drained
        return replies

    running, waiting = asyncio.run(ending())
    assert running.chunks[-1]["error"]["code"] == "ending" and running.complete
    assert waiting.status == 503 and waiting.error["code"] == "ending"
    assert steps.count <= 3


@pytest.fixture
def visions(monkeypatch) -> list[int]:
    """Tiles of each run of the vision encoder."""
    counted, vision = [], OrtModel.vision

    def counting(self, tiles):
        counted.append(len(tiles))
        return vision(self, tiles)

    monkeypatch.setattr(OrtModel, "vision", counting)
    return counted


def test_the_second_question_about_an_image_runs_no_vision(made, visions):
    app = made()
    first = post(app, question(IMAGE, flex={})).json
    runs = len(visions)
    again = [post(app, question(IMAGE, flex={})).json for _ in range(2)]
    other = post(app, question(IMAGE_2, flex={})).json
    assert runs > 0 and len(visions) == 2 * runs
    assert [each["flex"]["stats"]["view_cached"] for each in (first, *again, other)] == [False, True, True, False]
    assert again[0]["choices"] == first["choices"] != other["choices"]
    assert metric(app, "flex_view_cache_hits_total") == 2 and metric(app, "flex_view_cache_misses_total") == 2
    assert metric(app, "flex_view_cache_entries") == 2 and metric(app, "flex_view_cache_bytes") > 0
    assert metric(app, "flex_view_cache_evictions_total") == 0


def of_one(engine: Engine) -> int:
    """Bytes of a view of PHOTO after `question`."""
    with engine.image(PHOTO) as view:
        view.ask(QUESTION, max_new_tokens=12)
        return view.nbytes + PHOTO.shape[0] * PHOTO.shape[1] * 4


def test_the_oldest_image_makes_room(made, engine, visions):
    app = made(view_bytes=2 * of_one(engine) + 100_000)
    images = [data_url(png(np.roll(PHOTO, shift, 0))) for shift in range(3)]
    for image in images:
        post(app, question(image))
    assert metric(app, "flex_view_cache_entries") == 2 and metric(app, "flex_view_cache_evictions_total") == 1
    assert metric(app, "flex_view_cache_bytes") <= 2 * of_one(engine) + 100_000
    visions.clear()
    post(app, question(images[1]))
    assert not visions
    post(app, question(images[0]))  # in the place of images[2], the oldest now
    post(app, question(images[1]))
    runs = len(visions)
    post(app, question(images[2]))
    assert runs > 0 and len(visions) == 2 * runs


def test_what_slots_put_aside_of_an_image_counts(chat_bundle):
    """Also when that happens after the last question about it: another image took its row."""
    with Engine(chat_bundle, threads=1, slots=2) as engine:
        served = app(engine, Settings())
        for shift in range(4):
            assert post(served, question(data_url(png(np.roll(PHOTO, shift, 0))))).status == 200
        views = [entry.view for entry in served.state.service.worker._views._kept.values()]
        assert sum(engine._batch.kept_bytes(view._encoded) > 0 for view in views) == 3  # all came to the first row
        bytes = sum(view.nbytes + PHOTO.shape[0] * PHOTO.shape[1] * 4 for view in views)
        assert metric(served, "flex_view_cache_bytes") == bytes
        served.state.service.worker.drain(0.0)


def test_a_question_that_is_refused_costs_no_image(made, visions):
    app = made()
    refused = question(IMAGE, max_tokens=5000), question(IMAGE, flex={"page_budget": 10_000})
    assert [post(app, each).status for each in refused] == [400, 400]
    assert metric(app, "flex_view_cache_entries") == 0  # it was never encoded
    post(app, question(IMAGE))
    visions.clear()
    assert [post(app, each).status for each in refused] == [400, 400]
    assert post(app, question(IMAGE)).status == 200
    assert not visions and metric(app, "flex_view_cache_entries") == 1


def test_an_image_that_is_too_large_to_keep(made, engine, visions):
    app = made(view_bytes=of_one(engine) - 1)
    visions.clear()
    closed = []
    app.state.service.worker._views._engine = Recording(engine, closed)
    assert post(app, question(IMAGE)).status == 200
    runs = len(visions)
    assert metric(app, "flex_view_cache_entries") == 0 == metric(app, "flex_view_cache_bytes")
    assert len(closed) == 1 and closed[0].nbytes == 0
    assert post(app, question(IMAGE)).status == 200 and len(visions) == 2 * runs


class Recording:
    """An engine that remembers the views it made."""

    def __init__(self, engine: Engine, made: list) -> None:
        self._engine, self._made = engine, made

    def image(self, image):
        self._made.append(self._engine.image(image))
        return self._made[-1]


def test_many_requests_take_one_thread(made):
    """Each thread that decodes images keeps memory of its own: with 40 of them it grew by 20 MB in 120 requests."""
    app = made()

    async def crowd() -> set[str]:
        replies = await asyncio.gather(*(post_request(app, question(IMAGE, max_tokens=1)) for _ in range(20)))
        assert [reply.status for reply in replies] == [200] * 20
        return {thread.name for thread in threading.enumerate()}

    before = {thread.name for thread in threading.enumerate()}
    assert len([name for name in asyncio.run(crowd()) - before if "flexattention-serve" not in name]) == 0


def test_a_failure_of_the_engine(made, monkeypatch, caplog):
    """It is told without its message, which may hold what somebody asked; the next request is answered."""
    app = made()

    def failing(self, tiles):
        raise ValueError(QUESTION)

    with monkeypatch.context() as patched:
        patched.setattr(OrtModel, "vision", failing)
        reply = post(app, question(IMAGE))
    assert reply.status == 500 and reply.error["code"] == "internal_error" and QUESTION not in reply.body.decode()
    assert "ValueError" in caplog.text and QUESTION not in caplog.text
    assert metric(app, "flex_view_cache_entries") == 0
    assert post(app, question(IMAGE)).status == 200 and metric(app, "flex_view_cache_entries") == 1
    with monkeypatch.context() as patched:
        patched.setattr(OrtModel, "vision", lambda self, tiles: (_ for _ in ()).throw(MemoryError()))
        assert post(app, question(IMAGE_2)).error["code"] == "out_of_memory"
    assert metric(app, "flex_view_cache_entries") == 0, "what was kept may be what is missing"


def test_what_is_counted(made, engine):
    app = made()
    stats = engine.generate(PHOTO, QUESTION, max_new_tokens=12).stats
    post(app, question(IMAGE))
    post(app, question(IMAGE, stream=True))
    assert metric(app, "flex_answer_tokens_total") == 24
    assert metric(app, "flex_prompt_tokens_total") == 2 * stats.prompt_tokens
    assert metric(app, "flex_reused_tokens_total") == stats.prompt_tokens - 1
    assert metric(app, "flex_pages_read_total") == 2 * stats.pages_read.sum() > 0
    assert metric(app, "flex_first_token_seconds_count") == metric(app, "flex_tokens_per_second_count") == 2
    assert metric(app, "process_resident_memory_bytes") > 10e6
    get(app, "/page/page.css")
    get(app, "/page/")
    text = get(app, "/metrics").body.decode()
    assert 'flex_requests_total{path="/page/*",status="200"} 1.0' in text
    assert 'flex_requests_total{path="/page/*",status="404"} 1.0' in text
    assert 'flex_requests_total{path="/v1/chat/completions",status="200"} 2.0' in text
    assert 'flex_answers_total{end="length"} 2.0' in text
