"""Whatever a request holds is obeyed or refused by its name; what asks for nothing is let pass."""

from __future__ import annotations

import json

import pytest

from runtime.serve.errors import ApiError
from runtime.serve.schema import Asked, read
from runtime.serve.settings import Settings
from tests.runtime.serve.asgi import user

ASKED = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
TOOL = {"type": "function", "function": {"name": "f"}}


def parsed(given: object, **settings: object) -> Asked:
    return read(json.dumps(given).encode(), Settings(**settings))


def refused(given: object, **settings: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parsed(given, **settings)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("tools", [TOOL]),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function"}),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("n", 2),
        ("n", True),
        ("n", 0),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1),
        ("logit_bias", {"50": 1}),
        ("audio", {"voice": "x"}),
        ("modalities", ["text", "audio"]),
        ("prediction", {"type": "content"}),
        ("store", True),
        ("metadata", {"a": "b"}),
        ("service_tier", "priority"),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("web_search_options", {}),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(option, value):
    error = refused({**ASKED, option: value})
    assert error.param == option and error.code == "unsupported_option" and option in error.message and error.fix


def test_what_asks_for_nothing_is_let_pass():
    off = {
        "tools": [], "tool_choice": "auto", "functions": [], "function_call": "none", "logprobs": False,
        "top_logprobs": 0, "n": 1, "response_format": {"type": "text"}, "frequency_penalty": 0, "presence_penalty": 0.0,
        "logit_bias": {}, "modalities": ["text"], "store": False, "metadata": {}, "service_tier": "auto",
        "parallel_tool_calls": True, "user": "u-1", "safety_identifier": "s", "prompt_cache_key": "k",
    }  # fmt: skip
    assert parsed({**ASKED, **off}) == parsed(ASKED)
    names = [*off, "audio", "prediction", "web_search_options", "verbosity", "reasoning_effort", "max_tokens", "flex"]
    names += ["temperature", "top_p", "seed", "stop", "stream", "stream_options", "max_completion_tokens"]
    assert parsed({**ASKED, **dict.fromkeys(names)}) == parsed(ASKED)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"top_k": 5}, "top_k"),
        ({"Temperature": 1}, "Temperature"),
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "messages[0].name"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].image_url"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:"}]}]},
            "messages[0].content[0].image_url",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].image_url.url",
        ),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"seed": "x"}, "seed"),
        ({"stop": [1]}, "stop[0]"),
        ({"stream": "yes"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"flex": {"selections": True}}, "flex.selections"),
        ({"flex": {"page_budget": -1}}, "flex.page_budget"),
        ({"flex": {"page_budget": True}}, "flex.page_budget"),
        ({"flex": []}, "flex"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(change, param):
    error = refused({**ASKED, **change})
    assert (error.param or "").startswith(param), error.message
    assert error.message.startswith(error.param)


def test_one_image_in_a_message_of_the_users():
    image = user("x", "data:,")["content"]
    for messages, param in [
        ([user("x", "data:,"), {"role": "assistant", "content": "y"}, user("z", "data:,")], "messages[2].content[1]"),
        ([{"role": "user", "content": image + image}], "messages[0].content[3]"),
        ([{"role": "system", "content": image}, user("x")], "messages[0].content[1]"),
    ]:
        assert refused({**ASKED, "messages": messages}).param.startswith(param)
    asked = parsed({**ASKED, "messages": [user("x"), {"role": "assistant", "content": " y "}, user("z", "data:,")]})
    assert asked.image.url == "data:," and asked.image.param == "messages[2].content[1].image_url.url"
    assert [message["content"] for message in asked.messages] == ["x", "y", "z"]


def test_a_detail_that_is_low_and_pages():
    messages = [user("x", "data:,")]
    messages[0]["content"][1]["image_url"]["detail"] = "low"
    assert parsed({**ASKED, "messages": messages}).options["page_budget"] == 0
    assert parsed({**ASKED, "messages": messages, "flex": {"page_budget": 0}}).options["page_budget"] == 0
    assert refused({**ASKED, "messages": messages, "flex": {"page_budget": 2}}).param == "flex.page_budget"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b'"x"', b"5", b"NaN", b'{"model": NaN}', b"\xff\xfe", b"[" * 100_000,
        b'{"a":1,"a":2}',
        b'{"model": 1e999}', b'{"model": "m", "messages": [' + b"{}," * 100_000 + b"{}]}",
        b"{" + b",".join(b'"%d": 1' % index for index in range(100_000)) + b"}",
    ],
)  # fmt: skip
def test_bodies_that_are_no_request(body):
    with pytest.raises(ApiError) as caught:
        read(body, Settings())
    assert caught.value.status == 400 and len(caught.value.message) < 400


def test_limits_of_a_conversation():
    turns = [user("hello"), {"role": "assistant", "content": "hello"}] * 2
    assert len(parsed({**ASKED, "messages": turns}, messages=4, characters=20).messages) == 4
    assert refused({**ASKED, "messages": turns}, messages=3).code == "too_many_messages"
    assert refused({**ASKED, "messages": turns}, characters=19).code == "prompt_too_long"


def test_what_a_response_cannot_hold():
    """Half a character in a name: the error can still be sent."""
    error = refused({**ASKED, "a\ud800": 1})
    assert json.loads(error.response().body)["error"]["param"] == "a\\ud800" == error.param
