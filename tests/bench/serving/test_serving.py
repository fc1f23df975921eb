"""A short share of the load, and what the bench itself must not let pass. How long anything takes is not judged."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from runtime import Engine
from tests.bench.serving import __main__ as serve
from tests.bench.serving.clients import Address, Reply, disconnect, half_requests, load, questions, too_many
from tests.runtime.serve.command import serving


@pytest.fixture(scope="module")
def asked(default_bundle):
    with Engine(default_bundle("fp16"), threads=1) as engine:
        found = questions(engine, 2)
    assert sum(each.text == each.right for each in found) > len(found) / 2  # they can be answered
    return found


def test_many_clients_rude_ones_among_them(default_bundle, asked, tmp_path):
    """Every answer is the engine's, its tokens in order; nothing is left of those that went away."""
    options = "--threads", "1", "--queue", "8"
    with serving(default_bundle("fp16"), *options, log=tmp_path / "log") as running:
        server = serve.Watched(Address.of(running.url), running.process.pid)
        fresh = server.resources()
        for _ in range(20):  # the server may be faster than its clients, once or twice
            replies = asyncio.run(too_many(server.address, asked, 24))
            if any(reply.status == 429 for reply in replies):
                break
        serve.refused(replies)
        asyncio.run(load(server.address, asked, 2, len(asked)))
        before, counted = server.settled(fresh.files), server.metrics()
        with half_requests(server.address, asked, 6):
            replies, _ = asyncio.run(load(server.address, asked, 8, 40))
        assert len(replies) == 40
        asyncio.run(disconnect(server.address, asked, 8))
        serve.require_no_leak(before, server.settled(before.files))
        replies, _ = asyncio.run(load(server.address, asked, 4, len(asked)))
        server.settled(before.files)
        counts = server.metrics()
        assert len(replies) == len(asked) and counts["flex_view_cache_misses_total"] == 2
        answered = sum(
            counts[name] - counted.get(name, 0.0) for name in counts if name.startswith("flex_answers_total")
        )
        assert answered >= 40 + len(asked) and counts["flex_queue_depth"] == counts["flex_running"] == 0
        assert running.end() == 0


def test_overhead_is_of_both_sides(default_bundle, asked, tmp_path):
    with (
        Engine(default_bundle("fp16"), threads=1) as engine,
        serving(default_bundle("fp16"), "--threads", "1", log=tmp_path / "log") as running,
    ):
        server = serve.Watched(Address.of(running.url), running.process.pid)
        for options in ({}, {"image": False}, {"flex": {"selection": True}}):
            found = serve.overhead(server, engine, asked[:2], 2, **options)
            assert abs(found.answer) > abs(found.token) and str(found).count("ms") == 2
        assert server.metrics()['flex_answers_total{end="stop"}'] >= 12


def test_a_wrong_reply_is_found(asked):
    """Text, order, number and names of the chunks, their end, and the count of the tokens."""
    one = next(each for each in asked if len(set(each.tokens)) > 2)

    def chunk(content: str | None = None, end: str | None = None, **more: object) -> dict:
        delta = {"role": "assistant", "content": ""} if content is None and end is None else {"content": content}
        return {"id": "x", "choices": [{"delta": delta, "finish_reason": end}], **more}

    tokens = [chunk("", flex={"token": token, "cells": []}) for token in one.tokens]
    usage = {"id": "x", "choices": [], "usage": {"completion_tokens": len(tokens)}}
    right = [chunk(), *tokens, chunk(one.text), chunk("", "stop"), usage]
    assert Reply(200, chunks=right, done=True).wrong(one) is None
    swapped = [right[0], tokens[1], tokens[0], *right[3:]]
    for name, chunks in {
        "text": [each for each in right if each is not right[-3]],
        "tokens": swapped,
        "ids": [*right[:-1], {**usage, "id": "y"}],
        "role": right[1:],
        "end": [*right[:-2], chunk("", "length"), usage],
        "usage": [*right[:-1], {**usage, "usage": {"completion_tokens": 0}}],
    }.items():
        assert str(Reply(200, chunks=chunks, done=True).wrong(one)).startswith(f"{name}:"), name
    assert Reply(200, chunks=right).wrong(one) and Reply(429, done=True).wrong(one)
    assert Reply(200, chunks=right, done=True).wrong(replace(one, text="another"))


def test_leaks_are_found():
    held = serve.Resources(memory=1, threads=5, files=11)
    serve.require_no_leak(held, replace(held, threads=5 + serve.POOL))
    for more in ({"files": 12}, {"threads": 6 + serve.POOL}):
        with pytest.raises(AssertionError):
            serve.require_no_leak(held, replace(held, **more))
    for statuses in ((200, 200), (429,), (200, 429, 500)):
        with pytest.raises(AssertionError):
            serve.refused([Reply(status) for status in statuses])
