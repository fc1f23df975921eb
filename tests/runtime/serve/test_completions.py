"""A chat completion is the engine's answer, whole and streamed, in OpenAI's words."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.runtime.questions import PHOTO, QUESTION
from tests.runtime.serve.asgi import data_url, get, png, post, user

IMAGE = data_url(png(PHOTO))
NAME = "serve-fp32"


def question(text: str = QUESTION, image: str | None = IMAGE, **options: object) -> dict:
    return {"model": NAME, "messages": [user(text, image)], "max_tokens": 12, **options}


@pytest.fixture
def served(made):
    return made()


@pytest.mark.parametrize("image", [PHOTO, None], ids=["image", "text"])
def test_an_answer_is_the_engines(engine, served, image):
    expected = engine.generate(image, QUESTION, max_new_tokens=12)
    reply = post(served, question(image=None if image is None else IMAGE))
    assert reply.status == 200 and reply.headers["content-type"] == "application/json"
    content = reply.json
    assert content["object"] == "chat.completion" and content["id"].startswith("chatcmpl-")
    assert content["model"] == NAME and content["system_fingerprint"] == f"fp_{engine.digest[7:23]}"
    assert "flex" not in content
    (choice,) = content["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text.lstrip(), "refusal": None}
    assert choice["finish_reason"] == expected.finish_reason == "length"
    assert content["usage"] == {
        "prompt_tokens": expected.stats.prompt_tokens,
        "completion_tokens": len(expected.token_ids),
        "total_tokens": expected.stats.prompt_tokens + len(expected.token_ids),
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_a_stream_is_the_same_answer(served):
    whole = post(served, question()).json
    reply = post(served, question(stream=True, stream_options={"include_usage": True}))
    assert reply.status == 200 and reply.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = reply.chunks
    assert done == "[DONE]" and reply.complete
    assert reply.text == whole["choices"][0]["message"]["content"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert {chunk["id"] for chunk in [*chunks, usage]} == {chunks[0]["id"]} != {whole["id"]}
    assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    cached = usage["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == usage["usage"]["prompt_tokens"] - 1, "the same question again"
    assert "usage" not in post(served, question(stream=True)).chunks[0]


def test_every_token_says_what_it_read(engine, served):
    expected = engine.generate(PHOTO, QUESTION, max_new_tokens=12, trace=True, page_budget=3)
    flex = {"selection": True, "page_budget": 3}
    first, *tokens, last, _ = post(served, question(stream=True, flex=flex)).chunks
    geometry = engine.geometry
    layers = list(geometry.reading_layers)
    height, width = PHOTO.shape[:2]
    assert first["flex"] == {"grid": geometry.cells, "layers": layers, "image": {"width": width, "height": height}}
    tokens = [chunk for chunk in tokens if "token" in chunk.get("flex", {})]
    assert [chunk["flex"]["token"] for chunk in tokens] == expected.token_ids
    for chunk, cells in zip(tokens, expected.trace.cells, strict=True):
        assert len(chunk["flex"]["cells"]) == len(layers)
        assert chunk["flex"]["cells"] == [np.flatnonzero(layer).tolist() for layer in cells[:-1]]
    assert any(cells for chunk in tokens for cells in chunk["flex"]["cells"])

    whole = post(served, question(flex=flex)).json["flex"]
    assert [{"token": each["token"], "cells": each["cells"]} for each in whole["tokens"]] == [
        chunk["flex"] for chunk in tokens
    ]
    assert "".join(each["text"] for each in whole["tokens"]) == expected.text.lstrip()
    assert {name: whole[name] for name in first["flex"]} == first["flex"]
    stats = last["flex"]["stats"]
    read = expected.stats.pages_read
    page = 2 * geometry.kv_heads * geometry.head_dim * 4 * 36  # keys and values in float32, 36 tokens
    assert stats["pages_read"] == pytest.approx(read.mean(), abs=1e-3) and stats["page_bytes"] == read.sum() * page
    assert stats["view_cached"] is False and stats["reused_tokens"] == 0 and stats["vision_ms"] > 0
    assert stats["first_token_ms"] > 0 and stats["tokens_per_second"] > 0
    assert whole["stats"]["view_cached"] is True and whole["stats"]["vision_ms"] == 0


def test_figures_alone(served):
    """ "flex" without the selection: nothing but the last chunk is another."""
    first, *_, last, _ = post(served, question(stream=True, flex={})).chunks
    assert "flex" not in first and set(last["flex"]) == {"stats"}
    assert set(post(served, question(flex={"selection": False})).json["flex"]) == {"stats"}


def test_a_conversation_with_its_image(engine, served):
    chat = engine.chat(PHOTO)
    texts = [QUESTION, "and where?", "is it red?"]
    messages = []
    for index, text in enumerate(texts):
        expected = chat.ask(text, max_new_tokens=12)
        messages.append(user(text, IMAGE if index == 0 else None))
        content = post(served, {"model": NAME, "messages": messages, "max_tokens": 12}).json
        assert content["choices"][0]["message"]["content"] == expected.text.lstrip()
        assert content["usage"]["prompt_tokens"] == expected.stats.prompt_tokens
        assert content["usage"]["prompt_tokens_details"]["cached_tokens"] == expected.stats.reused_tokens
        messages.append(content["choices"][0]["message"])  # as clients hand it back, "refusal" and all


def test_a_conversation_that_is_too_long(served):
    """The error says how many turns fit, and they do."""
    messages = []
    for _ in range(20):
        messages += [user(QUESTION), {"role": "assistant", "content": "two squares and a circle"}]
    asked = {"model": NAME, "messages": [*messages, user(QUESTION)], "max_tokens": 12}
    error = post(served, asked)
    assert error.status == 400 and error.error["code"] == "context_length_exceeded"
    turns = int(re.search(r"send only the last (\d+) turns", error.error["fix"])[1])
    assert 0 < turns < 20
    assert post(served, asked | {"messages": asked["messages"][-2 * turns - 1 :]}).status == 200
    assert post(served, asked | {"messages": asked["messages"][-2 * turns - 3 :]}).status == 400


def test_a_system_message(engine, served):
    said = [{"role": "system", "content": "be brief"}, user(QUESTION)]
    expected = engine.generate(None, said, max_new_tokens=12).text
    assert expected != engine.generate(None, QUESTION, max_new_tokens=12).text, "it changes the answer"
    for role in ("system", "developer"):
        asked = question() | {"messages": [{"role": role, "content": "be brief"}, user(QUESTION)]}
        assert post(served, asked).json["choices"][0]["message"]["content"] == expected.lstrip()


def test_texts_of_one_message_are_lines_of_it(engine, served):
    parts = [{"type": "text", "text": "what number"}, {"type": "text", "text": "is it?"}]
    content = post(served, question() | {"messages": [{"role": "user", "content": parts}]}).json
    expected = engine.generate(None, "what number\nis it?", max_new_tokens=12).text
    assert content["choices"][0]["message"]["content"] == expected.lstrip()


def test_sampling_is_the_engines(engine, served):
    options = {"temperature": 0.9, "top_p": 0.8, "seed": 7}
    expected = engine.generate(PHOTO, QUESTION, max_new_tokens=12, **options).text
    assert post(served, question(**options)).json["choices"][0]["message"]["content"] == expected.lstrip()
    greedy = post(served, question()).json["choices"][0]["message"]["content"]
    assert greedy != expected.lstrip()
    for seeded in ({"seed": 7}, {"seed": 7, "temperature": 0}, {"seed": -1, "temperature": 0.0}):
        assert post(served, question(**seeded)).json["choices"][0]["message"]["content"] == greedy


def test_a_stop_string_ends_the_answer(engine, served):
    text = engine.generate(PHOTO, QUESTION, max_new_tokens=12).text
    stop = text.strip()[3:5]
    expected = engine.generate(PHOTO, QUESTION, max_new_tokens=12, stop=stop)
    assert expected.finish_reason == "stop"
    for given in (stop, [stop], ["never", stop]):
        for stream in (False, True):
            reply = post(served, question(stop=given, stream=stream))
            shown = reply.text if stream else reply.json["choices"][0]["message"]["content"]
            last = reply.chunks[-2] if stream else reply.json
            assert shown == expected.text.lstrip() and last["choices"][0]["finish_reason"] == "stop"


def test_how_long_an_answer_is(engine, made):
    """As long as was asked for, or as the settings say, or as the context has room for; never more than fits."""
    asked = {"model": NAME, "messages": [user("hello")]}
    prompt = engine.generate(None, "hello", max_new_tokens=1).stats.prompt_tokens
    served = made(max_tokens=5)
    count = lambda app, **more: post(app, asked | more).json["usage"]["completion_tokens"]  # noqa: E731
    assert count(served) == 5
    assert count(served, max_tokens=7) == count(served, max_completion_tokens=7) == 7
    assert count(served, max_tokens=7, max_completion_tokens=7) == 7
    room = engine.geometry.context - prompt + 1
    assert engine.generate(None, "hello", max_new_tokens=room).finish_reason == "length", "it does not end by itself"
    assert count(made(max_tokens=10_000)) == room
    error = post(served, asked | {"max_tokens": room + 1})
    assert error.status == 400 and error.error["code"] == "context_length_exceeded"
    assert error.error["fix"] == f"max_tokens={room}"
    assert post(served, asked | {"max_tokens": room}).status == 200, "the fix works"


def test_low_detail_reads_no_pages(engine, served):
    expected = engine.generate(PHOTO, QUESTION, max_new_tokens=12, page_budget=0)
    asked = question(flex={"selection": True})
    asked["messages"][0]["content"][1]["image_url"]["detail"] = "low"
    content = post(served, asked).json
    assert content["choices"][0]["message"]["content"] == expected.text.lstrip()
    assert content["flex"]["stats"]["pages_read"] == 0
    assert not any(cells for token in content["flex"]["tokens"] for cells in token["cells"])


def test_the_model_says_what_it_can(engine, served):
    (model,) = get(served, "/v1/models").json["data"]
    assert model["id"] == NAME and model["object"] == "model"
    assert get(served, f"/v1/models/{NAME}").json == model
    assert get(served, "/v1/models/other").status == 404
    geometry = engine.geometry
    assert model["flex"] == {
        "grid": geometry.cells,
        "pages": geometry.pages,
        "page_budget": engine.manifest.page_budget,
        "layers": list(geometry.reading_layers),
        "conversation": True,
        "system": True,
        "context": geometry.context,
        "max_tokens": 256,
        "precision": "fp32",
        "backend": "onnxruntime",
        "device": "cpu",
        "scenes": False,
    }
