"""The app in somebody else's app, below a prefix, and twice in one process."""

from __future__ import annotations

import asyncio
import json
import os
import shutil

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from runtime import Engine, TokenizerError
from runtime.serve import Settings, app
from tests.engines.manifests import edit
from tests.runtime.questions import PHOTO
from tests.runtime.serve.asgi import JSON, data_url, get, png, post, send_request, user

ASKED = {"model": "serve-fp32", "messages": [user("hello", data_url(png(PHOTO)))], "max_tokens": 3}


def test_below_a_prefix_with_its_own_end(engine):
    """The outer app's lifespan ends the inner one's thread; the paths are the same behind the prefix."""
    inner = app(engine, Settings(hosts=("*",)))
    outer = Starlette(routes=[Mount("/vision", inner)], lifespan=inner.router.lifespan_context)

    async def use() -> None:
        async with outer.router.lifespan_context(outer):
            body = json.dumps(ASKED).encode()
            reply = await send_request(outer, "POST", "/vision/v1/chat/completions", body, JSON)
            assert reply.status == 200 and reply.json["usage"]["completion_tokens"] == 3
            for path in ("/vision/v1/models", "/vision/", "/vision/page/main.js", "/vision/health/ready"):
                assert (await send_request(outer, "GET", path)).status == 200, path
            examples = (await send_request(outer, "GET", "/vision/flex/examples")).json
            image = examples[0]["image"]
            assert (await send_request(outer, "GET", f"/vision{image}")).headers["content-type"] == "image/png"
            metrics = (await send_request(outer, "GET", "/vision/metrics")).body.decode()
            assert 'path="/v1/chat/completions",status="200"} 1.0' in metrics, "counted without the prefix"
            assert (await send_request(outer, "GET", "/health")).status == 404
        refused = await send_request(outer, "POST", "/vision/v1/chat/completions", body, JSON)
        assert refused.status == 503

    asyncio.run(use())
    assert not inner.state.service.worker._threads._threads or all(
        not thread.is_alive() for thread in inner.state.service.worker._threads._threads
    )


def test_two_in_one_process(made):
    """Each counts its own requests."""
    first, second = made(), made()
    post(first, ASKED)
    count = 'flex_answers_total{end="length"} 1.0'
    assert count in get(first, "/metrics").body.decode() and count not in get(second, "/metrics").body.decode()


def test_a_closed_engine_is_not_ready(chat_bundle):
    with Engine(chat_bundle) as engine:
        served = app(engine)
        assert get(served, "/health/ready").status == 200
    assert get(served, "/health/ready").status == 503 and get(served, "/v1/models").status == 200
    reply = post(served, ASKED)
    assert reply.status == 503 and reply.error["code"] == "engine_unavailable"
    worker = served.state.service.worker
    worker.require_ready = lambda: None  # closed while the question waited: not the question's fault either
    reply = post(served, ASKED)
    assert reply.status == 503 and reply.error["code"] == "engine_unavailable"
    worker.drain(1.0)


def test_what_is_wrong_with_the_bundle_is_for_who_runs_the_server(chat_bundle, tmp_path, caplog):
    """It names paths of the machine, and /health/ready asks nobody for a key."""
    bundle = shutil.copytree(chat_bundle, tmp_path / "serve-fp32")
    with Engine(bundle) as engine:
        served = app(engine)
        for file in bundle.glob("*.weights"):
            os.utime(file, ns=(1, 1))
        for reply in (get(served, "/health/ready"), post(served, ASKED)):
            assert reply.status == 503 and reply.error["code"] == "engine_unavailable"
            assert str(tmp_path) not in reply.body.decode()
        served.state.service.worker.drain(1.0)
    assert str(tmp_path) in caplog.text and "was written to" in caplog.text


def test_a_bundle_without_a_tokenizer(chat_bundle, tmp_path):
    bundle = shutil.copytree(chat_bundle, tmp_path / "bundle")
    edit(bundle, lambda manifest: manifest["prompt"].update(tokenizer=None))
    with Engine(bundle) as engine, pytest.raises(TokenizerError, match="no tokenizer"):
        app(engine)
