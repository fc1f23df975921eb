"""The ladder on an NVIDIA GPU: ONNX Runtime's CUDA provider against the official numbers. Run: `pytest -m gpu`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engines.bundle.folder import Bundle
from engines.bundle.kinds import ONNXRUNTIME_CUDA
from engines.errors import BackendError
from engines.ort import OrtModel
from engines.ort.buffers import Buffers
from runtime import Engine
from tests.parity.gates import GPU_BOUNDS, require
from tests.parity.official import CASES, recorded
from tests.parity.requests import encode, request

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def cuda():
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("needs onnxruntime-gpu: pip uninstall onnxruntime && pip install onnxruntime-gpu")


@pytest.mark.parametrize("precision", GPU_BOUNDS)
def test_replays(bundle, precision):
    cases = [recorded(name) for name in CASES]
    require(lambda case: OrtModel(Bundle(bundle(precision, case.weights)), device="cuda"), cases, GPU_BOUNDS[precision])


def test_engine(case, bundle):
    engine, golden = Engine(bundle("fp32", case.weights), device="cuda"), case.golden
    ids = golden["input_ids"].tolist()
    with engine.image(case.image) as view:
        answers = [view.ask(input_ids=ids, max_new_tokens=13, trace=True, stop_at_eos=False) for _ in range(2)]
    for answer in answers:
        assert answer.token_ids == golden["output_ids"][1:].tolist()
    assert answers[1].stats.vision_ms == answers[1].stats.projection_ms == 0


def test_thousand_steps_do_not_grow(bundle):
    model = OrtModel(Bundle(bundle("fp16")), device="cuda")
    decoder = model.decoder(model.no_image(1), 1001)
    buffers = [value.data_ptr() for value in decoder._cache.values()]
    for _ in range(1000):
        result = decoder.run(np.array([[5]]), 0)
    assert np.isfinite(result.logits).all()
    assert decoder.length.tolist() == [1000]
    assert buffers == [value.data_ptr() for value in decoder._cache.values()]


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "int64"])
def test_memory_is_zeroed_on_the_device(dtype):
    """Also where an earlier tensor left something else."""
    buffers = Buffers("cuda")
    for _ in range(3):
        value = buffers.of(np.full((3, 1000, 77), 7, dtype))
        buffers.clear(value)
        assert not value.numpy().any()
        del value
        assert not buffers.zeros((3, 1000, 77), dtype).numpy().any()


def test_logits_are_fetched_when_asked_for_and_are_those_of_the_last_run_alone(bundle):
    model = OrtModel(Bundle(bundle("fp16")), device="cuda")
    decoder = model.decoder(model.no_image(1), 64)
    step = decoder.run(np.array([[5, 9]]))
    assert step.logits[0].argmax() == step.token[0]
    over = decoder.run(np.array([[7]]))
    decoder.run(np.array([[8]]))
    with pytest.raises(BackendError, match="of a step that is over"):
        over.logits  # noqa: B018


@pytest.fixture
def twins(bundle, precision) -> list[OrtModel]:
    """A model whose steps are CUDA graphs, and one whose steps are not."""
    models = [OrtModel(Bundle(bundle(precision)), device="cuda") for _ in range(2)]
    models[1].part.captures = False
    return models


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_graphs_compute_what_their_operators_do(twins, precision):
    """Two images that take turns, budgets and lengths that change, a batch; prefills between the steps, which leave
    something else wherever they work; and every step was a graph."""
    found = []
    for model in twins:
        results, g = [], model.geometry
        decoders = []
        for seed in (1, 2):
            tiles, ids, begin = request(g, seed)
            decoders.append(model.decoder(encode(model, tiles, begin), ids.shape[1] + 40))
            decoders[-1].run(ids)
        decoders.append(model.decoder(model.no_image(2), 64))
        decoders[-1].run(np.array([[3, 5, 9], [4, 8, 0]]), lengths=np.array([3, 2]))
        for step in range(12):
            for decoder in decoders:
                tokens = np.full((len(decoder.length), 1), 5 + step)
                results.append(decoder.run(tokens, (0, 2, g.pages)[step % 3]))
                results[-1].logits  # noqa: B018
                if step == 5:
                    decoder.run(np.repeat(tokens, 7, axis=1))
        found.append(results)
    for graph, operators in zip(*found, strict=True):
        assert np.array_equal(graph.token, operators.token)
        assert np.array_equal(graph.cells(), operators.cells())
        assert np.abs(graph.logits - operators.logits).max() <= GPU_BOUNDS[precision].logits
    assert twins[0].part.captures and twins[0].part._recorded == 3


def test_memory_is_copied_on_the_device():
    buffers = Buffers("cuda")
    source, target = buffers.of(np.arange(3000, dtype=np.float16)), buffers.zeros((3000,), "float16")
    buffers.copy(source, target)
    assert np.array_equal(target.numpy(), source.numpy())


def test_requests_after_each_other_use_one_graph(bundle):
    model = OrtModel(Bundle(bundle("fp16")), device="cuda")
    for seed in range(4):
        tiles, ids, begin = request(model.geometry, seed)
        image = encode(model, tiles, begin)
        decoder = model.decoder(image, ids.shape[1] + 8 + seed)
        decoder.run(ids)
        assert np.isfinite(decoder.run(np.array([[5]]), model.geometry.pages).logits).all()
        del decoder, image
    assert model.part.captures and model.part._recorded == 1


def test_nothing_but_shapes_is_left_to_the_cpu(bundle, tmp_path):
    """ONNX Runtime's own account of where it put the decoder: no copies, and on the CPU what reads shapes."""
    model = OrtModel(Bundle(bundle("fp16")), device="cuda")
    model._options.enable_profiling, model._options.profile_file_prefix = True, str(tmp_path / "profile")
    session = model.session(Bundle(bundle("fp16")).graph("decoder", ONNXRUNTIME_CUDA))
    model.part.session, model.part.captures = session, False
    model.decoder(model.no_image(1), 64).run(np.array([[5]]))
    events = [event for event in json.loads(Path(session.end_profiling()).read_text()) if event.get("cat") == "Node"]
    kernels = [event["args"] for event in events if event["name"].endswith("_kernel_time")]
    assert not [each for each in kernels if each["op_name"].startswith("Memcpy")]
    on_cpu = {each["op_name"] for each in kernels if each["provider"] == "CPUExecutionProvider"}
    assert on_cpu <= {"Shape", "Slice", "Squeeze", "Unsqueeze", "Concat", "Gather", "Add", "Sub", "Mul", "Div", "Min"}
