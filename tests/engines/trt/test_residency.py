"""Engines of the image parts that are in memory while an image is encoded, on the emulated driver."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from engines.bundle.folder import Bundle
from engines.errors import BundleError
from engines.residency import RESIDENCIES, SHARED
from engines.trt.engine import PartEngine
from engines.trt.model import TrtModel
from runtime import Engine
from tests.conftest import once
from tests.emulator import tensorrt as emulated
from tests.emulator.driver import Driver
from tests.emulator.tensorrt import install, with_plans
from tests.parity.requests import encode, request
from tests.runtime.questions import GEOMETRY, OPTIONS, OTHER, PHOTO, QUESTION, same

LARGE = 3 << 20  # bytes of scratch memory, more than the decoder's


@pytest.fixture(scope="module")
def bundle(random_model, shared) -> Path:
    plain = random_model("engine", GEOMETRY, tokenizer=True)[1]
    return once(shared / "engine-tensorrt", lambda folder: with_plans(plain, folder, "tensorrt"))


@pytest.fixture(params=[False, True], ids=["discrete", "integrated"])
def driver(request, monkeypatch) -> Driver:
    driver = Driver(integrated=request.param)
    install(driver, monkeypatch)
    return driver


@pytest.fixture
def opened(monkeypatch) -> Counter[str]:
    """How often each part was deserialised."""
    counted, plain = Counter[str](), PartEngine.__init__

    def count(self, trt, cuda, bundle, part, backend, plan) -> None:
        counted[part] += 1
        plain(self, trt, cuda, bundle, part, backend, plan)

    monkeypatch.setattr(PartEngine, "__init__", count)
    return counted


def test_answers_are_the_same_and_each_image_opens_them_once(driver, bundle, opened):
    kept, shared = (Engine(bundle, residency=residency) for residency in RESIDENCIES)
    assert opened == {"vision": 1, "pages": 1, "decoder": 2}
    for image in (PHOTO, OTHER, PHOTO):
        before = opened.copy()
        with kept.image(image) as theirs, shared.image(image) as ours:
            for question in (QUESTION, "and now?"):
                expected, found = (view.ask(question, **OPTIONS) for view in (theirs, ours))
                assert same(found, expected)
                assert expected.stats.opened_ms == 0.0
                assert (found.stats.opened_ms > 0.0) == (question == QUESTION)
        assert opened - before == {"vision": 1, "pages": 1}
    before = opened.copy()
    assert same(shared.generate(None, "hello", **OPTIONS), kept.generate(None, "hello", **OPTIONS))
    assert opened == before


@pytest.mark.parametrize("large", ["tiles", "hires_features"], ids=["vision", "pages"])
def test_their_memory_is_gone_before_decoding(driver, bundle, monkeypatch, large):
    """A part whose scratch memory is larger than the decoder's has its own while it is open; recorded steps go on."""
    made = emulated.Engine.__init__

    def larger(engine: emulated.Engine, *arguments) -> None:
        made(engine, *arguments)
        if large in engine.inputs:
            engine.device_memory_size_v2 = LARGE

    monkeypatch.setattr(emulated.Engine, "__init__", larger)
    tiles, ids, begin = request(GEOMETRY, seed=3, text=9, begin=3)
    held: dict[str, list[int]] = {}
    logits: dict[str, list[np.ndarray]] = {}
    for residency in RESIDENCIES:
        model = TrtModel(Bundle(bundle), "tensorrt", residency=residency)
        held[residency], logits[residency] = [driver.memory.bytes()], []
        for _ in range(2):
            image = encode(model, tiles, begin)
            held[residency].append(driver.memory.bytes())
            decoder = model.decoder(image, GEOMETRY.context)
            decoder.run(ids[:, :-1])
            logits[residency] += [decoder.run(ids[:, -1:], 4).logits for _ in range(4)]
            assert decoder._graph is not None
            del decoder, image
            gc.collect()
        del model
        gc.collect()
    assert all(map(np.array_equal, logits["all"], logits["shared"]))
    freed = [kept - shared for kept, shared in zip(held["all"], held["shared"], strict=True)]
    assert min(freed) >= LARGE - (1 << 16)  # less the decoder's, which is its own then


@pytest.mark.parametrize("driver", [False], indirect=True)
def test_an_image_has_the_memory_of_earlier_requests(driver, bundle, monkeypatch):
    """Caches that decoders have left, and the blank image of a text, are gone when a part is opened for the next."""
    engine, plain, found = Engine(bundle, residency=SHARED), PartEngine.__init__, list[int]()

    def weigh(self, trt, cuda, bundle, part, backend, plan) -> None:
        found.append(driver.memory.bytes())
        plain(self, trt, cuda, bundle, part, backend, plan)

    monkeypatch.setattr(PartEngine, "__init__", weigh)
    for image in (PHOTO, None, OTHER, PHOTO):
        engine.generate(image, QUESTION, **OPTIONS)
        gc.collect()
    vision = found[::2]
    assert len(vision) == 3 and vision[1:] == [vision[1]] * 2
    assert vision[1] - vision[0] < engine.model.decoder(engine.model.no_image(1), 8).nbytes


def test_with_slots(driver, bundle):
    alone, engine = Engine(bundle), Engine(bundle, slots=2, residency=SHARED)
    images = (PHOTO, OTHER, PHOTO)
    streams = [engine.stream(image, QUESTION, **OPTIONS) for image in images]
    for stream in streams:
        next(stream)
    for stream, image in zip(streams, images, strict=True):
        assert same(stream.answer(), alone.generate(image, QUESTION, **OPTIONS))
    assert not list(engine.model._images)


@pytest.mark.parametrize("driver", [False], indirect=True)
def test_an_engine_that_is_replaced_before_an_image_needs_it(driver, random_model, tmp_path):
    plain = random_model("engine", GEOMETRY, tokenizer=True)[1]
    folder = with_plans(plain, tmp_path / "bundle", "tensorrt")
    engine = Engine(folder, residency=SHARED)
    plan = folder / "vision.tensorrt.plan"
    (folder / "new").write_bytes(plan.read_bytes())
    (folder / "new").rename(plan)
    with pytest.raises(BundleError, match="was replaced since the bundle was opened"):
        engine.generate(PHOTO, QUESTION, **OPTIONS)
    assert engine.generate(None, "hello", **OPTIONS)
