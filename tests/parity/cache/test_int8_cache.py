"""The cache of ordinary tokens in 8 bits: whoever holds, counts, copies or enlarges one, and answers from it.

What it costs is no question here. The reference rounds as well, but what differs in its last bit may be a tie that goes
the other way, by a whole step: so caches are compared in steps, and logits to what a few of them move.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engines.bundle.folder import Bundle
from engines.bundle.kinds import ONNXRUNTIME, TENSORRT, TENSORRT_RTX
from engines.bundle.precision import FP32
from engines.errors import OptionError
from engines.ort import OrtModel
from engines.sizing.needs import Configuration, cache_bytes, store_bytes
from engines.trt.build import build_engines
from engines.trt.model import TrtModel
from engines.trt.options import EngineOptions
from export.build import BuildOptions, build
from export.checkpoint.config import read_config
from export.checkpoint.folder import Checkpoint
from export.network.reference import ReferenceModel
from runtime import Engine
from tests.conftest import once
from tests.emulator.driver import Driver
from tests.emulator.tensorrt import install, with_plans
from tests.parity.requests import encode, request
from tests.runtime.questions import OTHER, PHOTO, QUESTION, TALKATIVE

FEW_STEPS = 0.02  # of logits up to about 1


@pytest.fixture(scope="module")
def checkpoint(random_model):
    return random_model("int8-cache", TALKATIVE, tokenizer=True)[0]


@pytest.fixture(scope="module")
def bundles(checkpoint, shared):
    """bundles(**knobs) -> a bundle with an int8 cache, in float32 if the knobs do not say otherwise."""

    def get(**knobs: object):
        knobs = {"precision": "fp32", "check": "none"} | knobs
        out = shared / "-".join(map(str, ("int8-cache", *knobs.values())))
        return once(out, lambda _: build(BuildOptions(checkpoint, out, kv_cache="int8", **knobs)))

    return get


@pytest.fixture
def model(bundles) -> OrtModel:
    return OrtModel(Bundle(bundles()))


def prefilled(model):
    """A decoder that has seen a made-up prompt but for its last token, and that token [1, 1]."""
    tiles, ids, begin = request(model.geometry, seed=3)
    decoder = model.decoder(encode(model, tiles, begin), ids.shape[1] + 8)
    decoder.run(ids[:, :-1])
    return decoder, ids[:, -1:]


def held(decoder) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in decoder._cache.items()}


def test_it_takes_what_the_plan_counts(model, bundles, monkeypatch, tmp_path):
    g, decoder = model.geometry, model.decoder(model.no_image(2), 100)
    values, scales = 2 * g.layers * 2 * g.kv_heads * decoder.capacity * np.array([g.head_dim, 4])
    by_dtype = {kind: [a for a in held(decoder).values() if a.dtype == kind] for kind in (np.int8, np.float32)}
    assert [sum(array.nbytes for array in arrays) for arrays in by_dtype.values()] == [values, scales]
    assert decoder.nbytes == values + scales

    def counted(tokens: int, **rows: int) -> Configuration:
        return Configuration(replace(g, context=tokens), FP32, backend=ONNXRUNTIME, **rows)

    assert decoder.nbytes == cache_bytes(counted(decoder.capacity, batch=2))
    slots = model.slots(3)
    one = counted(slots.row(0).capacity)
    image = store_bytes(one) + 4 * g.image_tokens * g.hidden
    assert slots.nbytes == 3 * (cache_bytes(one) + image) and slots.row(2).nbytes == cache_bytes(one)
    assert slots.keep(1, 70).nbytes == cache_bytes(counted(70))
    install(Driver(), monkeypatch)
    engines = TrtModel(Bundle(with_plans(bundles(), tmp_path / "engines", TENSORRT)), TENSORRT)
    blank = engines.no_image(2)
    assert engines.decoder(blank, 100).nbytes == cache_bytes(Configuration(g, FP32, batch=2, backend=TENSORRT))


def test_it_is_that_of_the_reference(model, checkpoint):
    config = read_config(checkpoint)
    reference = ReferenceModel(model.geometry, Checkpoint.open(checkpoint, config.tower_folder))
    (ours, last), (theirs, _) = prefilled(model), prefilled(reference)
    for _ in range(3):
        found, wanted = ours.run(last, 16), theirs.run(last, 16)
        assert np.abs(found.logits - wanted.logits).max() <= FEW_STEPS
        last = wanted.token[:, None]
    used, layers, cache = int(ours.length[0]), model.geometry.layers, held(ours)
    for half, stores in (("key", theirs._key), ("value", theirs._value)):
        for layer in range(layers):
            kept, steps = (cache[f"past_{half}{kind}.{layer}"][:, :, :used] for kind in ("", "_scale"))
            other, their_steps = (stores[index].numpy()[:, :, :used] for index in (layer, layers + layer))
            moved = np.abs(kept.astype(int) - other)
            assert moved.max() <= 2 and moved.mean() < 0.02
            np.testing.assert_allclose(steps, their_steps, rtol=0.02)


def test_a_larger_one_holds_what_the_smaller_held(model):
    (decoder, last), (other, _) = prefilled(model), prefilled(model)
    before, used = held(decoder), int(decoder.length[0])
    larger = other.enlarged(decoder.capacity + 100)
    for name, cache in held(larger).items():
        assert np.array_equal(cache[:, :, :used], before[name][:, :, :used]), name
        assert cache[:, :, :used].any() and not cache[:, :, used:].any(), name
    found, wanted = larger.run(last, 16), decoder.run(last, 16)
    assert np.array_equal(found.cells(), wanted.cells()) and np.abs(found.logits - wanted.logits).max() <= FEW_STEPS


def test_rows_are_copied_and_put_back_whole(model):
    tiles, ids, begin = request(model.geometry, seed=3)
    slots, image, used = model.slots(3), encode(model, tiles, begin), ids.shape[1] - 1
    slots.load(1, image)
    slots.row(1).run(ids[:, :-1])
    kept, before = slots.keep(1, used), {name: cache[1].copy() for name, cache in slots._cache.items()}
    slots.copy(1, 2, used - 5, image=True)
    slots.load(1, model.no_image(1))
    slots.row(1).run(np.full((1, used + 2), 7))
    for row, tokens in ((0, used), (2, used - 5)):
        if row == 0:
            slots.load(0, image)
            kept.restore(0, tokens)
        for name, cache in slots._cache.items():
            assert cache[row, :, :tokens].any()
            assert np.array_equal(cache[row, :, :tokens], before[name][:, :tokens]), (row, name)
    slots.row(2).run(ids[:, used - 5 : -1])
    step = slots.first(3).run(np.repeat(ids[:, -1:], 3, axis=0), np.array([16, 0, 16]))
    assert np.abs(step.logits[0] - step.logits[2]).max() <= FEW_STEPS


def test_tensorrt_alone_has_none(bundles):
    with pytest.raises(OptionError, match="built with --kv-cache int8: TensorRT alone updates no int8 cache") as caught:
        build_engines(bundles(), EngineOptions(TENSORRT_RTX, plugins=False), quiet=True)
    assert "leave out --no-plugins" in caught.value.fix


@pytest.mark.parametrize(
    "knobs",
    [
        {"precision": "fp16"},
        {"kv": "int8"},
        {"projection": "lazy"},
        {"projection": "lazy", "kv": "int8"},
        {"precision": "int4", "block_size": 16, "kv": "int8"},
    ],
    ids=lambda knobs: "-".join(map(str, knobs.values())),
)
def test_engines_answer(bundles, knobs):
    """Alone and from slots, several questions and a conversation, whose cache is put aside for other images."""
    path, options = bundles(**knobs), {"max_new_tokens": 4, "trace": True, "stop_at_eos": False}
    alone, slots = Engine(path), Engine(path, slots=2)
    for image, budget in ((PHOTO, 16), (OTHER, 3), (None, 0)):
        wanted, found = (e.generate(image, QUESTION, page_budget=budget, **options) for e in (alone, slots))
        assert np.isfinite(wanted.trace.logits).all()
        assert np.abs(wanted.trace.logits[0] - found.trace.logits[0]).max() <= FEW_STEPS
    chats = [engine.image(PHOTO).chat() for engine in (alone, slots)]
    first = [chat.ask(QUESTION, **options) for chat in chats]
    for image in (OTHER, OTHER[::-1], OTHER[:, ::-1]):  # both rows are taken from the photo
        slots.generate(image, QUESTION, **options)
    again = [chat.ask("and where?", **options) for chat in chats]
    assert all(answer.stats.reused_tokens > TALKATIVE.image_tokens for answer in again)
    if first[0].token_ids == first[1].token_ids:  # else the conversations are two
        assert np.abs(again[0].trace.logits[0] - again[1].trace.logits[0]).max() <= FEW_STEPS
