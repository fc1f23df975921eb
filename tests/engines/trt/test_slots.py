"""Slots on the emulated TensorRT: rows that come and go have the steps they have alone, and see nothing of each other.

With real kernels on a GPU: tests/parity/gpu/test_tensorrt.py.
"""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest

from engines.backend import Image, Model, Step
from engines.bundle.folder import Bundle
from engines.errors import BackendError
from engines.ort import OrtModel
from engines.trt.engine import Context
from engines.trt.model import TrtModel
from export.build import BuildOptions, build
from runtime import Engine
from tests.conftest import once
from tests.emulator.driver import Driver
from tests.emulator.tensorrt import install, with_plans
from tests.parity.requests import encode, load, request
from tests.runtime.questions import GEOMETRY, OPTIONS, OTHER, PHOTO, QUESTION, same

STEPS, COUNT = 4, 4
ODD = replace(GEOMETRY, context=201)  # a row of its cache is no multiple of 256 bytes
KINDS = {
    "lazy": {"projection": "lazy"},
    "lazy-int8": {"projection": "lazy", "kv": "int8"},
    "lazy-int8-both": {"projection": "lazy", "kv": "int8", "kv_cache": "int8"},
    "odd-int8-cache": {"kv_cache": "int8"},
    "page-slots": {"projection": "lazy", "page_slots": 3},
    "page-slots-int8": {"projection": "lazy", "page_slots": 3, "kv": "int8"},
}
FEW_STEPS = 0.02  # of logits, where a key that differs in its last bit may be stored a step of 127 away


@pytest.fixture(scope="module")
def bundles(random_model, shared):
    """bundles(kind, **change) -> a bundle with emulated engines for COUNT rows, its build's knobs those of KINDS, "odd"
    ones with a context of ODD; `change`: of with_plans."""

    def get(kind: str, **change: object):
        odd = kind.startswith("odd")
        checkpoint, plain = random_model(f"engine{'-odd' if odd else ''}", ODD if odd else GEOMETRY, tokenizer=True)
        if kind in KINDS:
            options = BuildOptions(checkpoint, shared / f"engine-{kind}", precision="fp32", **KINDS[kind])
            plain = once(options.out, lambda _: build(options))
        change = {"backend": "tensorrt", "most": COUNT, **change}
        folder = shared / "-".join(map(str, ("slots", kind, *change.values())))
        return once(folder, lambda folder: with_plans(plain, folder, **change))

    return get


@pytest.fixture
def driver(monkeypatch) -> Driver:
    driver = Driver()
    install(driver, monkeypatch)
    return driver


@dataclass
class Asked:
    """A made-up request, and what it answers alone."""

    image: Image
    ids: np.ndarray
    budget: int
    alone: list[Step]
    row: int = -1
    at: int = 0  # of `alone`: the next step

    @property
    def token(self) -> int:
        """What the next step takes."""
        return int(self.alone[self.at - 1].token[0]) if self.at else int(self.ids[0, -1])


def made(model: Model, seed: int, text: int) -> Image:
    """The image of a request made up from a seed."""
    tiles, _, begin = request(model.geometry, seed, text)
    return encode(model, tiles, begin, (seed % 3, 1))


def asked(model: Model, seed: int, budget: int, text: int = 9, *, image=None, ids=None, steps: int = STEPS) -> Asked:
    """A request made up from a seed, but for the image and the ids that are given."""
    image = made(model, seed, text) if image is None else image
    ids = request(model.geometry, seed, text)[1] if ids is None else ids
    decoder = model.decoder(image, ids.shape[1] + steps)
    decoder.run(ids[:, :-1])
    found = Asked(image, ids, budget, [])
    for found.at in range(steps):
        step = decoder.run(np.array([[found.token]]), budget)
        assert np.isfinite(step.logits).all()
        found.alone.append(step)
    found.at = 0
    return found


def join(slots, it: Asked, row: int, *pieces: int, load: bool = True) -> None:
    """Load a request into a row, and prefill it in pieces: those named, then the rest."""
    it.row, it.at = row, 0
    if load:
        slots.load(row, it.image)
    decoder = slots.row(row)
    ends = [*np.cumsum(pieces, dtype=int), it.ids.shape[1] - 1]
    for begin, end in zip([int(decoder.length[0]), *ends], ends, strict=False):
        decoder.run(it.ids[:, begin:end])
    assert slots.length[row] == it.ids.shape[1] - 1


def step(slots, *requests: Asked, within: float = 1e-5) -> None:
    """A step of these, and of whoever has a row below; each has its step of when it was alone."""
    rows = max(it.row for it in requests) + 1
    tokens, budgets, before = np.zeros((rows, 1), np.int64), np.zeros(rows, np.int64), slots.length.copy()
    for it in requests:
        tokens[it.row], budgets[it.row] = it.token, it.budget
    found = slots.first(rows).run(tokens, budgets)
    assert found.token.shape == (rows,) and found.logits.shape[0] == rows
    moved = slots.length - before
    assert moved[:rows].tolist() == [1] * rows and not moved[rows:].any()
    slots.length[[row for row in range(rows) if row not in {it.row for it in requests}]] -= 1
    for it in requests:
        wanted, it.at = it.alone[it.at], it.at + 1
        assert found.token[it.row] == wanted.token[0]
        assert np.array_equal(found.cells()[it.row], wanted.cells()[0])
        if wanted.turnover is not None:
            assert np.array_equal(found.turnover[it.row], wanted.turnover[0])
        assert np.abs(found.logits[it.row] - wanted.logits[0]).max() <= within


def poison(model: TrtModel, slots, *rows: int) -> None:
    """Fill all that these rows hold with NaN, and nothing else."""
    for row in rows:
        for array in slots._of(row).values():
            if array.dtype.startswith("float"):
                array.memory.fill(0xFF, model.stream, array.address - array.memory.address, array.nbytes)
    model.stream.wait()


def held(model: TrtModel, slots, row: int) -> dict[str, np.ndarray]:
    return {name: array.numpy(model.stream) for name, array in slots._of(row).items()}


@pytest.mark.parametrize("kind", ["eager", "odd", "odd-int8-cache"])
def test_rows_come_and_go(driver, bundles, kind):
    model = TrtModel(Bundle(bundles(kind)), "tensorrt")
    slots = model.slots(COUNT)
    step_all = partial(step, slots, within=FEW_STEPS if kind.endswith("int8-cache") else 1e-5)
    first, second = asked(model, 0, 16), asked(model, 1, 3, text=14)
    third, fourth = asked(model, 2, 16, text=5), asked(model, 4, 7)
    poison(model, slots, 0, 1, 2, 3)
    join(slots, first, 2, 5, 1, 20)
    step_all(first)  # beside rows that nobody has
    join(slots, second, 0)
    step_all(first, second)
    join(slots, third, 1, 1)
    step_all(third, second)  # the other waits
    step_all(first, second, third)
    join(slots, fourth, 2, 30)  # in place of one that leaves in the middle
    step_all(fourth, third)
    fifth = replace(first)  # the same question again, about the same image
    join(slots, fifth, 3)
    step_all(second, fourth)
    step_all(third, fourth, fifth)
    step_all(fifth, fourth)
    assert [it.at for it in (first, second, third, fourth, fifth)] == [3, 4, 4, 4, 2]
    assert slots.nbytes == sum(array.nbytes for array in slots._arrays.values())


def test_rows_of_the_reference(random_model):
    """The oracle has slots, too: rows that run one after the other."""
    model = load(random_model("engine", GEOMETRY, tokenizer=True)[0])
    slots, first, second = model.slots(3), asked(model, 0, 16), asked(model, 1, 3, text=14)
    join(slots, first, 2, 5, 1)
    join(slots, second, 0)
    step(slots, first, second)
    again = replace(first, row=1)
    slots.copy(2, 1, int(slots.length[2]), image=True)
    step(slots, again, second)
    step(slots, first, again)
    slots.length[1] = GEOMETRY.context
    with pytest.raises(BackendError, match="1 more tokens"):
        slots.first(2).run(np.zeros((2, 1), np.int64))
    assert slots.length[0] == second.ids.shape[1] + 1 and slots.nbytes > slots.first(3).nbytes > slots.row(0).nbytes


@pytest.mark.parametrize("kind", ["odd", "odd-int8-cache"])
def test_a_row_writes_into_itself_alone(driver, bundles, kind):
    """Prefill and single steps of a row, and a load, leave every byte of its neighbours as it was."""
    model = TrtModel(Bundle(bundles(kind)), "tensorrt")
    slots, it = model.slots(3), asked(model, 0, 16)
    poison(model, slots, 0, 2)
    before = [held(model, slots, row) for row in (0, 2)]
    join(slots, it, 1, 7)
    found = slots.row(1).run(np.array([[it.token]]), it.budget)
    assert np.abs(found.logits - it.alone[0].logits).max() <= (FEW_STEPS if kind.endswith("int8-cache") else 1e-5)
    for row, kept in zip((0, 2), before, strict=True):
        for name, array in held(model, slots, row).items():
            assert np.array_equal(array, kept[name], equal_nan=True), (row, name)
    assert slots.length.tolist() == [0, it.ids.shape[1], 0]


@pytest.mark.parametrize("kind", ["odd", "odd-int8-cache"])
def test_what_is_copied_goes_on_as_its_source(driver, bundles, kind):
    model = TrtModel(Bundle(bundles(kind)), "tensorrt")
    slots = model.slots(3)
    step_all = partial(step, slots, within=FEW_STEPS if kind.endswith("int8-cache") else 1e-5)
    first = asked(model, 0, 16)
    other, shared = request(model.geometry, 3)[1], first.ids.shape[1] - 6  # another question about the image
    second = asked(model, 3, 16, image=first.image, ids=np.concatenate((first.ids[:, :shared], other[:, shared:]), 1))
    join(slots, first, 2)
    step_all(first)
    poison(model, slots, 0)
    slots.copy(2, 0, shared, image=True)
    assert slots.length.tolist() == [shared, 0, first.ids.shape[1]]
    join(slots, second, 0, load=False)
    step_all(first, second)
    again = replace(first, at=0, row=0)
    slots.copy(2, 0, first.ids.shape[1] - 1, image=False)  # it has the image
    for _ in range(2):
        step_all(again, first)


@pytest.mark.parametrize("integrated", [False, True])
def test_few_graphs_are_recorded_and_nothing_grows(bundles, monkeypatch, integrated):
    driver = Driver(integrated=integrated)
    install(driver, monkeypatch)
    model = TrtModel(Bundle(bundles("eager")), "tensorrt")
    slots, tokens = model.slots(COUNT), np.full((COUNT, 1), 7)
    for rows in (1, 2, 3, 4, 3):
        for _ in range(3):
            slots.first(rows).run(tokens[:rows])
    assert driver.counts["cuGraphInstantiate"] == 3  # 1, 2, 4
    before = driver.counts.copy()
    for rows in (4, 1, 3, 2, 3):
        result = slots.first(rows).run(tokens[:rows])
    spent = driver.counts - before
    assert spent["cuGraphLaunch"] == spent["cuEventSynchronize"] == 5
    assert not any(spent[name] for name in spent if "Alloc" in name or "Memcpy" in name or "Stream" in name)
    assert result.logits.shape == (3, GEOMETRY.vocab)
    old = slots.first(2).run(tokens[:2])
    slots.row(3).run(tokens[:1])  # where logits lie is shared
    with pytest.raises(BackendError, match="a step that is over"):
        _ = old.logits
    assert slots.first(3).enlarged(GEOMETRY.context).length.base is not None
    with pytest.raises(BackendError, match="fewer tokens"):
        slots.first(3).enlarged(GEOMETRY.context + 1)


def test_a_full_row_is_not_written_to(driver, bundles):
    """Three rows step with the graph of four as long as the fourth has room for what it is made to write."""
    model = TrtModel(Bundle(bundles("eager")), "tensorrt")
    slots, tokens = model.slots(COUNT), np.full((3, 1), 7)
    slots.length[3] = GEOMETRY.context
    poison(model, slots, 3)
    slots.first(3).run(tokens)
    assert all(np.isnan(array).all() for array in held(model, slots, 3).values())
    slots.length[3] -= 1
    slots.first(3).run(tokens)
    cache = held(model, slots, 3)["past_key.0"]
    assert np.isfinite(cache[:, :, -1]).all() and np.isnan(cache[:, :, :-1]).all()
    assert slots.length.tolist() == [2, 2, 2, GEOMETRY.context - 1]
    slots.length[:] = GEOMETRY.context
    with pytest.raises(BackendError, match="1 more tokens"):
        slots.first(3).run(tokens)
    with pytest.raises(BackendError, match="1 more tokens"):
        slots.row(0).run(tokens[:1])
    assert slots.length.tolist() == [GEOMETRY.context] * COUNT


def test_prompts_side_by_side(driver, bundles):
    """Several rows prefilled in one run, padded at their end, take only those rows along."""
    model = TrtModel(Bundle(bundles("eager")), "tensorrt")
    slots, both = model.slots(COUNT), [asked(model, 0, 16), asked(model, 1, 3, text=14)]
    poison(model, slots, 2, 3)
    ids, lengths = np.zeros((2, max(it.ids.shape[1] for it in both) - 1), np.int64), []
    for row, it in enumerate(both):
        slots.load(row, it.image)
        it.row = row
        lengths.append(it.ids.shape[1] - 1)
        ids[row, : lengths[-1]] = it.ids[0, :-1]
    slots.first(2).run(ids, lengths=np.array(lengths))
    assert slots.length.tolist() == [*lengths, 0, 0]
    step(slots, *both)
    step(slots, *both)


def test_what_is_refused(bundles, monkeypatch):
    install(Driver(), monkeypatch)
    folder = bundles("eager")
    with pytest.raises(BackendError, match=r"batch = 5(.|\n)*1 \.\. 4(.|\n)*engines\.build .* --batch 5"):
        Engine(folder, slots=5)
    install(Driver(total=2_000_000), monkeypatch)
    with pytest.raises(
        BackendError, match=r"4 slots of 200 tokens and 16 pages needs(.|\n)*fewer slots(.|\n)*--context"
    ):
        Engine(folder, slots=4)


@pytest.mark.parametrize("kind", ["lazy", "lazy-int8", "lazy-int8-both", "page-slots", "page-slots-int8"])
def test_with_kernels(driver, bundles, kind):
    """Pages of each row are projected into its own store when it selects them, and go along when it is copied."""
    folder = bundles(kind, backend="tensorrt-rtx", most=2, plugins=True)
    model, theirs = TrtModel(Bundle(folder), "tensorrt-rtx"), OrtModel(Bundle(folder))
    slots = model.slots(2)
    first, second = (
        replace(asked(theirs, seed, budget, text, steps=3), image=made(model, seed, text))
        for seed, budget, text in ((0, 3, 5), (1, 2, 3))
    )
    poison(model, slots, 0, 1)
    join(slots, first, 1)
    join(slots, second, 0)
    within = FEW_STEPS if kind.endswith("both") else 2e-4
    step(slots, first, within=within)
    step(slots, first, second, within=within)
    done = [held(model, slots, row)["projected"] for row in (0, 1)]
    assert done[0].any() and done[1].any() and not np.array_equal(*done)
    slots.copy(1, 0, int(slots.length[1]), image=True)
    step(slots, first, replace(first, row=0), within=within)
    if kind.startswith("page-slots"):
        assert sum(each.turnover.sum(axis=(0, 1)) for it in (first, second) for each in it.alone).min() > 0


def test_what_a_failed_run_has_written_is_not_taken_for_what_was_there(driver, bundles, monkeypatch):
    """An engine fails once the one before it has put pages in the places of others; older steps are asked again."""
    folder = bundles("page-slots", backend="tensorrt-rtx", most=2, plugins=True, layers_per_engine=3)
    model, theirs = TrtModel(Bundle(folder), "tensorrt-rtx"), OrtModel(Bundle(folder))
    it = asked(theirs, 0, 3, 5, steps=3)
    image, last, enqueue = made(model, 0, 5), model._decoder.engine.links[-1], Context.enqueue
    model._decoder.captures = False  # a step is asked for engine by engine

    def fail(context: Context, stream: object) -> None:
        if context._part is last:
            raise BackendError("the device is gone")
        enqueue(context, stream)

    decoder = model.decoder(image, it.ids.shape[1] + STEPS)
    decoder.run(it.ids[:, :-1])
    for it.at in (0, 1):
        decoder.run(np.array([[it.token]]), it.budget)
    it.at, before, expected = 2, decoder.length.copy(), it.alone
    with monkeypatch.context() as patch:
        patch.setattr(Context, "enqueue", fail)
        with pytest.raises(BackendError, match="the device is gone"):
            decoder.run(np.array([[it.token]]), it.budget)
    assert np.array_equal(decoder.length, before)
    assert not image.pages["projected"].numpy(model.stream).any()
    decoder.length -= 2
    for it.at, wanted in enumerate(expected):
        found = decoder.run(np.array([[it.token]]), it.budget)
        assert found.token[0] == wanted.token[0] and np.array_equal(found.cells(), wanted.cells())
        assert np.abs(found.logits - wanted.logits).max() <= 2e-4


# Through the public interface, from several threads.


class Slow(Driver):
    """A driver that lets other threads run while one waits for it."""

    def cuEventSynchronize(self, event: int) -> tuple:
        self._calling.release()  # a thread that waits for the device stops no other
        try:
            time.sleep(0.001)
        finally:
            self._calling.acquire()
        return super().cuEventSynchronize(event)


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_threads_take_turns_on_the_device(bundles, monkeypatch, slots):
    """Vision and projection of one request, and steps and prefill of others, never meet in the stream: the emulated
    driver would say so. The answers are those of one request at a time."""
    install(Driver(), monkeypatch)
    alone = Engine(bundles("eager"))
    jobs = [(PHOTO, QUESTION), (OTHER, "and what is that?"), (None, "hello"), (PHOTO[:, ::-1], QUESTION)] * 2
    options = [OPTIONS | {"page_budget": budget} for budget in (16, 3, 0, 16, 2, 16, 0, 5)]
    options = [each | {"temperature": 1.2, "seed": 5} if index % 3 == 1 else each for index, each in enumerate(options)]
    wanted = [alone.generate(*job, **each) for job, each in zip(jobs, options, strict=True)]
    install(Slow(), monkeypatch)
    engine = Engine(bundles("eager"), slots=slots, prefill_chunk=20)
    begin = threading.Barrier(len(jobs))

    def ask(job, options):
        begin.wait()
        return engine.generate(*job, **options)

    with ThreadPoolExecutor(len(jobs)) as threads:
        found = list(threads.map(ask, jobs, options))
    assert all(map(same, wanted, found))
    for answer in found:
        assert answer.stats.prefill_device_ms >= 0 and len(answer.stats.decode_ms) == OPTIONS["max_new_tokens"]


@pytest.mark.parametrize("seed", range(8))
def test_random_schedules(bundles, monkeypatch, seed):
    """Streams that begin, wait and are dropped half-way, about images that are kept or encoded anew: every answer that
    is read to its end is the one it is alone."""
    draw = random.Random(seed)
    images, prompts = {"photo": PHOTO, "other": OTHER, "none": None}, [QUESTION, QUESTION + " and where?", "x" * 60]
    install(Driver(), monkeypatch)
    alone, engine = Engine(bundles("eager")), Engine(bundles("eager"), slots=3, prefill_chunk=30)
    views, running, begun = {name: engine.image(image) for name, image in images.items()}, [], 0
    while begun < 12 or running:
        if begun < 12 and draw.random() < 0.3:
            name, prompt = draw.choice(list(images)), draw.choice(prompts)
            options = OPTIONS | {"max_new_tokens": draw.randrange(1, 9), "page_budget": draw.choice((0, 2, 16))}
            if draw.random() < 0.3:
                options |= {"temperature": 0.9, "seed": seed}
            view = views[name] if draw.random() < 0.7 else engine.image(images[name])
            stream = view.stream(prompt, **options)
            running.append((stream, stream.steps(), images[name], prompt, options))
            begun += 1
        elif running:
            stream, steps, image, prompt, options = chosen = draw.choice(running)
            if draw.random() < 0.05:
                stream.close()
            elif next(steps, None) is not None:
                continue
            else:
                assert same(stream.answer(), alone.generate(image, prompt, **options)), options
            running = [each for each in running if each is not chosen]


def test_a_view_asked_by_streams_in_turns(bundles, monkeypatch):
    install(Driver(), monkeypatch)
    alone, engine = Engine(bundles("eager")), Engine(bundles("eager"), slots=3)
    questions = QUESTION, "and now?", "what colour is the circle?"
    with alone.image(PHOTO) as view:
        wanted = [view.ask(question, **OPTIONS) for question in questions]
    with engine.image(PHOTO) as view:
        streams = [view.stream(question, **OPTIONS) for question in questions]
        for stream in streams:
            next(stream.steps())
        assert all(map(same, wanted, [stream.answer() for stream in streams]))


def test_scores_side_by_side(bundles, monkeypatch):
    """Answers that begin with different tokens in rows of their own, which go back each when it likes."""
    install(Driver(), monkeypatch)
    alone, engine = Engine(bundles("eager")), Engine(bundles("eager"), slots=3, prefill_chunk=30)
    given = [[20, 7, 8], [20, 7, 9, 5], [21, 6], [22], [23, 5, 5, 5, 5], [20, 8, 8]]
    for image in (PHOTO, OTHER, PHOTO):
        found, expected = (each.image(image).score(QUESTION, continuation_ids=given) for each in (engine, alone))
        for left, right in zip(found, expected, strict=True):
            assert np.abs(left.logprobs - right.logprobs).max() <= 1e-5
            assert np.array_equal(left.cells, right.cells) and left.token_ids == right.token_ids
