"""Conversations with an engine: each turn is what a fresh request would be, and costs what is new."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime import ContextError, Engine, OptionError, PromptError
from tests.runtime.questions import OPTIONS, OTHER, PHOTO, TALKATIVE, same

QUESTIONS = ["what number is in the red square?", "and where?", "is it a chat between a human and a square?"]


@pytest.fixture(scope="module")
def bundle(random_model) -> Path:
    return random_model("chat", TALKATIVE, tokenizer=True)[1]


@pytest.fixture(scope="module")
def engine(bundle) -> Engine:
    return Engine(bundle)


def said(chat, question: str) -> list[dict[str, str]]:
    return [*chat.messages, {"role": "user", "content": question}]


@pytest.mark.parametrize("image", [PHOTO, None], ids=["image", "text"])
def test_every_turn_is_a_fresh_request_with_the_same_text(bundle, engine, image):
    chat = engine.chat(image)
    length = 0
    for turn, question in enumerate(QUESTIONS):
        messages = said(chat, question)
        answer = chat.ask(question, **OPTIONS)
        fresh = Engine(bundle).generate(image, messages, **OPTIONS)  # no cache, no pages of before
        assert same(answer, fresh)
        assert np.abs(answer.trace.logits - fresh.trace.logits).max() == 0, "the runs of a prefill are the same"
        # Up to the last question's end, but for its last token, which read pages; its answer is prefilled again.
        assert answer.stats.reused_tokens == (length - 1 if turn else 0)
        length = answer.stats.prompt_tokens
        assert chat.messages[-2:] == [messages[-1], {"role": "assistant", "content": answer.text.strip()}]
    assert len(chat.messages) == 2 * len(QUESTIONS)
    assert answer.stats.vision_ms == answer.stats.projection_ms == 0


def test_the_text_is_the_official_one(engine):
    """As a user of the official scripts writes it: the whole conversation by hand."""
    chat = engine.chat(PHOTO)
    first = chat.ask(QUESTIONS[0], **OPTIONS).text.strip()
    second = chat.ask(QUESTIONS[1], **OPTIONS)
    by_hand = f"{QUESTIONS[0]} ASSISTANT: {first}</s>USER: {QUESTIONS[1]}"
    assert "</s>" not in first and "<" not in first
    assert same(second, engine.generate(PHOTO, by_hand, special_tokens=True, **OPTIONS))


def test_a_conversation_that_comes_whole_reuses_what_the_view_holds(engine):
    """What a server is sent: all messages, every time."""
    with engine.image(PHOTO) as view:
        messages = [{"role": "user", "content": QUESTIONS[0]}]
        first = view.ask(messages, **OPTIONS)
        messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": QUESTIONS[1]}]
        second = view.ask(messages, **OPTIONS)
        assert second.stats.reused_tokens == first.stats.prompt_tokens - 1
        other = view.ask([{"role": "user", "content": QUESTIONS[2]}], **OPTIONS)
        assert 0 < other.stats.reused_tokens < first.stats.reused_tokens + TALKATIVE.image_tokens + 40, "the image's"
        assert same(other, engine.generate(PHOTO, QUESTIONS[2], **OPTIONS))
        assert same(view.ask(messages, **OPTIONS), second), "what another question left is forgotten"


def test_a_conversation_goes_on_from_messages(engine):
    chat = engine.chat(PHOTO)
    for question in QUESTIONS[:2]:
        chat.ask(question, **OPTIONS)
    again = engine.chat(PHOTO, chat.messages)
    assert again.messages == chat.messages
    assert same(again.ask(QUESTIONS[2], **OPTIONS), chat.ask(QUESTIONS[2], **OPTIONS))
    with pytest.raises(PromptError, match="an answer to each question"):
        engine.chat(PHOTO, chat.messages[:-1])


def test_only_answers_that_were_read_to_their_end_count(engine):
    chat = engine.chat(PHOTO)
    stream = chat.stream(QUESTIONS[0], **OPTIONS)
    assert chat.messages == []
    next(stream.steps())
    stream.close()
    assert chat.messages == []
    stream = chat.stream(QUESTIONS[1], **OPTIONS)
    assert "".join(stream) and chat.messages[0]["content"] == QUESTIONS[1]
    dropped = chat.stream(QUESTIONS[2], **OPTIONS)
    next(dropped.steps())
    answer = chat.ask(QUESTIONS[2], **OPTIONS)  # while another has its cache
    assert [message["content"] for message in chat.messages[2:]] == [QUESTIONS[2], answer.text.strip()]
    dropped.answer()
    assert len(chat.messages) == 4


def test_a_conversation_that_is_too_long_says_how_many_turns_fit(engine):
    chat, question = engine.chat(PHOTO), "what number is in the red square? " * 3
    with pytest.raises(ContextError, match="a conversation of") as caught:
        for _ in range(100):
            chat.ask(question, **OPTIONS)
    error, before = caught.value, chat.messages
    turns = len(before) // 2
    assert 0 < error.turns < turns and f"chat.keep({error.turns})" in error.fix
    assert f"at most {TALKATIVE.context} tokens together: with {error.turns} earlier turns it fits" in str(error)
    chat.keep(error.turns + 1)
    with pytest.raises(ContextError):
        chat.ask(question, **OPTIONS)
    chat.keep(error.turns)
    assert chat.messages == before[-2 * error.turns :]
    messages = said(chat, question)
    assert same(chat.ask(question, **OPTIONS), engine.generate(PHOTO, messages, **OPTIONS))
    with pytest.raises(ContextError) as caught:
        chat.ask("x" * 1000, **OPTIONS)  # alone, too
    assert caught.value.turns is None and "chat.keep" not in caught.value.fix
    with pytest.raises(OptionError, match=r"turns=-1"):
        chat.keep(-1)
    chat.keep(0)
    assert chat.messages == []


def test_more_text_than_the_context_has_letters_for(engine):
    """Known before it is made tokens; how many turns fit is told all the same, and is right."""
    turn = [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": "x" * 100}]
    messages, question = turn * 1000, {"role": "user", "content": QUESTIONS[1]}
    with pytest.raises(ContextError, match=r"a prompt of \d+ characters") as caught:
        engine.generate(PHOTO, [*messages, question], **OPTIONS)
    kept = caught.value.turns
    assert kept > 0 and f"chat.keep({kept})" in caught.value.fix
    assert engine.generate(PHOTO, [*messages[-2 * kept :], question], **OPTIONS).token_ids
    with pytest.raises(ContextError, match="tokens"):
        engine.generate(PHOTO, [*messages[-2 * kept - 2 :], question], **OPTIONS)
    with pytest.raises(ContextError, match="characters") as caught:
        engine.generate(PHOTO, [*messages, {"role": "user", "content": "x" * 10**6}], **OPTIONS)
    assert caught.value.turns is None and "shorten" in caught.value.fix


def test_errors_leave_a_conversation_as_it_was(engine):
    chat = engine.chat(PHOTO)
    chat.ask(QUESTIONS[0], **OPTIONS)
    before = chat.messages
    for question, options in ((5, {}), (QUESTIONS[1], {"temperature": -1}), ("a\ud800", {})):
        with pytest.raises((PromptError, OptionError)):
            chat.ask(question, **{**OPTIONS, **options})
        assert chat.messages == before
    before[0]["content"] = "changed by its reader"
    assert chat.messages[0]["content"] == QUESTIONS[0]
    fresh = engine.generate(PHOTO, said(chat, QUESTIONS[1]), **OPTIONS)
    assert same(chat.ask(QUESTIONS[1], **OPTIONS), fresh)


def test_conversations_about_two_images_do_not_mix(engine):
    chats, alone = [engine.chat(PHOTO), engine.chat(OTHER)], [engine.chat(PHOTO), engine.chat(OTHER)]
    for question in QUESTIONS:
        for each in chats:
            each.ask(question, **OPTIONS)
    for each in alone:
        for question in QUESTIONS:
            each.ask(question, **OPTIONS)
    assert [each.messages for each in chats] == [each.messages for each in alone]


def test_a_view_says_what_it_holds(engine):
    view = engine.image(PHOTO)
    assert view.nbytes == 0 and view.size == (140, 90)
    view.ask(QUESTIONS[0], **OPTIONS)
    g = TALKATIVE
    tokens = g.image_tokens + 9 * g.image_tokens
    pages = len(g.reading_layers) * 2 * g.pages * (g.hires_side**2 // g.pages) * g.kv_heads * g.head_dim
    least = 4 * (tokens * g.hidden + pages + 2 * g.layers * g.kv_heads * g.head_dim * g.image_tokens)
    assert least <= view.nbytes <= 2 * least
    view.close()
    assert view.nbytes == 0
    assert engine.image(None).size is None


def test_steps_are_the_tokens_and_what_each_read(engine):
    stream = engine.stream(PHOTO, QUESTIONS[0], **OPTIONS)
    tokens = list(stream.steps())
    answer = stream.answer()
    assert [token.id for token in tokens if token.id is not None] == answer.token_ids
    assert "".join(token.text for token in tokens) == answer.text
    cells = np.stack([token.cells for token in tokens if token.id is not None])
    assert np.array_equal(cells, answer.trace.cells) and cells.any()
    assert all(token.cells.shape == (0, 4, 4) and token.text for token in tokens if token.id is None)


def test_an_answer_says_why_it_ended(engine):
    whole = engine.generate(PHOTO, QUESTIONS[0], **OPTIONS)
    assert whole.finish_reason == "length"
    assert engine.generate(PHOTO, QUESTIONS[0], stop=whole.text[2], **OPTIONS).finish_reason == "stop"
