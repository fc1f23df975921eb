"""The public API: generate, stream, image views, options, and what bad requests get."""

from __future__ import annotations

import math
from dataclasses import astuple
from itertools import pairwise, zip_longest

import numpy as np
import pytest
from PIL import Image

from engines.bundle.folder import Bundle
from export.checkpoint.config import read_config
from export.checkpoint.folder import Checkpoint
from export.network.reference import ReferenceModel
from runtime import BackendError, Engine, FlexError, ImageError, OptionError, PromptError
from tests.geometries import tiny
from tests.runtime.questions import GEOMETRY, OPTIONS, OTHER, PHOTO, QUESTION, VOCAB, same


@pytest.fixture(scope="module")
def engine(random_model) -> Engine:
    return Engine(random_model("engine", GEOMETRY, tokenizer=True)[1])


@pytest.fixture(scope="module")
def reference(random_model) -> ReferenceModel:
    checkpoint, _ = random_model("engine", GEOMETRY, tokenizer=True)
    config = read_config(checkpoint)
    return ReferenceModel(config.geometry, Checkpoint.open(checkpoint, config.tower_folder))


def test_an_engine_says_what_it_is(random_model, engine):
    """What names the bundle and what runs it; the digest is the one that `expect` takes."""
    bundle = random_model("engine", GEOMETRY, tokenizer=True)[1]
    assert (engine.backend, engine.device, engine.digest) == ("onnxruntime", "cpu", Bundle(bundle).digest)
    with Engine(bundle, expect=engine.digest) as opened:
        opened.require_usable()
    assert opened.backend == "onnxruntime", "also of a closed one"
    with pytest.raises(OptionError, match="closed"):
        opened.require_usable()


def test_generate_stream_and_view_agree(engine):
    answer = engine.generate(PHOTO, QUESTION, **OPTIONS)
    stream = engine.stream(PHOTO, QUESTION, **OPTIONS)
    assert "".join(stream) == answer.text
    assert same(stream.answer(), answer)
    with engine.image(PHOTO) as view:
        assert same(view.ask(QUESTION, **OPTIONS), answer)
    assert len(answer.token_ids) == 6
    assert answer.trace.logits.shape == (6, VOCAB) and answer.trace.logits.dtype == np.float32
    assert answer.trace.cells.shape == (6, 4, 4, 4) and answer.trace.cells.dtype == bool
    assert answer.token_ids == answer.trace.logits.argmax(1).tolist()


def test_every_kind_of_image_gives_the_same_answer(engine, tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(PHOTO).save(path)
    answers = [
        engine.generate(source, QUESTION, **OPTIONS)
        for source in (PHOTO, path, str(path), path.read_bytes(), Image.open(path))
    ]
    assert all(same(answer, answers[0]) for answer in answers)


def test_second_question_reuses_the_image_and_equals_a_fresh_call(engine):
    second = "what colour is the circle on the left, and is it larger than the square?"
    with engine.image(PHOTO) as view:
        first = view.ask(QUESTION, **OPTIONS)
        again = view.ask(second, **OPTIONS)
        third = view.ask(QUESTION, **OPTIONS)
    assert same(again, engine.generate(PHOTO, second, **OPTIONS))
    assert same(third, first)
    assert first.stats.reused_tokens == 0 and first.stats.vision_ms > 0 and first.stats.projection_ms > 0
    assert again.stats.vision_ms == again.stats.projection_ms == again.stats.preprocess_ms == 0
    assert again.stats.reused_tokens >= GEOMETRY.image_tokens


def test_image_elsewhere_in_the_prompt_is_projected_again(engine):
    placed, official = "look at this: <image> what is it?", OPTIONS | {"special_tokens": True}
    with engine.image(PHOTO) as view:
        view.ask(QUESTION, **OPTIONS)
        moved = view.ask(placed, **official)
    assert moved.stats.projection_ms > 0 and moved.stats.vision_ms == 0 and moved.stats.reused_tokens == 0
    assert same(moved, engine.generate(PHOTO, placed, **official))


def test_streams_of_one_view_do_not_disturb_each_other(engine):
    expected = [engine.generate(PHOTO, question, **OPTIONS) for question in (QUESTION, "and now?")]
    with engine.image(PHOTO) as view:
        streams = [view.stream(question, **OPTIONS) for question in (QUESTION, "and now?")]
        next(streams[0])
        next(streams[1])
        assert same(streams[0].answer(), expected[0])
        assert same(streams[1].answer(), expected[1])
        abandoned = view.stream(QUESTION, **OPTIONS)
        next(abandoned)
        del abandoned
        after = view.ask("and now?", **OPTIONS)
        assert same(after, expected[1])
        assert after.stats.reused_tokens > 0  # a stream that is dropped gives its cache back at once
    with pytest.raises(OptionError, match="closed"):
        view.ask(QUESTION)


def test_streams_when_their_view_closes(engine):
    expected = engine.generate(PHOTO, QUESTION, **OPTIONS)
    with engine.image(PHOTO) as view:
        running, waiting = (view.stream(QUESTION, **OPTIONS) for _ in range(2))
        next(running)
    assert same(running.answer(), expected)
    with pytest.raises(OptionError, match="closed"):
        waiting.answer()


def test_streams_taken_in_turns(engine):
    expected = [engine.generate(PHOTO, question, **OPTIONS) for question in (QUESTION, "and now?")]
    with engine.image(PHOTO) as view:
        streams = [view.stream(question, **OPTIONS) for question in (QUESTION, "and now?")]
        texts = ["", ""]
        for pieces in zip_longest(*streams, fillvalue=""):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        assert texts == [answer.text for answer in expected]
        assert all(same(stream.answer(), answer) for stream, answer in zip(streams, expected, strict=True))


@pytest.mark.parametrize("budget", [0, 2, GEOMETRY.pages])
def test_engine_equals_reference_greedily(budget, engine, reference):
    from engines.bundle.pages import margins
    from runtime.preprocess import preprocess
    from tests.parity.requests import encode

    answer = engine.generate(PHOTO, QUESTION, page_budget=budget, **OPTIONS)
    ids, begin = engine.prompter.expand(engine.prompter.encode(QUESTION, True), True)
    tiles = preprocess(Image.fromarray(PHOTO), GEOMETRY)
    image = encode(reference, tiles, np.array([begin]), margins(140, 90, GEOMETRY.grid))
    decoder = reference.decoder(image, len(ids) + 6)
    decoder.run(ids[None, :-1])
    token = int(ids[-1])
    for step in range(6):
        result = decoder.run(np.array([[token]]), budget)
        assert np.abs(result.logits[0] - answer.trace.logits[step]).max() <= 2e-4
        assert np.array_equal(result.cells()[0].reshape(4, 4, 4), answer.trace.cells[step])
        token = int(result.logits.argmax())
        assert token == answer.token_ids[step]


def test_any_model_serves(engine, reference, monkeypatch):
    """The runtime knows a backend by engines.backend's protocols alone: with the reference in its place it answers."""
    longer = "what colour is the circle on the left, and is it larger than the square?"

    def answers():
        with engine.image(PHOTO) as view:
            view.ask(QUESTION, max_new_tokens=1)
            asked = [view.ask(question, **OPTIONS) for question in (longer, QUESTION)]
        return [*asked, engine.generate(None, "hello", **OPTIONS)]

    expected = answers()
    monkeypatch.setattr(engine, "model", reference)
    for ours, theirs in zip(answers(), expected, strict=True):
        assert ours.token_ids == theirs.token_ids and np.array_equal(ours.trace.cells, theirs.trace.cells)
        assert np.abs(ours.trace.logits - theirs.trace.logits).max() <= 2e-4
        assert ours.stats.reused_tokens == theirs.stats.reused_tokens
    decoder = reference.decoder(reference.no_image(1), 70)
    assert decoder.enlarged(80).capacity == 80
    with pytest.raises(BackendError, match="81 more tokens"):
        decoder.run(np.ones((1, 81), np.int64))


def test_no_state_between_requests(engine, reference):
    alone = engine.generate(None, "hello", **OPTIONS)
    first = engine.generate(PHOTO, QUESTION, **OPTIONS)
    engine.generate(OTHER, QUESTION, **OPTIONS)
    assert same(engine.generate(None, "hello", **OPTIONS), alone)
    assert same(engine.generate(PHOTO, QUESTION, **OPTIONS), first)
    assert not alone.trace.cells.any() and not alone.stats.pages_read.any()

    ids = np.array([engine.prompter.encode("hello", False)])
    whole = reference.decoder(reference.no_image(1), ids.shape[1]).run(ids)
    assert np.abs(whole.logits[0] - alone.trace.logits[0]).max() <= 2e-4


def test_page_budget(engine):
    answers = [engine.generate(PHOTO, QUESTION, page_budget=budget, **OPTIONS) for budget in (0, 1, 3, 16, None)]
    for answer, budget in zip(answers, (0, 1, 3, 16, 16), strict=True):
        assert answer.stats.pages_read.shape == (6, 3) and answer.stats.pages_read.max() <= budget
    assert same(answers[-1], answers[-2])
    assert answers[-1].stats.pages_read.max() > 3
    first = [answer.trace.cells[0, 0].ravel() for answer in answers]  # the start layer's map depends on no page
    assert all((less <= more).all() for less, more in pairwise(first))
    assert [int(cells.sum()) for cells in first] == [min(budget, first[-1].sum()) for budget in (0, 1, 3, 16, 16)]
    with pytest.raises(OptionError, match=r"page_budget=17.*\n.*16"):
        engine.generate(PHOTO, QUESTION, page_budget=17)


def test_raw_ids_and_one_token_prompts(engine):
    answer = engine.generate(PHOTO, input_ids=[1, 5, -200, 7], **OPTIONS)
    assert answer.stats.prompt_tokens == GEOMETRY.image_tokens + 3
    assert engine.generate(PHOTO, input_ids=[-200], **OPTIONS).stats.prompt_tokens == GEOMETRY.image_tokens
    assert engine.generate(None, input_ids=[1], **OPTIONS).stats.prompt_tokens == 1
    assert same(engine.generate(PHOTO, input_ids=np.array([1, 5, -200, 7]), **OPTIONS), answer)


def test_sampling_and_stops(engine):
    sampled = {"max_new_tokens": 12, "temperature": 1.5, "stop_at_eos": False}
    runs = [engine.generate(PHOTO, QUESTION, seed=seed, **sampled).token_ids for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    greedy = engine.generate(PHOTO, QUESTION, max_new_tokens=12, stop_at_eos=False)
    assert engine.generate(PHOTO, QUESTION, top_k=1, **sampled).token_ids == greedy.token_ids

    text = greedy.text
    stop = text[2:4]
    stopped = engine.generate(PHOTO, QUESTION, max_new_tokens=12, stop_at_eos=False, stop=stop)
    assert stopped.text == text[: text.find(stop)] and len(stopped.token_ids) <= 12
    pieces = list(engine.stream(PHOTO, QUESTION, max_new_tokens=12, stop_at_eos=False, stop=[stop]))
    assert "".join(pieces) == stopped.text


def test_end_token_ends_the_answer(random_model):
    import torch

    bias = torch.zeros(VOCAB, GEOMETRY.hidden)  # every logit 0: greedy picks token 0
    options = {"tokenizer": True, "overrides": {"lm_head.weight": bias}, "eos_token_id": [0, 2]}
    engine = Engine(random_model("endless", GEOMETRY, **options)[1])
    answer = engine.generate(PHOTO, QUESTION, max_new_tokens=5)
    assert answer.token_ids == [0] and answer.text == ""
    assert engine.generate(PHOTO, QUESTION, max_new_tokens=5, stop_at_eos=False).token_ids == [0] * 5


BAD = {
    "unknown option": (OptionError, "beams", PHOTO, QUESTION, {"beams": 4}),
    "no tokens": (OptionError, "max_new_tokens", PHOTO, QUESTION, {"max_new_tokens": 0}),
    "ignored option": (OptionError, "top_p", PHOTO, QUESTION, {"top_p": 0.9}),
    "no stop": (OptionError, "stop=None", PHOTO, QUESTION, {"stop": None}),
    "numbers as stop": (OptionError, "stop", PHOTO, QUESTION, {"stop": [5]}),
    "empty stop": (OptionError, "stop", PHOTO, QUESTION, {"stop": ""}),
    "negative budget": (OptionError, "page_budget", PHOTO, QUESTION, {"page_budget": -1}),
    "missing image": (ImageError, "does not exist", "nowhere.png", QUESTION, {}),
    "corrupt image": (ImageError, "not an image", b"\x89PNG but not really", QUESTION, {}),
    "no prompt": (PromptError, "no prompt", PHOTO, None, {}),
    "both prompts": (PromptError, "both", PHOTO, QUESTION, {"input_ids": [1, -200]}),
    "two images": (PromptError, "2 images", PHOTO, "<image> or <image>?", {"special_tokens": True}),
    "image asked for": (PromptError, "no image", None, "<image> what?", {"special_tokens": True}),
    "image id without image": (PromptError, "no image", None, None, {"input_ids": [1, -200, 4]}),
    "image without id": (PromptError, "no -200", PHOTO, None, {"input_ids": [1, 4]}),
    "two image ids": (PromptError, "2 images", PHOTO, None, {"input_ids": [-200, -200]}),
    "id too large": (PromptError, str(VOCAB), PHOTO, None, {"input_ids": [-200, VOCAB]}),
    "id negative": (PromptError, "-3", PHOTO, None, {"input_ids": [-200, -3]}),
    "empty ids": (PromptError, "non-empty", None, None, {"input_ids": []}),
    "long prompt": (PromptError, "200 tokens together", PHOTO, "word " * 300, {}),
    "answer too long": (PromptError, "max_new_tokens=", PHOTO, QUESTION, {"max_new_tokens": 190}),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_requests_are_typed_errors_and_leave_the_engine_usable(bad, engine):
    kind, text, image, prompt, options = BAD[bad]
    with pytest.raises(kind, match=text) as caught:
        engine.generate(image, prompt, **options)
    assert isinstance(caught.value, FlexError)
    assert len(engine.generate(PHOTO, QUESTION, max_new_tokens=2, stop_at_eos=False).token_ids) == 2


def test_the_length_the_error_names_fits(engine):
    with pytest.raises(PromptError) as caught:
        engine.generate(PHOTO, QUESTION, max_new_tokens=190)
    room = int(caught.value.fix.removeprefix("max_new_tokens="))
    assert len(engine.generate(PHOTO, QUESTION, max_new_tokens=room, stop_at_eos=False).token_ids) == room
    with pytest.raises(PromptError):
        engine.generate(PHOTO, QUESTION, max_new_tokens=room + 1)


def test_an_error_while_decoding_keeps_the_view_usable(engine, monkeypatch):
    from engines.ort import OrtDecoder

    with engine.image(PHOTO) as view:
        expected = view.ask(QUESTION, **OPTIONS)
        original = OrtDecoder.run

        def broken(self, ids, *rest, **named):
            if ids.shape[1] == 1:
                raise BackendError("the device went away")
            return original(self, ids, *rest, **named)

        monkeypatch.setattr(OrtDecoder, "run", broken)
        with pytest.raises(BackendError):
            view.ask(QUESTION)
        monkeypatch.undo()
        assert same(view.ask(QUESTION, **OPTIONS), expected)


def test_bundle_without_tokenizer_takes_raw_ids(random_model):
    engine = Engine(random_model("tiny", tiny())[1])
    answer = engine.generate(PHOTO, input_ids=[1, -200, 7], max_new_tokens=3, stop_at_eos=False)
    assert answer.text is None and len(answer.token_ids) == 3 and str(answer) == str(answer.token_ids)
    assert list(engine.stream(PHOTO, input_ids=[1, -200, 7], max_new_tokens=3)) == []
    with pytest.raises(PromptError, match="no tokenizer"):
        engine.generate(PHOTO, QUESTION)
    with pytest.raises(PromptError, match="no tokenizer"):
        engine.generate(PHOTO, input_ids=[1, -200, 7], stop="x")


def test_stats(engine):
    stats = engine.generate(PHOTO, QUESTION, **OPTIONS).stats
    assert len(stats.decode_ms) == 6 and min(stats.decode_ms) > 0
    assert stats.tokens_per_second == pytest.approx(6000 / sum(stats.decode_ms))
    assert stats.prefill_ms > 0 and stats.peak_rss_bytes > 10e6
    assert "pages read" in str(stats)
    flat = np.concatenate([np.ravel(value) for value in astuple(stats)])
    assert np.isfinite(flat).all() and (flat >= 0).all() and math.isfinite(stats.tokens_per_second)
    ids, _ = engine.prompter.expand(engine.prompter.encode(QUESTION, True), True)
    assert stats.prompt_tokens == len(ids) and stats.reused_tokens == 0
    assert stats.pages_read.shape == (6, len(GEOMETRY.reading_layers))
    alone = engine.generate(None, "hello", **OPTIONS).stats
    assert alone.preprocess_ms == alone.vision_ms == alone.projection_ms == 0 and "pages read" in str(alone)
