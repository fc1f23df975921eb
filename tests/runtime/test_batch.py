"""Requests that share decode steps: each answer is the one it has alone, whoever comes and goes beside it."""

from __future__ import annotations

import gc
import json
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from engines.errors import BackendError, FlexError
from runtime import Answer, Engine, ImageError, OptionError
from tests.paths import ROOT
from tests.runtime.questions import OTHER, PHOTO, TALKATIVE

SLOTS = 3
THIRD = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
IMAGES = {"photo": PHOTO, "other": OTHER, "third": THIRD, "none": None}
PROMPTS = [
    "what number is in the red square?",
    "and where?",
    "x" * 150,
    [
        {"role": "user", "content": "what number is it?"},
        {"role": "assistant", "content": "a chat"},
        {"role": "user", "content": "between?"},
    ],
]
VARIANTS = [  # of options
    {"max_new_tokens": 6},
    {"max_new_tokens": 1},
    {"max_new_tokens": 12, "page_budget": 2},
    {"max_new_tokens": 8, "page_budget": 0},
    {"max_new_tokens": 9, "temperature": 0.8, "top_k": 40, "seed": 7},
    {"max_new_tokens": 10, "stop": " is"},
]


@pytest.fixture(scope="module")
def bundle(random_model):
    return random_model("chat", TALKATIVE, tokenizer=True)[1]


@pytest.fixture(scope="module")
def alone(bundle) -> Callable[..., Answer]:
    """alone(image, prompt, options) -> the answer of an engine without slots."""
    engine, known = Engine(bundle, threads=1), {}

    def get(image: str, prompt: int, options: int) -> Answer:
        key = image, prompt, options
        if key not in known:
            known[key] = engine.generate(IMAGES[image], PROMPTS[prompt], **VARIANTS[options], stop_at_eos=False)
        return known[key]

    return get


@pytest.fixture(scope="module")
def engine(bundle) -> Engine:
    return Engine(bundle, threads=1, slots=SLOTS, prefill_chunk=48)


def same(found: Answer, expected: Answer) -> bool:
    return (found.token_ids, found.text, found.finish_reason) == (
        expected.token_ids, expected.text, expected.finish_reason,
    ) and np.array_equal(found.stats.pages_read, expected.stats.pages_read)  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_and_goes_beside_it(engine, alone, seed):
    """Ten random schedules each: views that are kept or not, requests that begin, pause, are dropped half-way."""
    draw = random.Random(seed)
    for _ in range(10):
        views = {name: engine.image(image) for name, image in IMAGES.items()}
        running, begun = [], 0
        while begun < 8 or running:
            if begun < 8 and draw.random() < 0.4:
                key = draw.choice(list(IMAGES)), draw.randrange(len(PROMPTS)), draw.randrange(len(VARIANTS))
                view = views[key[0]] if draw.random() < 0.7 else engine.image(IMAGES[key[0]])
                stream = view.stream(PROMPTS[key[1]], **VARIANTS[key[2]], stop_at_eos=False)
                running.append((key, stream, stream.steps()))
                begun += 1
            elif running:
                key, stream, steps = draw.choice(running)
                if draw.random() < 0.04:
                    stream.close()
                elif next(steps, None) is not None:
                    continue
                else:
                    assert same(stream.answer(), alone(*key)), key
                running.remove((key, stream, steps))
    assert engine._batch.active == 0


def test_threads_share_steps(engine, alone):
    keys = [(image, prompt, option) for image in IMAGES for prompt in (0, 1) for option in (0, 2, 4)]

    def ask(key):
        image, prompt, options = key
        return engine.generate(IMAGES[image], PROMPTS[prompt], **VARIANTS[options], stop_at_eos=False)

    with ThreadPoolExecutor(6) as pool:
        for key, answer in zip(keys, pool.map(ask, keys), strict=True):
            assert same(answer, alone(*key)), key


def test_one_step_serves_all(engine, monkeypatch):
    """Three answers of twenty tokens take about twenty steps, not sixty."""
    runs, decoder = [], type(engine._batch._slots.first(SLOTS))
    run = decoder.run

    def counted(self, ids, *rest, **more):
        runs.append(ids.shape)
        return run(self, ids, *rest, **more)

    monkeypatch.setattr(decoder, "run", counted)
    options = {"max_new_tokens": 20, "stop_at_eos": False}
    steps = [engine.image(image).stream("and where?", **options).steps() for image in (PHOTO, OTHER, THIRD)]
    while any([next(each, None) is not None for each in steps]):
        pass
    assert sum(shape == (3, 1) for shape in runs) >= 15
    assert sum(shape[1] == 1 for shape in runs) <= 30


def test_many_short_answers_fill_the_rows(bundle):
    """Those that join together are prefilled before the next step, so that it is for all of them."""
    questions = [(image, f"number {index}?") for index in range(6) for image in (PHOTO, OTHER)]
    with Engine(bundle, threads=1, slots=SLOTS) as engine:
        engine.generate_many(questions, max_new_tokens=3, stop_at_eos=False)
        assert 12 * 3 / SLOTS <= engine.steps <= 1.5 * 12 * 3 / SLOTS


def test_a_long_prompt_stops_nobody_for_longer_than_a_chunk(engine):
    running = engine.image(PHOTO).stream("and where?", max_new_tokens=60, stop_at_eos=False).steps()
    next(running)
    joining = engine.image(OTHER).stream("y" * 200, max_new_tokens=1, stop_at_eos=False).steps()
    (seat,) = engine._batch._seats
    before = len(seat.decoding.tokens)
    next(joining)  # makes as many steps as there are chunks
    tokens = len(seat.decoding.tokens) - before
    assert tokens >= (200 + TALKATIVE.image_tokens) // 48, "one step between two chunks"


def test_a_second_question_copies_what_a_row_holds(engine):
    """Also from a row that is still answering: the image is prefilled once."""
    view = engine.image(PHOTO)
    first = view.stream("what number is in the red square?", max_new_tokens=30, stop_at_eos=False)
    next(first.steps())
    second = view.ask("and where?", max_new_tokens=3, stop_at_eos=False)
    assert second.stats.reused_tokens >= TALKATIVE.image_tokens
    assert second.stats.vision_ms == 0
    first.close()


def test_more_images_than_rows_are_prefilled_once(engine, alone):
    """What a row held of an image comes back when the image does, and counts as the view's until that is closed."""
    images = [PHOTO, OTHER, THIRD, PHOTO, OTHER]
    views, options = [engine.image(image) for image in images], {"max_new_tokens": 3, "stop_at_eos": False}
    for _ in range(2):
        bytes = [view.nbytes for view in views]
        again = [view.ask(PROMPTS[0], **options) for view in views]
    assert all(answer.stats.reused_tokens >= TALKATIVE.image_tokens for answer in again)
    assert again[0].token_ids == again[3].token_ids == alone("photo", 0, 0).token_ids[:3]
    assert min(after.nbytes - before for after, before in zip(views, bytes, strict=True)) >= 0
    g = TALKATIVE
    kept = 2 * g.layers * g.kv_heads * g.head_dim * 4 * g.image_tokens
    assert sum(engine._batch.kept_bytes(view._encoded) >= kept for view in views) >= len(views) - SLOTS
    assert len(engine._batch._kept) > 0
    for view in views:
        view.close()
    for _ in range(SLOTS):  # of those views' rows nothing is left, either
        engine.generate(None, "x", max_new_tokens=1)
    gc.collect()
    assert len(engine._batch._kept) == 0


def test_a_conversation_comes_back_to_its_row(engine):
    """Up to its latest question, which other images pushed out."""
    chat = engine.image(PHOTO).chat()
    chat.ask("what number is it?", max_new_tokens=3)
    chat.ask("and where?", max_new_tokens=3)
    for image in (OTHER, THIRD, OTHER, THIRD):
        engine.generate(image, "between?", max_new_tokens=2)
    views = [engine.image(image) for image in (OTHER, THIRD, OTHER)]
    for view in views:
        view.ask("between?", max_new_tokens=2)
    third = chat.ask("where?", max_new_tokens=3)
    assert third.stats.reused_tokens > TALKATIVE.image_tokens + len("what number is it?") // 2


def test_errors_end_only_whom_they_are_for(engine, alone, monkeypatch):
    good = engine.image(PHOTO).stream(PROMPTS[0], **VARIANTS[0], stop_at_eos=False)
    steps = good.steps()
    next(steps)
    slots = engine._batch._slots

    def fail(row, image):
        raise BackendError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(slots, "load", fail)
        with pytest.raises(BackendError, match="no memory left"):
            engine.generate(THIRD, "and where?")
    with pytest.raises(ImageError):
        engine.generate(b"no image", "and where?")
    with pytest.raises(OptionError):
        engine.generate(THIRD, "and where?", temperature=-1)
    for _ in steps:
        pass
    assert same(good.answer(), alone("photo", 0, 0))
    assert same(engine.generate(THIRD, PROMPTS[1], **VARIANTS[0], stop_at_eos=False), alone("third", 1, 0))


def test_a_failing_step_ends_those_who_took_it(engine, alone, monkeypatch):
    streams = [engine.image(image).stream("and where?", max_new_tokens=9) for image in (PHOTO, OTHER)]
    for stream in streams:
        next(stream.steps())

    def fail(rows):
        raise BackendError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(engine._batch._slots, "first", fail)
        for stream in streams:
            with pytest.raises(BackendError, match="the device is gone"):
                stream.answer()
    assert engine._batch.active == 0
    assert same(engine.generate(PHOTO, PROMPTS[1], **VARIANTS[0], stop_at_eos=False), alone("photo", 1, 0))


def test_more_requests_than_slots_wait_their_turn(engine, alone):
    keys = [("photo", 0, 0), ("other", 1, 2), ("third", 0, 3), ("none", 1, 0), ("photo", 3, 0), ("other", 2, 1)]
    streams = [
        engine.image(IMAGES[image]).stream(PROMPTS[prompt], **VARIANTS[options], stop_at_eos=False)
        for image, prompt, options in keys
    ]
    threads, answers = [], {}
    for key, stream in zip(keys, streams, strict=True):
        threads.append(threading.Thread(target=lambda key=key, stream=stream: answers.update({key: stream.answer()})))
        threads[-1].start()
    for thread in threads:
        thread.join(60)
    assert all(same(answers[key], alone(*key)) for key in keys)


def test_many_at_once(engine, alone):
    keys = [(image, prompt, 0) for image in IMAGES for prompt in range(len(PROMPTS))]
    parts = []
    answers = engine.generate_many(
        [(IMAGES[image], PROMPTS[prompt]) for image, prompt, _ in keys],
        progress=parts.append, **VARIANTS[0], stop_at_eos=False,
    )  # fmt: skip
    assert all(same(answer, alone(*key)) for answer, key in zip(answers, keys, strict=True))
    assert parts == sorted(parts) and parts[-1] == 1.0 and len(parts) == len(keys)
    assert engine.generate_many([]) == []
    engine.generate_many([(PHOTO, "hello")], progress=True, max_new_tokens=1)  # a bar
    with pytest.raises(FlexError, match="request 1: "):
        engine.generate_many([(PHOTO, "hello"), (b"no image", "hello"), (PHOTO, "hello")])
    assert engine._batch.active == 0


def test_many_without_slots(bundle, alone):
    with Engine(bundle, threads=1) as single:
        answers = single.generate_many([(PHOTO, PROMPTS[0]), (None, PROMPTS[1])], **VARIANTS[0], stop_at_eos=False)
    assert same(answers[0], alone("photo", 0, 0)) and same(answers[1], alone("none", 1, 0))


@pytest.mark.parametrize(
    "options", [{"slots": 0}, {"slots": True}, {"slots": 10**6}, {"slots": "4"}, {"prefill_chunk": 0}]
)
def test_slots_that_cannot_be(bundle, options):
    with pytest.raises(BackendError, match=next(iter(options))):
        Engine(bundle, **options)


def test_a_closed_engine_ends_with_its_answers(bundle):
    engine = Engine(bundle, threads=1, slots=2)
    stream = engine.image(PHOTO).stream("and where?", max_new_tokens=5, stop_at_eos=False)
    next(stream.steps())
    engine.close()
    assert len(stream.answer().token_ids) == 5
    with pytest.raises(OptionError):
        engine.generate(PHOTO, "and where?")


def test_the_default_model_answers_in_any_order(default_bundle):
    """The questions of the examples in float32, begun and continued at random."""
    rows = json.loads((ROOT / "examples/examples.json").read_text())
    alone, engine, draw = Engine(default_bundle("fp32")), Engine(default_bundle("fp32"), slots=4), random.Random(0)
    expected, views = [], {}
    for row in rows:
        path = ROOT / "examples" / row["image"]
        expected.append(alone.generate(path, row["question"]).token_ids)
        views.setdefault(row["image"], engine.image(path))
    running = [
        (index, stream := views[row["image"]].stream(row["question"]), stream.steps()) for index, row in enumerate(rows)
    ]
    while running:
        entry = draw.choice(running[:6])
        if next(entry[2], None) is None:
            running.remove(entry)
            assert entry[1].answer().token_ids == expected[entry[0]], rows[entry[0]]
