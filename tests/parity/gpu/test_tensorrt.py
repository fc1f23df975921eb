"""The ladder on an NVIDIA GPU with TensorRT and TensorRT-RTX, with and without plugins, against the official numbers.

Engines are built here, for this GPU, from the official weights. Where there is neither library, the rehearsal runs all
that is not theirs: torch stands in for them, over the same buffers, plugins, kernels and graphs (tests/emulator). Run:
`bash scripts/test.sh -m gpu`; on the CPU: tests/parity/tensorrt/test_rehearsal.py.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from engines.backend import Image
from engines.bundle.folder import Bundle
from engines.bundle.kinds import TENSORRT, TENSORRT_RTX
from engines.errors import BackendError
from engines.trt import library as trt
from engines.trt.build import attributes
from engines.trt.model import TrtModel
from engines.trt.options import RTX_SMS, EngineOptions
from export.build import BuildOptions, build
from plugins.compiler.kernels import compile_kernels
from plugins.compiler.ptxas import SMS
from plugins.registry import kernels_of_model
from runtime import Engine
from tests.conftest import once
from tests.emulator.tensorrt import rehearse, with_plans
from tests.gpu import require_gpu
from tests.parity.gates import GPU_BOUNDS, INT8_PAGES, Bounds, require, with_int8
from tests.parity.official import CASES, recorded
from tests.parity.tensorrt.beside import require_features, require_layers

pytestmark = pytest.mark.gpu

REHEARSAL = "rehearsal"
VARIANTS = {
    "plugins": {},
    "plugins, lazy pages": {"projection": "lazy"},
    "plugins, lazy pages, int8": {"projection": "lazy", "kv": "int8"},
    "no plugins": {"plugins": False},
}


@pytest.fixture(scope="session")
def gpu():
    return require_gpu()


@pytest.fixture(params=[TENSORRT, TENSORRT_RTX, REHEARSAL])
def library(request, gpu) -> str:
    """What runs the engines."""
    if request.param == REHEARSAL:
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip(f"needs torch for CUDA: this one is {torch.__version__}")
        return REHEARSAL
    try:
        trt.load(request.param)
    except BackendError as error:
        pytest.skip(error.found)
    if request.param == TENSORRT_RTX and gpu.sm not in RTX_SMS:
        pytest.skip(f"TensorRT-RTX builds for no sm_{gpu.sm}")
    return request.param


@pytest.fixture
def backend(library, gpu, monkeypatch) -> str:
    """The backend that models are opened with."""
    if library != REHEARSAL:
        return library
    rehearse(gpu, monkeypatch)
    return TENSORRT


@pytest.fixture
def engines(shared, checkpoint, library, backend, gpu):
    """engines(precision, name="plain", variant="plugins") -> bundle with engines for this GPU."""

    def get(precision: str, name: str = "plain", variant: str = "plugins"):
        change = dict(VARIANTS[variant])
        how = {"precision": precision, "projection": "eager", "check": "none" if "kv" in change else "parity"}
        how |= {knob: change.pop(knob) for knob in ("projection", "kv") if knob in change}
        out = shared / f"{name}-{precision}-{library}-{variant.replace(', ', '-').replace(' ', '-')}"
        if library != REHEARSAL:
            knobs = EngineOptions(backend, targets=(gpu.sm,), batch=2, **change)
            options = BuildOptions(checkpoint(name), out, backend=backend, engines=knobs, **how)
            return once(out, lambda _: build(options))
        if change:
            pytest.skip("the rehearsal is of engines with plugins")
        options = BuildOptions(checkpoint(name), out.with_name(f"{out.name}-graphs"), **how)
        plain = Bundle(once(options.out, lambda _: build(options)))
        sms = (gpu.sm,) if gpu.sm in SMS else SMS[:1]  # of a GPU nobody has heard of the driver compiles the PTX

        def make(folder):
            kernels = kernels_of_model(attributes(plain.manifest.geometry), plain.precision.dtype)
            code = compile_kernels(kernels, sms)
            with_plans(plain.path, folder, backend, sms=(gpu.sm,), plugins=True, artifacts=code)

        return once(out, make)

    return get


def bounds(precision: str, variant: str) -> Bounds:
    """What a variant may be away from the official runs."""
    return with_int8(GPU_BOUNDS[precision], *([INT8_PAGES] if "kv" in VARIANTS[variant] else []))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", GPU_BOUNDS)
def test_features(case, engines, backend, precision, variant):
    require_features(case, Bundle(engines(precision, case.weights, variant)), backend, GPU_BOUNDS[precision])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", GPU_BOUNDS)
def test_replays(engines, backend, precision, variant):
    """Every official decoding step: selections, logits, and the token the graph chose."""
    cases = [recorded(name) for name in CASES]
    found = bounds(precision, variant)
    require(lambda case: TrtModel(Bundle(engines(precision, case.weights, variant)), backend), cases, found)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_layer_selects_and_caches_what_onnxruntime_does(case, engines, backend, variant):
    require_layers(case, Bundle(engines("fp32", case.weights, variant)), backend, GPU_BOUNDS["fp32"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_engine(case, engines, backend, variant):
    """The public interface: an image asked twice, then text alone, then sampling that repeats itself."""
    engine, golden = Engine(engines("fp32", case.weights, variant), backend=backend), case.golden
    ids = golden["input_ids"].tolist()
    with engine.image(case.image) as view:
        answers = [view.ask(input_ids=ids, max_new_tokens=13, stop_at_eos=False) for _ in range(2)]
        sampled = [
            view.ask(input_ids=ids, max_new_tokens=8, temperature=1.0, seed=3, stop_at_eos=False).token_ids
            for _ in range(2)
        ]
    for answer in answers:
        assert answer.token_ids == golden["output_ids"][1:].tolist()
        if "kv" not in VARIANTS[variant]:  # which may flip cells
            assert np.array_equal(answer.stats.pages_read, golden["n_selected"][:, :-1] // 64)
        assert len(answer.stats.decode_device_ms) == 13 and min(answer.stats.decode_device_ms) > 0
    assert answers[0].stats.vision_device_ms > 0
    assert answers[1].stats.vision_ms == answers[1].stats.projection_ms == 0
    assert sampled[0] == sampled[1]
    folder = engines("fp32", case.weights, variant)
    text = [
        Engine(folder, backend=name).generate(None, input_ids=[1, 5, 9], max_new_tokens=6, trace=True)
        for name in (backend, "onnxruntime")
    ]
    assert np.abs(text[0].trace.logits[0] - text[1].trace.logits[0]).max() <= GPU_BOUNDS["fp32"].logits


def test_rows_of_a_batch(engines, backend, case):
    """Two rows with one image answer as one row does."""
    model = TrtModel(Bundle(engines("fp32", case.weights)), backend)
    g = model.geometry
    expected = [(result.token.copy(), result.logits.copy()) for _, _, result in case.replay(model, g)]
    tiles, ids = case.tiles(g), np.repeat(case.ids(g), 2, 0)
    low, high = model.vision(np.repeat(tiles[:1], 2, 0)), model.vision(np.concatenate([tiles[1:]] * 2))
    begin = np.repeat(case.begin(), 2)
    image = Image(low, model.project(high, begin), begin, np.repeat(case.margins(g), 2, 0))
    decoder = model.decoder(image, ids.shape[1] + 13)
    decoder.run(ids[:, :-1])
    column = ids[:, -1:]
    for token, logits in expected[:4]:
        result = decoder.run(column, g.pages)
        assert np.abs(result.logits - logits).max() <= GPU_BOUNDS["fp32"].logits
        assert result.token.tolist() == [token[0]] * 2
        column = result.token[:, None]


@pytest.mark.parametrize("variant", VARIANTS)
def test_slots(engines, backend, case, variant):
    """A request joins in row 0 when one in row 1 has made two steps, another takes over what row 1 was prefilled with:
    all have the steps they have alone, and steps of two rows are one graph."""
    model = TrtModel(Bundle(engines("fp32", case.weights, variant)), backend)
    g = model.geometry
    expected = [(result.token[0], result.logits.copy()) for _, _, result in case.replay(model, g)]
    image, ids = case.encode(model, g), case.ids(g)
    slots, prompt = model.slots(2), ids.shape[1] - 1
    made = {1: 0}  # steps of each row
    slots.load(1, image)
    slots.row(1).run(ids[:, :-1])
    for turn in range(7):
        if turn == 2:
            slots.load(0, image)
            slots.row(0).run(ids[:, : prompt - 1])
            slots.row(0).run(ids[:, prompt - 1 : prompt])
            made[0] = 0
        if turn == 4:
            slots.copy(0, 1, prompt, image=True)
            made[1] = 0
        tokens, budgets = np.zeros((2, 1), np.int64), np.zeros(2, np.int64)
        for row, done in made.items():
            tokens[row], budgets[row] = expected[done - 1][0] if done else ids[0, -1], g.pages
        result = slots.first(2).run(tokens, budgets)
        for row, done in made.items():
            assert np.abs(result.logits[row] - expected[done][1][0]).max() <= GPU_BOUNDS["fp32"].logits
            assert result.token[row] == expected[done][0]
            made[row] += 1
        if 0 not in made:
            slots.length[0] = 0  # it came along
    assert slots.length.tolist() == [prompt + 5, prompt + 3]
    assert slots.together(2, 1)._graph is not None, "the step was not recorded"


def test_threads_share_steps(engines, backend, case):
    """The public interface with slots: every thread has the official answer."""
    engine, golden = Engine(engines("fp32", case.weights), backend=backend, slots=2), case.golden
    options = {"input_ids": golden["input_ids"].tolist(), "max_new_tokens": 13, "stop_at_eos": False}
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: engine.generate(case.image, **options), range(6)))
    assert all(answer.token_ids == golden["output_ids"][1:].tolist() for answer in answers)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_thousand_steps_are_one_graph_and_grow_nothing(engines, backend, variant):
    """The first step as it is, the second recorded; then no memory is taken, and forgetting brings the past back."""
    model = TrtModel(Bundle(engines("fp16", variant=variant)), backend)
    steps = min(1000, model.geometry.context)
    decoder = model.decoder(model.no_image(1), steps)
    first = decoder.run(np.array([[5]])).logits
    assert decoder._graph is None
    decoder.run(np.array([[5]]))
    graph, (free, _) = decoder._graph, model.cuda.memory()
    assert graph is not None, "the step was not recorded"
    for _ in range(steps - 2):
        result = decoder.run(np.array([[5]]))
    assert decoder._graph is graph and decoder.length.tolist() == [steps]
    assert np.isfinite(result.logits).all()
    # Others may use the GPU meanwhile, so a little slack; a step that kept its logits would take far more.
    assert free - model.cuda.memory()[0] <= 16 << 20
    decoder.length[:] = 0
    assert np.array_equal(decoder.run(np.array([[5]])).logits, first)
