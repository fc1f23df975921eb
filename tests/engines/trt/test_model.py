"""The TensorRT executor on the emulated driver and TensorRT: it answers as ONNX Runtime does, and how it works."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest

from engines.bundle.folder import Bundle, sha256
from engines.cuda import Cuda
from engines.errors import BackendError, BundleError, KernelError
from engines.ort import OrtModel
from engines.trt.model import TrtModel
from export.build import BuildOptions, build
from plugins.artifacts import Artifacts
from runtime import Engine, PromptError
from tests.conftest import once
from tests.emulator import tensorrt as emulated
from tests.emulator.driver import Driver
from tests.emulator.tensorrt import install, with_plans
from tests.engines.manifests import edit
from tests.parity.requests import encode, padded, request
from tests.runtime.questions import GEOMETRY, OPTIONS, OTHER, PHOTO, QUESTION, answers_alike, same

BACKENDS = ("tensorrt", "tensorrt-rtx")


@pytest.fixture(scope="module")
def bundles(random_model, shared):
    """bundles(backend) -> a bundle with emulated engines."""
    plain = random_model("engine", GEOMETRY, tokenizer=True)[1]
    return lambda backend: once(shared / f"engine-{backend}", lambda folder: with_plans(plain, folder, backend))


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture(params=[False, True], ids=["discrete", "integrated"])
def driver(request, monkeypatch) -> Driver:
    driver = Driver(integrated=request.param)
    install(driver, monkeypatch)
    return driver


def pair(bundle: Path) -> tuple[Engine, Engine]:
    return Engine(bundle), Engine(bundle, backend="onnxruntime")


def test_scores_as_onnxruntime_does(backend, driver, bundles):
    """Steps that go back to an earlier token are recorded ones like all others."""
    ours, theirs = pair(bundles(backend))
    for image, answers in ((PHOTO, ["a red square", "a red", "a chat", "x"]), (None, ["number", "a"])):
        found, expected = (engine.image(image).score(QUESTION, answers) for engine in (ours, theirs))
        for left, right in zip(found, expected, strict=True):
            assert left.token_ids == right.token_ids and left.greedy == right.greedy
            assert np.abs(left.logprobs - right.logprobs).max() <= 1e-4
            assert np.array_equal(left.cells, right.cells)
    before = ours.generate(PHOTO, QUESTION, **OPTIONS)
    assert same(before, theirs.generate(PHOTO, QUESTION, **OPTIONS))


def test_answers_as_onnxruntime_does(backend, driver, bundles):
    ours, theirs = pair(bundles(backend))
    assert isinstance(ours.model, TrtModel) and isinstance(theirs.model, OrtModel)
    for image, question, options in (
        (PHOTO, QUESTION, {}),
        (None, "hello", {}),
        (OTHER, "look at this: <image> what is it?", {"page_budget": 3, "special_tokens": True}),
        (PHOTO, QUESTION, {"page_budget": 0}),
        (PHOTO, QUESTION, {"temperature": 1.5, "seed": 4}),
        (PHOTO, QUESTION, {}),
    ):
        answers = [engine.generate(image, question, **OPTIONS, **options) for engine in (ours, theirs)]
        assert same(*answers), options
        assert np.array_equal(answers[0].stats.pages_read, answers[1].stats.pages_read)
    greedy = [engine.generate(PHOTO, QUESTION, max_new_tokens=9, stop_at_eos=False) for engine in (ours, theirs)]
    assert greedy[0].token_ids == greedy[1].token_ids and greedy[0].text == greedy[1].text
    stop = greedy[0].text[2:4]
    texts = [engine.generate(PHOTO, QUESTION, max_new_tokens=9, stop=stop).text for engine in (ours, theirs)]
    assert texts[0] == texts[1]


def test_image_views_and_streams_in_turns(backend, driver, bundles):
    ours, theirs = pair(bundles(backend))
    questions = QUESTION, "what colour is the circle on the left, and is it larger than the square?", "and now?"
    answers = []
    for engine in (ours, theirs):
        with engine.image(PHOTO) as view:
            first = [view.ask(question, **OPTIONS) for question in questions]
            streams = [view.stream(question, **OPTIONS) for question in questions[:2]]
            next(streams[0])
            next(streams[1])
            answers.append([*first, *(stream.answer() for stream in streams)])
    assert all(same(left, right) for left, right in zip(*answers, strict=True))
    assert [answer.stats.reused_tokens for answer in answers[0]] == [a.stats.reused_tokens for a in answers[1]]


@pytest.mark.parametrize("driver", [False], indirect=True)
def test_rows_of_a_batch(backend, driver, bundles):
    bundle = Bundle(bundles(backend))
    requests = [request(GEOMETRY, seed=3, text=9, begin=3), request(GEOMETRY, seed=4, text=14, begin=6)]
    results = []
    for model in (TrtModel(bundle, backend), OrtModel(bundle)):
        tiles = [np.concatenate([tiles[part] for tiles, _, _ in requests]) for part in (slice(1), slice(1, None))]
        begin = np.concatenate([begin for _, _, begin in requests])
        low, high = (model.vision(each) for each in tiles)
        image = encode(_Fixed(model, low, high), np.empty(2), begin)
        image.margins.resize((2, 2), refcheck=False)
        image.margins[:] = [(1, 0), (0, 2)]
        prompts, lengths, column = padded([ids for _, ids, _ in requests])
        decoder = model.decoder(image, int(lengths.max()) + 8)
        decoder.run(prompts, lengths=lengths)
        for _ in range(4):
            step = decoder.run(column, np.array([16, 2]))
            results.append((step.token, step.logits, step.cells()))
            column = step.token[:, None]
    for ours, theirs in zip(results[:4], results[4:], strict=True):
        assert np.array_equal(ours[0], theirs[0]) and np.array_equal(ours[2], theirs[2])
        assert np.abs(ours[1] - theirs[1]).max() <= 1e-5


class _Fixed:
    """A model whose vision has run already."""

    def __init__(self, model, low, high) -> None:
        self.features, self.project = iter((low, high)), model.project

    def vision(self, tiles):
        return next(self.features)


def test_a_step_allocates_nothing_and_is_one_launch(driver, bundles):
    model = TrtModel(Bundle(bundles("tensorrt")), "tensorrt")
    decoder = model.decoder(model.no_image(1), 30)
    decoder.run(np.array([[1, 5, 9]]))
    decoder.run(np.array([[7]]))
    decoder.run(np.array([[7]]))
    before = driver.counts.copy()
    for _ in range(20):
        step = decoder.run(np.array([[7]]))
    spent = driver.counts - before
    assert decoder.length.tolist() == [25]
    assert spent["cuGraphLaunch"] == spent["cuEventSynchronize"] == 20
    assert not any(spent[name] for name in spent if "Alloc" in name or "Memcpy" in name or "Stream" in name)
    assert driver.counts["cuGraphInstantiate"] == 1
    assert step.logits.shape == (1, GEOMETRY.vocab)
    with pytest.raises(BackendError, match="a step that is over"):
        first = decoder.run(np.array([[7]]))
        decoder.run(np.array([[7]]))
        _ = first.logits


def test_logits_stay_on_the_device_unless_asked_for(driver, bundles):
    engine = Engine(bundles("tensorrt"))
    copies = {}
    for name, options in {"greedy": {}, "sampled": {"temperature": 1.0}, "traced": {"trace": True}}.items():
        before = driver.counts["cuMemcpyDtoHAsync"]
        answer = engine.generate(None, "hello", max_new_tokens=12, stop_at_eos=False, **options)
        assert len(answer.token_ids) == 12
        copies[name] = driver.counts["cuMemcpyDtoHAsync"] - before
    assert copies["greedy"] < copies["sampled"] == copies["traced"]
    assert copies["sampled"] - copies["greedy"] == 10  # all but the first and the last, which are checked


def test_requests_leave_no_memory_behind(driver, bundles):
    engine = Engine(bundles("tensorrt-rtx"))
    sizes = []
    for _ in range(3):
        with engine.image(PHOTO) as view:
            view.ask(QUESTION, max_new_tokens=4)
        engine.generate(None, "hello", max_new_tokens=4)
        gc.collect()
        sizes.append((driver.memory.bytes(), len(driver.memory), driver.pinned.bytes()))
    assert sizes[0] == sizes[1] == sizes[2]
    del engine, view
    gc.collect()
    assert len(driver.memory) == len(driver.pinned) == 0


def test_stats_tell_the_time_of_the_device(driver, bundles):
    engine = Engine(bundles("tensorrt"))
    stats = engine.generate(PHOTO, QUESTION, **OPTIONS).stats
    for stage in ("vision", "projection", "prefill"):
        assert 0 < getattr(stats, f"{stage}_device_ms") <= getattr(stats, f"{stage}_ms")
    assert len(stats.decode_device_ms) == 6
    assert all(0 < device <= host for device, host in zip(stats.decode_device_ms, stats.decode_ms, strict=True))
    assert "ms each on the GPU" in str(stats)


def test_forgetting_tokens_brings_the_old_state_back(driver, bundles):
    model = TrtModel(Bundle(bundles("tensorrt")), "tensorrt")
    decoder = model.decoder(model.no_image(1), 64)
    decoder.run(np.array([[1, 5, 9]]))
    expected = decoder.run(np.array([[7]])).logits
    decoder.run(np.array([[8]]))
    decoder.length[:] = 3
    assert np.array_equal(decoder.run(np.array([[7]])).logits, expected)
    assert decoder.enlarged(GEOMETRY.context) is decoder
    with pytest.raises(BackendError, match="fewer tokens"):
        decoder.enlarged(GEOMETRY.context + 1)


# Bad input.


@pytest.fixture
def fresh(random_model, tmp_path):
    """fresh(**change) -> a bundle with emulated engines of its own."""
    plain = random_model("engine", GEOMETRY, tokenizer=True)[1]
    return lambda **change: with_plans(plain, tmp_path / "bundle", "tensorrt", **change)


def test_what_a_context_was_made_with_lives_as_long(bundles, monkeypatch):
    """TensorRT from 10.11 on takes a configuration that stays the caller's."""
    plain, made = emulated.Engine.create_execution_context, []

    class Configuration:
        def set_execution_context_allocation_strategy(self, strategy: int) -> None:
            self.strategy = strategy

    def create(engine: emulated.Engine, configuration: Configuration) -> emulated.Context:
        context = plain(engine, configuration.strategy)
        made.append((weakref.ref(configuration), weakref.ref(context)))
        return context

    monkeypatch.setattr(emulated.Engine, "create_runtime_config", lambda engine: Configuration(), raising=False)
    monkeypatch.setattr(emulated.Engine, "create_execution_context", create)
    install(Driver(), monkeypatch)
    engine = Engine(bundles("tensorrt"))
    engine.generate(PHOTO, QUESTION, max_new_tokens=2)
    gc.collect()
    assert len(made) >= 4 and all(context() and configuration() for configuration, context in made)
    del engine
    gc.collect()
    assert not any(context() or configuration() for configuration, context in made)


def test_an_engine_of_another_version(driver, fresh):
    with pytest.raises(BackendError, match=r"built by emulated_tensorrt 10\.9\.1, installed is 10\.3\.0") as caught:
        Engine(fresh(version="10.9.1"))
    assert caught.value.fix.endswith("bundle --backend tensorrt --no-plugins")  # as it was built


def test_an_engine_of_another_gpu(driver, fresh):
    with pytest.raises(BackendError, match="built for sm_87, sm_110, this GPU is sm_86") as caught:
        Engine(fresh(sms=(87, 110)))
    assert caught.value.fix.startswith("python -m engines.build")


def test_truncated_engines(driver, fresh):
    folder = fresh()
    plan = folder / "decoder.tensorrt.plan"
    plan.write_bytes(plan.read_bytes()[:100])
    with pytest.raises(BundleError, match="has 100 bytes"):
        Engine(folder)
    edit(folder, lambda manifest: manifest["files"].update({plan.name: {"bytes": 100, "sha256": sha256(plan)}}))
    with pytest.raises(BackendError, match=r"decoder\.tensorrt\.plan: .*magic tag") as caught:
        Engine(folder)
    assert caught.value.fix == f"python -m engines.build {folder} --backend tensorrt --no-plugins"


def test_kernels_changed_since_the_engine_was_built(driver, fresh):
    folder = fresh()
    changes = {"plugins": True, "kernels": "0" * 64}
    edit(folder, lambda manifest: manifest["parts"]["decoder"]["plans"]["tensorrt"].update(changes))
    with pytest.raises(BundleError, match=r"tensorrt engine of decoder: built with kernels 0000"):
        Engine(folder)


def test_prompt_longer_than_the_engine(driver, bundles):
    engine = Engine(bundles("tensorrt"))
    with pytest.raises(PromptError, match="200 tokens together"):
        engine.generate(None, "word " * 300)
    model = engine.model
    with pytest.raises(BackendError, match="a cache of 201 tokens"):
        model.decoder(model.no_image(1), 201)
    decoder = model.decoder(model.no_image(1), 200)
    with pytest.raises(BackendError, match="201 more tokens"):
        decoder.run(np.ones((1, 201), np.int64))
    with pytest.raises(BackendError, match=r"batch = 3(.|\n)*1 \.\. 2(.|\n)*engines\.build"):
        model.decoder(model.no_image(3), 200)


def test_too_little_memory(bundles, monkeypatch):
    small = Driver(total=300_000)
    install(small, monkeypatch)
    engine = Engine(bundles("tensorrt"))
    with pytest.raises(BackendError, match=r"the cache of 1 x 200 tokens needs .* GB(.|\n)*free(.|\n)*--context"):
        engine.generate(None, "hello")


def test_no_engine_for_the_backend(random_model, monkeypatch):
    install(Driver(), monkeypatch)
    folder = random_model("engine", GEOMETRY, tokenizer=True)[1]
    with pytest.raises(BundleError, match="no tensorrt-rtx engine") as caught:
        Engine(folder, backend="tensorrt-rtx")
    # It was built for ONNX Runtime: there are no kernels for `python -m engines.build` to build with.
    assert caught.value.fix.startswith(f"python export/build.py --model CHECKPOINT --out {folder} --fp32 ")
    assert "--backend tensorrt-rtx" in caught.value.fix
    with pytest.raises(BackendError, match="backend 'tpu'"):
        Engine(folder, backend="tpu")
    with pytest.raises(BackendError, match="device 'cpu' with the backend tensorrt"):
        Engine(folder, backend="tensorrt", device="cpu")
    with pytest.raises(BackendError, match="threads=2"):
        Engine(folder, backend="tensorrt", threads=2)


def test_no_driver_here(bundles):
    try:
        Cuda()
    except BackendError as error:
        assert "NVIDIA driver" in error.found or "CUDA does not start" in error.found
        assert "onnxruntime" in error.fix
    else:
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendError, match=r"NVIDIA driver|CUDA does not start"):
        Engine(bundles("tensorrt"))
    assert Engine(bundles("tensorrt"), backend="onnxruntime").generate(None, "hello", max_new_tokens=1)


FEW = 2  # page slots


# With plugins: the decoder's custom ops through plugins/tensorrt.py, the driver's wrapper and the interpreted kernels.


@pytest.fixture(scope="module", params=["eager", "lazy", "lazy-int8", "lazy-slots"])
def plugin_bundle(request, random_model, shared):
    """A bundle whose emulated decoder has plugins; its pages are projected at once, or when first selected, and kept in
    float32 or in 8 bits, or in fewer slots than there are pages."""
    checkpoint, plain = random_model("engine", GEOMETRY, tokenizer=True)
    projection, _, kv = request.param.partition("-")
    if request.param != "eager":
        out, slots = shared / f"engine-{request.param}", FEW if kv == "slots" else None
        kv = kv if kv == "int8" else "model"
        options = BuildOptions(checkpoint, out, precision="fp32", projection=projection, kv=kv, page_slots=slots)
        plain = once(options.out, lambda _: build(options))
    folder = shared / f"engine-plugins-{request.param}"
    return once(folder, lambda folder: with_plans(plain, folder, "tensorrt-rtx", plugins=True))


def test_plugins_answer_as_onnxruntime_does(plugin_bundle, monkeypatch):
    driver = Driver()
    install(driver, monkeypatch)
    ours, theirs = pair(plugin_bundle)
    options = {"max_new_tokens": 3, "trace": True, "stop_at_eos": False, "page_budget": ours.geometry.stored_pages}
    answers = answers_alike(ours, theirs, **options)
    for left, right in zip(*answers, strict=True):
        assert left.stats.pages_evicted == right.stats.pages_evicted
        assert left.stats.pages_projected_again == right.stats.pages_projected_again
    if ours.geometry.page_slots is not None:
        assert sum(answer.stats.pages_projected_again for answer in answers[0]) > 0
    kernels = {"append", "prefill", "attend", "attend_pages", "combine", "select_pages"}
    assert set(driver.launches) == kernels | ({"project_pages"} if ours.geometry.lazy_pages else set())
    assert driver.counts["cuGraphInstantiate"] == 2  # one for the view, one without an image


def test_a_kernel_that_is_missing_is_told(plugin_bundle, monkeypatch):
    driver = Driver()
    install(driver, monkeypatch)
    engine = Engine(plugin_bundle)
    missing = KernelError("no compiled kernel", fix="compile")
    monkeypatch.setattr(Artifacts, "get", lambda self, *kernel: _raise(missing))
    with pytest.raises(KernelError, match=r"decoder part: .*no compiled kernel(.|\n)*fix: compile"):
        engine.generate(None, "hello", max_new_tokens=2)


def _raise(error: Exception) -> None:
    raise error
