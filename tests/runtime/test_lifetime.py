"""What an engine, a view and a stream are to who closes, copies, sends or shares them."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from runtime import Engine, FlexError, OptionError
from tests.paths import ROOT
from tests.runtime.questions import GEOMETRY, OPTIONS, OTHER, PHOTO, QUESTION, same


@pytest.fixture(scope="module")
def bundle(random_model):
    return random_model("engine", GEOMETRY, tokenizer=True)[1]


@pytest.fixture(scope="module")
def engine(bundle) -> Engine:
    return Engine(bundle)


def test_a_closed_engine(bundle):
    engine, model = ask_a_closed_one(bundle)
    engine.close()  # twice is allowed
    assert engine.geometry == GEOMETRY and engine.prompter.encode("hello", False)  # what needs no model stays
    gc.collect()
    assert model() is None  # sessions and weights are freed although the engine object lives


def ask_a_closed_one(bundle) -> tuple[Engine, weakref.ref]:
    with Engine(bundle) as engine:
        expected = engine.generate(PHOTO, QUESTION, **OPTIONS)
        view = engine.image(PHOTO)
        assert same(view.ask(QUESTION, **OPTIONS), expected)
        running, waiting = (engine.stream(PHOTO, QUESTION, **OPTIONS) for _ in range(2))
        next(running)
        model = weakref.ref(engine.model)
    assert same(running.answer(), expected)  # what runs goes on
    for call in (
        lambda: engine.generate(PHOTO, QUESTION),
        lambda: engine.stream(None, "hello"),
        lambda: engine.image(PHOTO),
        lambda: view.ask(QUESTION),
        lambda: view.stream(QUESTION),
        waiting.answer,
    ):
        with pytest.raises(OptionError, match="closed") as caught:
            call()
        assert caught.value.fix
    return engine, model


def test_a_view_that_nobody_holds_is_freed(engine):
    view = engine.image(PHOTO)
    gone = weakref.ref(view)
    del view
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    "copied",
    [pickle.dumps, copy.copy, copy.deepcopy, lambda each: each.__reduce_ex__(2)],
    ids=["pickle", "copy", "deep", "old"],
)
def test_nothing_of_an_engine_can_be_copied(copied, engine):
    """The error says what to do; a pool that sends an engine gets it, too."""
    for each in (engine, engine.image(PHOTO), engine.stream(None, "hello"), engine.generate):
        with pytest.raises(OptionError, match="cannot be pickled or copied") as caught:
            copied(each) if each != engine.generate else pickle.dumps(each)
        assert "Engine(path)" in caught.value.fix


def test_an_answer_and_an_error_can_be_sent(engine):
    answer = engine.generate(PHOTO, QUESTION, **OPTIONS)
    assert same(pickle.loads(pickle.dumps(answer)), answer)
    with pytest.raises(FlexError) as caught:
        engine.generate(PHOTO, QUESTION, beams=4)
    sent = pickle.loads(pickle.dumps(caught.value))
    assert type(sent) is OptionError and str(sent) == str(caught.value)


def test_a_stream_has_one_reader(engine, monkeypatch):
    """The second gets an error at once, and takes nothing from the first; so does who reads a stream within itself."""
    expected = engine.generate(PHOTO, QUESTION, **OPTIONS)
    stream = engine.stream(PHOTO, QUESTION, **OPTIONS)
    inside, seen = threading.Event(), []
    go_on = threading.Event()
    original = stream._draft.take

    def slow(step):
        inside.set()
        go_on.wait(30)
        return original(step)

    monkeypatch.setattr(stream._draft, "take", slow)
    reader = threading.Thread(target=lambda: seen.extend(stream))
    reader.start()
    assert inside.wait(30)
    for call in (lambda: next(stream), stream.answer, lambda: list(stream)):
        with pytest.raises(OptionError, match="another thread"):
            call()
    go_on.set()
    reader.join(30)
    assert "".join(seen) == expected.text and same(stream.answer(), expected)

    within = engine.stream(PHOTO, QUESTION, **OPTIONS)
    errors = []

    def recursive(step):
        with pytest.raises(OptionError) as caught:
            next(within)
        errors.append(caught.value)
        return type(within._draft).take(within._draft, step)

    monkeypatch.setattr(within._draft, "take", recursive)
    assert same(within.answer(), expected) and len(errors) == 6


def test_many_threads_read_one_stream(engine):
    """Whatever happens first: every piece is read once, and everything else is an OptionError."""
    expected = engine.generate(PHOTO, QUESTION, max_new_tokens=40, stop_at_eos=False)
    stream, pieces, errors = engine.stream(PHOTO, QUESTION, max_new_tokens=40, stop_at_eos=False), [], []
    guard = threading.Lock()

    def read() -> None:
        while True:
            try:
                piece = next(stream)
            except StopIteration:
                return
            except OptionError as error:
                errors.append(error)
                continue
            with guard:
                pieces.append(piece)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(read) for _ in range(4)]:
            done.result(60)
    assert sorted(pieces) == sorted(engine.stream(PHOTO, QUESTION, max_new_tokens=40, stop_at_eos=False))
    assert stream.answer().token_ids == expected.token_ids
    assert all("another thread" in str(error) for error in errors)


QUESTIONS = [QUESTION, "and now?", "what colour is the circle on the left?", "yes or no?"]


def test_threads_that_ask_one_engine_or_one_view(engine):
    """Four at a time, each with its own questions: every answer is that of a question asked alone."""
    pictures = [PHOTO, OTHER, PHOTO, None]
    expected = [engine.generate(picture, text, **OPTIONS) for picture, text in zip(pictures, QUESTIONS, strict=True)]
    of_view = [engine.generate(PHOTO, text, **OPTIONS) for text in QUESTIONS]
    with engine.image(PHOTO) as view, ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            alone = [pool.submit(engine.generate, *each, **OPTIONS) for each in zip(pictures, QUESTIONS, strict=True)]
            assert all(same(found.result(60), answer) for found, answer in zip(alone, expected, strict=True))
            shared = [pool.submit(view.ask, text, **OPTIONS) for text in QUESTIONS]
            assert all(same(found.result(60), answer) for found, answer in zip(shared, of_view, strict=True))


def test_a_view_closed_while_others_ask(engine):
    """Each gets its answer or an OptionError: never an answer about no image."""
    expected = [engine.generate(PHOTO, text, **OPTIONS) for text in QUESTIONS]
    for _ in range(5):
        view = engine.image(PHOTO)
        with ThreadPoolExecutor(5) as pool:
            asked = [pool.submit(view.ask, text, **OPTIONS) for text in QUESTIONS]
            pool.submit(view.close)
        for found, answer in zip(asked, expected, strict=True):
            error = found.exception()
            assert (error is None and same(found.result(), answer)) or "closed" in str(error)


def test_an_engine_closed_while_others_ask(bundle):
    """Each gets its answer or an OptionError."""
    engine = Engine(bundle)
    expected = [engine.generate(PHOTO, text, **OPTIONS) for text in QUESTIONS]
    with ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(engine.generate, PHOTO, text, **OPTIONS) for text in QUESTIONS * 8]
        asked[0].result(60)
        engine.close()
    for found, answer in zip(asked, expected * 8, strict=True):
        error = found.exception()
        assert (error is None and same(found.result(), answer)) or "closed" in str(error)
    assert any(found.exception() for found in asked)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_of_an_opened_engine_is_told(bundle):
    """ONNX Runtime's threads do not come along: a run in a fork hangs one time in thirty, and freeing the model
    crashes. So a fork gets an error at once and ends as it wants to; the parent goes on."""
    program = f"""
import os, sys
import numpy as np
from runtime import Engine, BackendError
engine = Engine({str(bundle)!r}, threads=4)
photo = np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8)
options = dict(max_new_tokens=5, stop_at_eos=False)
ask = lambda: engine.generate(photo, {QUESTION!r}, **options).token_ids
first, view = ask(), engine.image(photo)
running = view.stream({QUESTION!r}, **options)
next(running)
for _ in range(4):
    child = os.fork()
    if not child:
        errors = 0
        for call in (ask, lambda: view.ask("x"), lambda: next(running), running.answer, lambda: engine.image(photo)):
            try:
                call()
            except BackendError as error:
                errors += "fork" in str(error) and "each process" in error.fix
        engine.close()
        sys.exit(errors)  # as a program ends, with everything freed
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
print(ask() == first == running.answer().token_ids)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.split() == ["5", "5", "5", "5", "True"], done.stderr
