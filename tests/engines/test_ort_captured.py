"""Decode steps as CUDA graphs: the rules are kept, and the answers are those without. On a provider that runs on the
CPU and insists on the rules (tests/emulator/cuda_provider.py); on a GPU: tests/parity/gpu."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.backend import Image
from engines.bundle.folder import Bundle
from engines.bundle.kinds import ONNXRUNTIME_CUDA
from engines.errors import BackendError
from engines.ort import OrtModel, captured
from engines.ort.captured import CapturedPart
from engines.ort.thread import OneThread
from export.build import BuildOptions, build
from runtime import Answer, Engine
from tests.emulator.cuda_provider import RUNS, Provider
from tests.engines.manifests import edit
from tests.geometries import tiny
from tests.parity.requests import encode, request
from tests.paths import ROOT

PHOTOS = [ROOT / "examples" / name for name in ("garden.png", "plaza.png")]
ASKED = {"max_new_tokens": 6, "stop_at_eos": False, "trace": True}
WITHOUT = "1.29.0"  # records nothing: what graphs copy from the host does not stay there


@pytest.fixture
def cuda(monkeypatch):
    """cuda(**options) -> a Provider in the place of onnxruntime."""

    def take_its_place(**options: object) -> Provider:
        provider = Provider(**options)
        monkeypatch.setitem(sys.modules, "onnxruntime", provider)
        return provider

    return take_its_place


@pytest.fixture(scope="module")
def bundle(default_bundle) -> Path:
    return default_bundle("fp16")


@pytest.fixture(scope="module")
def small(random_model) -> Bundle:
    return Bundle(random_model("tiny", tiny())[1])


def told(caplog) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name.startswith("engines")]


def everything(engine: Engine) -> list[Answer]:
    """Views side by side, streams that take turns, one that is left half-way, turns of a conversation, no image, and an
    image after all are closed."""
    answers = []
    with engine.image(PHOTOS[0]) as one, engine.image(PHOTOS[1]) as other:
        answers += [view.ask("What is the number?", **ASKED) for view in (one, other, one)]
        streams = [
            view.stream(f"Is there a {what}?", **ASKED)
            for view, what in ((one, "red circle"), (other, "blue square"), (one, "green circle"))
        ]
        left = other.stream("How many circles are there?", **ASKED)
        next(left)
        for _ in range(3):
            for stream in streams:
                next(stream.steps())
        left.close()
        answers += [stream.answer() for stream in streams]
        chat = one.chat()
        answers += [chat.ask(question, **ASKED) for question in ("Is there a circle?", "And a square?")]
        answers.append(engine.generate(None, "Hello", **ASKED))
        answers.append(other.ask("How many squares are there?", **ASKED))
    answers.append(engine.generate(PHOTOS[1], "What is the number?", **ASKED))
    return answers


def test_answers_are_those_without_graphs_and_those_of_the_cpu(cuda, bundle):
    """To the last bit the same logits as operator by operator; and the tokens of the CPU's own graph."""
    expected = [answer.token_ids for answer in everything(Engine(bundle, threads=1))]
    plain = cuda(version=WITHOUT)
    operators = everything(Engine(bundle, device="cuda", threads=1))
    assert not plain.graphs()
    provider = cuda()
    for _ in range(2):  # the engine closed, and opened again
        with Engine(bundle, device="cuda", threads=1) as engine:
            assert engine.model.part.captures
            found = everything(engine)
        for one, other in zip(operators, found, strict=True):
            assert np.array_equal(one.trace.logits, other.trace.logits)
            assert np.array_equal(one.trace.cells, other.trace.cells)
        assert [answer.token_ids for answer in found] == expected
    steps = sum(count for (part, *_), count in provider.runs.items() if part == "decoder")
    assert provider.launched() > 2 * 6 * 5 and steps > provider.launched()


def test_what_is_recorded_and_what_is_not(cuda, small):
    """A prefill never, a single step once, whatever its budget; on the way it runs three times."""
    provider, g = cuda(), tiny()
    model = OrtModel(small, device="cuda", threads=1)
    tiles, ids, begin = request(g, seed=1)
    decoder = model.decoder(encode(model, tiles, begin), ids.shape[1] + 8)
    decoder.run(ids[:, :-3])
    decoder.run(ids[:, -3:-1])
    assert {key: count for key, count in provider.runs.items() if key[0] == "decoder"} == {("decoder", "-1", "run"): 2}
    for budget in (0, g.pages, 2):
        decoder.run(np.array([[5]]), budget)
    decoder.run(ids[:, -3:-1])
    decoder.run(np.array([[7]]))
    found = {key[1:]: count for key, count in provider.runs.items() if key[0] == "decoder"}
    assert found == {("-1", "run"): 3, ("1", "run"): RUNS - 1, ("1", "recorded"): 1, ("1", "launched"): 3}


def steps(decoder, ids: np.ndarray, budget: int) -> list[np.ndarray]:
    decoder.run(ids[:, :-1])
    found = [decoder.run(ids[:, -1:], budget).logits]
    return [*found, *(decoder.run(np.array([[token]]), budget).logits for token in (5, 9, 7))]


def test_one_graph_serves_request_after_request(cuda, small):
    """Also for other images and other lengths: desk and stores come back. Two at a time have two."""
    g = tiny()

    def ask(model: OrtModel, seed: int, room: int = 8) -> tuple[Image, object, list[np.ndarray]]:
        tiles, ids, begin = request(g, seed, begin=2 + seed)
        image = replace(encode(model, tiles, begin), margins=np.array([[seed % 2, 1]]))
        decoder = model.decoder(image, ids.shape[1] + room)
        return image, decoder, steps(decoder, ids, g.pages)

    cuda(version=WITHOUT)
    expected = [ask(OrtModel(small, device="cuda", threads=1), seed)[2] for seed in range(4)]
    provider = cuda()
    model = OrtModel(small, device="cuda", threads=1)
    for seed in (0, 1, 2):
        assert np.array_equal(ask(model, seed, 8 + 3 * seed)[2], expected[seed])
    assert provider.graphs() == 1
    taken = provider.taken
    held = [ask(model, seed) for seed in (2, 3)]
    assert [np.array_equal(each[2], expected[seed]) for each, seed in zip(held, (2, 3), strict=True)] == [True, True]
    assert provider.graphs() == 2 and provider.taken > taken
    taken = provider.taken
    held.reverse()  # they come back in the order they were lent, and find each other again
    while held:
        held.pop()
    for seed in (1, 2):
        held.append(ask(model, seed))
        assert np.array_equal(held[-1][2], expected[seed])
    assert provider.graphs() == 2 and provider.taken <= taken


def test_what_an_earlier_request_left_is_gone(cuda, small):
    """NaN in a cache that comes back."""
    cuda()
    model = OrtModel(small, device="cuda", threads=1)
    decoder = model.decoder(model.no_image(1), 64)
    cache = decoder._cache["past_value.0"]
    cache.update_inplace(np.full(cache.shape(), np.nan, np.float32))
    del decoder
    again = model.decoder(model.no_image(1), 64)
    assert again._cache["past_value.0"] is cache and not cache.numpy().any()
    assert np.isfinite(again.run(np.array([[5]])).logits).all()


def test_a_batch_and_rows_of_different_length(cuda, small):
    found = []
    for version in (WITHOUT, "1.31.1"):
        cuda(version=version)
        model = OrtModel(small, device="cuda", threads=1)
        decoder = model.decoder(model.no_image(2), 64)
        decoder.run(np.array([[3, 5, 9], [4, 8, 0]]), lengths=np.array([3, 2]))
        found.append([decoder.run(np.array([[6], [7]]), np.array([0, 2])).logits for _ in range(3)])
    assert np.array_equal(*found)


def test_capacities_are_few(cuda, small):
    """A power of two, but not above the context, unless the image needs it."""
    cuda()
    part = OrtModel(small, device="cuda", threads=1).part
    context = -(-part.geometry.context // 64) * 64
    assert isinstance(part, CapturedPart) and context > 128
    assert [part.rounded(tokens) for tokens in (1, 64, 65, 128, 129)] == [64, 64, 128, 128, min(256, context)]
    assert part.rounded(part.geometry.context) == context
    assert part.rounded(10 * context) >= 10 * context


def test_an_enlarged_decoder_goes_on(cuda, small):
    cuda()
    model = OrtModel(small, device="cuda", threads=1)
    decoder, other = (model.decoder(model.no_image(1), 64) for _ in range(2))
    for each in (decoder, other):
        each.run(np.array([[1, 5, 9]]))
    larger = other.enlarged(65)
    assert larger.capacity == 128
    assert np.abs(larger.run(np.array([[7]])).logits - decoder.run(np.array([[7]])).logits).max() <= 1e-5


def test_memory_is_counted(cuda, small):
    """All that a view holds on the device is in its nbytes, and all of it is used again."""
    provider = cuda()
    with Engine(small.path, device="cuda", threads=1) as engine:
        asked = {"input_ids": [1, -200, 5], "max_new_tokens": 2, "stop_at_eos": False}
        photo = np.zeros((8, 8, 3), np.uint8)
        for _ in range(2):
            with engine.image(photo) as view:
                view.ask(**asked)
                assert provider.taken == view.nbytes
        assert provider.graphs() == 1


def test_where_there_is_no_room_what_nobody_uses_makes_some(cuda, small):
    provider = cuda()
    model = OrtModel(small, device="cuda", threads=1)
    image = model.no_image(1)
    first = model.decoder(image, 128)
    provider.room = provider.taken + first.nbytes // 4
    with pytest.raises(BackendError, match="the GPU has no room for"):
        model.decoder(image, 64)
    del first
    second = model.decoder(image, 64)
    assert second.run(np.array([[5]])).logits.shape == (1, tiny().vocab)


def test_logits_are_those_of_their_step_alone(cuda, small):
    """They lie on the device until somebody asks."""
    cuda()
    model = OrtModel(small, device="cuda", threads=1)
    decoder = model.decoder(model.no_image(1), 64)
    step = decoder.run(np.array([[1, 5]]))
    assert step.logits[0].argmax() == step.token[0]
    missed = decoder.run(np.array([[9]]))
    decoder.run(np.array([[7]]))
    with pytest.raises(BackendError, match="of a step that is over"):
        missed.logits  # noqa: B018


def test_a_session_that_cannot_record_runs_operator_by_operator_and_says_why(cuda, small, caplog):
    provider = cuda(refuses="as all compute graph nodes have not been partitioned to the CUDAExecutionProvider")
    model = OrtModel(small, device="cuda", threads=1)
    assert not isinstance(model.part, CapturedPart) and not provider.graphs()
    (record,) = told(caplog)
    assert "without CUDA graphs" in record.message and "have not been partitioned" in record.message


def test_a_graph_that_does_not_open_is_the_error_not_the_recording(cuda, small, tmp_path, caplog):
    provider = cuda()
    model = OrtModel(small, device="cuda", threads=1)
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(BackendError, match="cannot open"):
        model._recording_session(tmp_path / "broken.onnx")
    assert not told(caplog) and not provider.graphs()


def test_a_recording_that_fails_is_given_up(cuda, small, caplog):
    """The step has its result all the same, and nobody tries again."""
    expected = OrtModel(small, threads=1)
    provider = cuda(breaks="CUDA failure 900: operation not permitted when stream is capturing")
    model, g = OrtModel(small, device="cuda", threads=1), tiny()
    found = []
    for each in (expected, model, model):
        tiles, ids, begin = request(g, seed=1)
        found.append(steps(each.decoder(encode(each, tiles, begin), ids.shape[1] + 8), ids, g.pages))
    assert np.abs(np.stack(found[0]) - np.stack(found[1])).max() <= 1e-4 and np.array_equal(found[1], found[2])
    (record,) = told(caplog)
    assert "without CUDA graphs" in record.message and "CUDA failure 900" in record.message
    assert provider.runs["decoder", "1", "run"] == 1 and not model.part.captures


def test_too_many_tokens_are_no_reason_to_give_up(cuda, small):
    cuda()
    model = OrtModel(small, device="cuda", threads=1)
    decoder = model.decoder(model.no_image(1), 64)
    decoder.run(np.ones((1, 64), np.int64))
    with pytest.raises(BackendError, match="1 more tokens"):
        decoder.run(np.array([[5]]))
    assert model.part.captures


def test_an_older_onnxruntime_does_not_record(cuda, small, caplog):
    provider = cuda(version=WITHOUT)
    OrtModel(small, device="cuda", threads=1)
    (record,) = told(caplog)
    assert "onnxruntime 1.29.0" in record.message and ">=1.30'" in record.message and not provider.graphs()


@pytest.mark.parametrize("kind", ["lazy", "made before"])
def test_graphs_with_branches_are_not_asked_to(cuda, random_model, tmp_path, caplog, kind):
    folder = Path(shutil.copytree(random_model("tiny", tiny())[1], tmp_path / "bundle"))
    if kind == "lazy":
        folder = tmp_path / "lazy"
        checkpoint = random_model("tiny", tiny())[0]
        build(BuildOptions(checkpoint, folder, precision="fp32", projection="lazy", check="none"))
    else:
        edit(folder, lambda manifest: manifest["parts"]["decoder"]["graphs"].pop(ONNXRUNTIME_CUDA))
    provider = cuda()
    model = OrtModel(Bundle(folder), device="cuda", threads=1)
    decoder = model.decoder(model.no_image(1), 64)
    assert np.isfinite(decoder.run(np.array([[5]])).logits).all()
    assert not provider.graphs() and not told(caplog)


def test_graphs_come_to_an_end(cuda, small, caplog, monkeypatch):
    """What was recorded goes on; what comes later runs operator by operator, and one line says so."""
    monkeypatch.setattr(captured, "MOST_GRAPHS", 2)
    provider = cuda()
    model = OrtModel(small, device="cuda", threads=1)
    decoders = [model.decoder(model.no_image(1), 64) for _ in range(4)]
    found = [decoder.run(np.array([[5]])).logits for decoder in decoders]
    assert all(np.array_equal(each, found[0]) for each in found) and provider.graphs() == 2
    (record,) = told(caplog)
    assert "2 CUDA graphs are recorded" in record.message
    decoders[0].run(np.array([[5]]))
    assert provider.launched() == 1


def test_threads_may_ask_at_the_same_time(cuda, bundle):
    """One graph for all of them, and nobody disturbs a recording."""
    provider = cuda()
    with Engine(bundle, device="cuda", threads=1) as engine:
        expected = [engine.generate(photo, "What is the number?", **ASKED).token_ids for photo in PHOTOS * 2]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda photo: engine.generate(photo, "What is the number?", **ASKED), PHOTOS * 2))
    assert [answer.token_ids for answer in found] == expected
    assert 1 <= provider.graphs() <= 16  # pairs of a desk and stores


def test_what_is_dropped_is_dropped_at_once(cuda, small):
    """No circle keeps a decoder, after an error either."""
    cuda()
    model = OrtModel(small, device="cuda", threads=1)
    gc.disable()
    try:
        decoder = model.decoder(model.no_image(1), 64)
        decoder.run(np.array([[5]]))
        with pytest.raises(BackendError):
            decoder.run(np.ones((1, 100), np.int64))
        del decoder
        assert len(model.part._desks[1, 64]) == 1
    finally:
        gc.enable()


def test_who_is_interrupted_waits_for_the_end():
    """As Ctrl-C finds it: the work is over when the error arrives."""
    thread, begun, done = OneThread("test"), threading.Event(), []

    def work() -> None:
        begun.set()
        threading.Event().wait(0.3)
        done.append(True)

    def interrupt() -> None:
        begun.wait()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        thread.do(work)
    assert done
    assert thread.do(lambda: thread.do(lambda: 5)) == 5  # within it, it does not wait for itself
