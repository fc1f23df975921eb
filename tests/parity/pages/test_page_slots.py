"""Fewer slots than pages: the answers of a store of all, as long as the slots hold what a step selects."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from engines.bundle.folder import Bundle
from engines.bundle.precision import FP32
from engines.errors import BackendError, OptionError
from engines.ort import OrtModel
from engines.ort.decoder import OrtDecoder
from engines.sizing.needs import Configuration, store_bytes
from export.build import BuildOptions, build
from runtime import Engine
from tests.conftest import once
from tests.parity.official import CASES, recorded

MOST = 64  # pages a layer that is read from selects in a step of the official runs
FEW = 12


@pytest.fixture(scope="session")
def in_slots(shared, checkpoint):
    """in_slots(name, slots, kv="model") -> float32 bundle with lazy pages in so many slots, None: a place for each."""

    def get(name: str, slots: int | None, kv: str = "model"):
        out, check = shared / f"{name}-slots-{slots}-{kv}", "parity" if slots == FEW else "none"
        options = BuildOptions(
            checkpoint(name), out, precision="fp32", projection="lazy", kv=kv, page_slots=slots, check=check
        )
        return once(out, lambda _: build(options))

    return get


def same_pages(slotted, whole) -> None:
    """That the slots of a decoder hold what another has projected, to the last bit."""
    tables, done = slotted._inputs["projected"].numpy()[0], whole._inputs["projected"].numpy()[0]
    g = slotted._part.geometry
    names = "page_key", "page_value", *(("page_key_scale", "page_value_scale") if g.int8_pages else ())
    for index, layer in enumerate(g.reading_layers):
        place, used = tables[index]
        held = place > 0
        assert np.array_equal(used > 0, done[index] == 1)  # selected at some time
        assert held.sum() == min(done[index].sum(), g.page_slots) and not (held & (used == 0)).any()
        assert len(set(place[held])) == held.sum() and place.max() <= g.page_slots
        for name in names:
            ours, theirs = (each._inputs[f"{name}.{layer}"].numpy()[0] for each in (slotted, whole))
            assert np.array_equal(ours[:, place[held] - 1], theirs[:, held]), (name, layer)


@pytest.mark.parametrize("kv", ["model", "int8"])
def test_official_runs(in_slots, kv):
    turnover = np.zeros(2, np.int64)
    for case in map(recorded, CASES):
        model, whole = (OrtModel(Bundle(in_slots(case.weights, slots, kv))) for slots in (MOST, None))
        g = model.geometry
        runs = zip(case.replay(model, g), case.replay(whole, whole.geometry), strict=True)
        for (step, decoder, found), (_, other, expected) in runs:
            assert np.array_equal(found.cells(), expected.cells()), (case.name, step)
            assert np.array_equal(found.token, expected.token)
            assert np.abs(found.logits - expected.logits).max() <= 1e-5
            if kv == "model":
                assert np.array_equal(found.cells()[0], case.cells(step))
                assert found.token[0] == case.golden["output_ids"][step + 1]
            assert expected.turnover is None
            turnover += found.turnover.sum((0, 1))
            if step == len(case.golden["logits"]) - 1:
                same_pages(decoder, other)
    assert (turnover > 0).all()


@pytest.mark.parametrize("kv", ["model", "int8"])
def test_random_schedules(in_slots, kv):
    """Tokens, budgets and steps back at random: with few slots nearly every step takes pages away."""
    case = recorded("landscape")
    model, whole = (OrtModel(Bundle(in_slots("plain", slots, kv))) for slots in (FEW, None))
    g, rng, ids = model.geometry, np.random.default_rng(7), case.ids(model.geometry)
    decoders = [each.decoder(case.encode(each, g), ids.shape[1] + 40) for each in (model, whole)]
    for each in decoders:
        each.run(ids[:, :-1])
    begin, turnover, again, seen = int(decoders[0].length[0]), 0, 0, np.zeros((len(g.reading_layers), g.pages), bool)
    for _ in range(40):
        back, budget = int(rng.integers(0, 3)), int(rng.integers(0, FEW + 1))
        token = rng.integers(3, g.vocab, (1, 1))
        for each in decoders:
            each.length[:] = max(begin, int(each.length[0]) - back)
        found, expected = (each.run(token, budget) for each in decoders)
        assert np.array_equal(found.cells(), expected.cells())
        assert np.array_equal(found.token, expected.token)
        assert np.abs(found.logits - expected.logits).max() <= 1e-5
        same_pages(*decoders)
        evicted, repeated = found.turnover[0].sum(0)
        seen |= found.cells()[0, :-1]
        turnover, again = turnover + evicted, again + repeated
    held = (decoders[0]._inputs["projected"].numpy()[0][:, 0] > 0).sum()
    assert turnover == seen.sum() + again - held and again > 100  # what was projected, less what is still there


def test_a_step_that_selects_more_says_so_and_the_engine_goes_on(in_slots):
    engine, case = Engine(in_slots("plain", FEW)), recorded("landscape")
    options = {"input_ids": case.golden["input_ids"].tolist(), "max_new_tokens": 6, "stop_at_eos": False}
    whole = Engine(in_slots("plain", None)).generate(case.image, **options, page_budget=FEW)
    with engine.image(case.image) as view:
        for ask in (view.ask, lambda **_: view.score(input_ids=options["input_ids"], continuation_ids=[[5, 6]])):
            with pytest.raises(OptionError, match=rf"selects \d+ pages of 81(.|\n)*at most {FEW}.*slots") as error:
                ask(**options)
            assert f"page_budget={FEW}" in error.value.fix
        answer = view.ask(**options, page_budget=FEW)  # as the fix says
    assert answer.token_ids == whole.token_ids and answer.stats.pages_read.max() == FEW
    assert np.array_equal(answer.stats.pages_read, whole.stats.pages_read)
    stats = answer.stats
    assert stats.pages_evicted > stats.pages_projected_again > 0 == whole.stats.pages_evicted
    assert f"{stats.pages_evicted} evicted, {stats.pages_projected_again} projected again" in str(stats)
    assert engine.generate(None, input_ids=[1, 5, 9], max_new_tokens=3, stop_at_eos=False).stats.pages_evicted == 0


def test_what_a_failed_run_has_written_is_not_taken_for_what_was_there(in_slots, monkeypatch):
    """Pages that it put in the places of others, before what says so was written."""
    engine, case, step, steps = Engine(in_slots("plain", FEW)), recorded("landscape"), OrtDecoder._step, []
    options = {"max_new_tokens": 6, "stop_at_eos": False, "page_budget": FEW, "trace": True}
    first, other = case.golden["input_ids"].tolist(), [1, -200, 5, 7]
    expected = engine.generate(case.image, input_ids=first, **options)

    def fail(decoder: OrtDecoder) -> None:
        table = decoder._inputs["projected"].numpy().copy()
        step(decoder)
        steps.append(decoder)
        if len(steps) == 2:
            assert not np.array_equal(decoder._inputs["projected"].numpy(), table)
            decoder._inputs["projected"].update_inplace(table)
            raise BackendError("the device is gone")

    with engine.image(case.image) as view:
        view.ask(input_ids=first, **options)
        with monkeypatch.context() as patch:
            patch.setattr(OrtDecoder, "_step", fail)
            with pytest.raises(BackendError, match="the device is gone"):
                view.ask(input_ids=other, **options)
        assert not steps[-1]._inputs["projected"].numpy().any()
        answer = view.ask(input_ids=first, **options)
    assert answer.token_ids == expected.token_ids
    assert np.array_equal(answer.trace.cells, expected.trace.cells)
    assert np.abs(answer.trace.logits - expected.trace.logits).max() <= 1e-5


def test_requests_that_share_steps(in_slots):
    """Each row of an engine's slots has page slots of its own; one that selects too much fails alone."""
    engine, whole = Engine(in_slots("plain", FEW), slots=3), Engine(in_slots("plain", None))
    cases = [recorded(name) for name in ("landscape", "portrait", "square")]
    options = {"max_new_tokens": 6, "stop_at_eos": False, "page_budget": FEW}
    asked = [(case.image, {"input_ids": case.golden["input_ids"].tolist(), **options}) for case in cases]
    streams = [engine.stream(image, **request) for image, request in asked]
    image, request = asked[0]
    for stream in streams:
        stream.join()
    answers = [stream.answer() for stream in streams]
    for answer, (image, request) in zip(answers, asked, strict=True):
        assert answer.token_ids == whole.generate(image, **request).token_ids
        assert answer.stats.pages_evicted > 0
    good, bad = engine.stream(image, **request), engine.stream(image, **{**request, "page_budget": 81})
    for stream in (good, bad):
        stream.join()
    with pytest.raises(OptionError, match="at most 12"):
        bad.answer()
    assert good.answer().token_ids == answers[-1].token_ids


def test_threads_that_ask_one_view(in_slots):
    """Their decoders share its pages: none takes a page away while another reads it."""
    engine, case = Engine(in_slots("plain", FEW)), recorded("landscape")
    questions = [[1, -200, 5, each] for each in (7, 9, 11)]
    options = {"max_new_tokens": 10, "stop_at_eos": False, "page_budget": FEW}
    expected = [engine.generate(case.image, input_ids=ids, **options).token_ids for ids in questions]
    with engine.image(case.image) as view:
        view.ask(input_ids=questions[0], **options)
        found: list[list[list[int]]] = [[] for _ in questions]

        def ask(index: int) -> None:
            for _ in range(4):
                found[index].append(view.ask(input_ids=questions[index], **options).token_ids)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(questions))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [[each] * 4 for each in expected]


def test_the_store_has_the_size_that_was_counted(in_slots):
    model, case = OrtModel(Bundle(in_slots("plain", FEW))), recorded("square")
    pages = case.encode(model, model.geometry).pages
    stored = [value for name, value in pages.items() if name.startswith(("page_key", "page_value", "projected"))]
    assert sum(map(model.nbytes, stored)) == store_bytes(Configuration(model.geometry, FP32))
