"""The official client, as most people will use the server."""

from __future__ import annotations

import asyncio

import openai
import pytest

from tests.paths import ROOT
from tests.runtime.questions import PHOTO, QUESTION
from tests.runtime.serve.asgi import data_url, png, user

KEY = "a-key-of-24-characters-x"
POSTER = "what numbers are in the red star and the cyan circle?"


@pytest.fixture(scope="module")
def url(serve, default_bundle) -> str:
    return serve(default_bundle("fp16"), "--media", ROOT / "examples", FLEX_API_KEY=KEY) + "/v1"


@pytest.fixture(scope="module")
def client(url) -> openai.OpenAI:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def model(client) -> str:
    (only,) = client.models.list()
    return only.id


@pytest.fixture(scope="module")
def poster() -> str:
    return data_url((ROOT / "examples/poster.png").read_bytes())


def test_a_question_about_an_image(client, model, poster):
    answer = client.chat.completions.create(model=model, messages=[user(POSTER, poster)], max_tokens=20, seed=1)
    assert answer.choices[0].message.content == "30 and 98" and answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == answer.usage.total_tokens
    again = client.chat.completions.create(model=model, messages=[user(POSTER, "media:poster.png")], temperature=0)
    assert again.choices[0].message.content == "30 and 98"
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1


def test_a_stream(client, model, poster):
    stream = client.chat.completions.create(
        model=model, messages=[user(POSTER, poster)], stream=True, stream_options={"include_usage": True},
        extra_body={"flex": {"selection": True}},
    )  # fmt: skip
    *chunks, usage = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "30 and 98"
    assert chunks[0].flex["grid"] == 9 and usage.usage.completion_tokens == sum(
        "token" in (chunk.flex or {}) for chunk in chunks if hasattr(chunk, "flex")
    )
    assert chunks[-1].flex["stats"]["page_bytes"] > 0
    with client.chat.completions.stream(model=model, messages=[user(POSTER, poster)]) as helper:
        assert helper.get_final_completion().choices[0].message.content == "30 and 98"


def test_many_at_a_time(url, model, poster):
    """The asynchronous client: each gets its own answer."""

    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:

            async def one(index: int) -> None:
                text, expected = [(POSTER, "30 and 98"), ("what number is in the red star?", "30")][index % 2]
                stream = await client.chat.completions.create(
                    model=model, messages=[user(text, poster)], stream=bool(index % 3)
                )
                if index % 3:
                    found = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
                else:
                    found = stream.choices[0].message.content
                assert found == expected

            await asyncio.gather(*map(one, range(12)))

    asyncio.run(ask())


def test_errors_are_the_clients_own(client, url, model, poster):
    ask = lambda **more: client.chat.completions.create(  # noqa: E731
        **{"model": model, "messages": [user("hello")], **more}
    )
    with pytest.raises(openai.BadRequestError) as caught:
        ask(n=2)
    assert caught.value.param == "n" and caught.value.code == "unsupported_option" and caught.value.body["fix"]
    with pytest.raises(openai.BadRequestError) as caught:
        ask(tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
    assert caught.value.param == "tools"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(messages=[user("hello", "https://example.org/a.png")])
    assert caught.value.code == "invalid_image_url"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(max_tokens=10_000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        ask(model="gpt-4o")
    with pytest.raises(openai.UnprocessableEntityError):
        ask(messages=[user("hello", data_url(b"no image"))])
    with (
        pytest.raises(openai.AuthenticationError),
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as other,
    ):
        other.models.list()


def test_several_turns(serve, chat_bundle):
    url = serve(chat_bundle)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none is asked for", max_retries=0) as client:
        messages = [user(QUESTION, data_url(png(PHOTO)))]
        for turn in range(3):
            answer = client.chat.completions.create(model="serve-fp32", messages=messages, max_tokens=8)
            assert (answer.usage.prompt_tokens_details.cached_tokens > 0) == (turn > 0)
            messages += [answer.choices[0].message, user("and then?")]
