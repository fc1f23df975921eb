"""The compiled kernels on an NVIDIA GPU: numerics against the references, and how near they come to its bandwidth.

The comparisons are those of the interpreter; what they launch goes through engines/cuda.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engines.bundle.geometry import Geometry
from engines.cuda import Cuda
from plugins.artifacts import Artifacts
from plugins.compile import compile_kernels
from plugins.compiler.ptxas import SMS
from plugins.op import Op
from plugins.registry import ops_of_model
from plugins.select_pages.reference import select_pages
from tests.bench import kernels as estimates
from tests.gpu import require_gpu
from tests.plugins import test_int8_pages, test_kernels, test_project_pages
from tests.plugins.launcher import Launcher
from tests.shapes import input_shapes, sizes

pytestmark = pytest.mark.gpu

# Triton's exp2 and the tensor cores round otherwise than numpy.
BOUND = {"float32": 1e-4, "float16": 8e-3, "bfloat16": 6e-2}
ROUNDS = 50


@pytest.fixture(scope="module")
def launcher() -> Launcher:
    cuda = require_gpu()
    sms = (cuda.sm,) if cuda.sm in SMS else SMS[:1]  # of a GPU nobody has heard of the driver compiles the PTX

    def compile(kernels) -> Artifacts:
        return compile_kernels(kernels, sms)

    return Launcher(cuda, compile)


@pytest.fixture(autouse=True)
def bounds(monkeypatch):
    for dtype, bound in BOUND.items():
        monkeypatch.setitem(test_kernels.BOUND, dtype, bound)
        monkeypatch.setitem(test_project_pages.BOUND, dtype, bound)
        monkeypatch.setitem(test_int8_pages.BOUND, dtype, bound)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("case", test_kernels.CASES)
def test_attention(case, dtype, launcher):
    test_kernels.check(test_kernels.CASES[case], dtype, paged=True, run=launcher)
    if "page" not in case:
        test_kernels.check(test_kernels.CASES[case], dtype, paged=False, run=launcher)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("case", test_project_pages.CASES)
def test_projection(case, dtype, launcher):
    def by_driver(dtype, arrays):
        op = test_project_pages.ProjectPages(**test_project_pages.attributes(arrays))
        return launcher(op, dtype, arrays)

    test_project_pages.test_equals_the_reference(case, by_driver, dtype)


@pytest.mark.parametrize("dtype", BOUND)
def test_pages_in_8_bits(dtype, launcher, monkeypatch):
    monkeypatch.setattr(test_int8_pages, "call", launcher)
    for case in test_int8_pages.ATTENTION_CASES:
        test_int8_pages.test_attention_by_kernel(case, dtype)
    for case in test_project_pages.CASES:
        test_int8_pages.test_projection(case, test_int8_pages.project_by_kernel, dtype)


@pytest.mark.parametrize("grid", [9, 24])
@pytest.mark.parametrize("cells", [3, 9])
def test_selection(grid, cells, launcher):
    maps = np.random.default_rng(grid * cells).random((3, grid, grid), np.float32) ** 4
    maps[2, 1, 2] = maps[2, 7, 8] = maps[2].max()
    sides, budget = np.array([[0, 1], [2, 0], [0, 0]]), np.array([4, 81, 0])
    op = test_kernels.SelectPages(grid=grid, cells=cells, threshold=48)
    expected = select_pages(*map(torch.from_numpy, (maps, sides, budget)), grid, cells, 48)
    for left, right in zip(expected, launcher(op, "float32", [maps, sides, budget]), strict=True):
        assert left.tolist() == right.tolist()


def test_ptx_alone_runs(launcher):
    """What a GPU without a cubin of its own loads: the driver compiles the PTX."""
    cuda = launcher.cuda
    other = next(sm for sm in SMS if sm != cuda.sm)
    by_ptx = Launcher(cuda, lambda kernels: compile_kernels(kernels, (other,)))
    test_kernels.check(test_kernels.CASES["decode"], "float16", paged=True, run=by_ptx)


def inputs_of(op: Op, g: Geometry, tokens: int, pages: int) -> list[np.ndarray]:
    """Inputs of a decode step at the size of `g`: random numbers, `tokens` cached, the first `pages` pages listed."""
    rng, arrays = np.random.default_rng(0), []
    for tensor, shape in zip(op.inputs, input_shapes(g)[op.name], strict=True):
        if tensor.dtype == "int64":
            values = {"positions": tokens - 1, "page_budget": pages, "page_count": pages, "projected": 1}
            values["page_lengths"] = estimates.page_size(g)
            array = np.full(shape, values.get(tensor.name, 0), np.int64)
            if tensor.name == "pages":
                array[:] = np.arange(shape[-1])
        else:
            array = (rng.standard_normal(shape, np.float32) / 4).astype(
                np.float16 if tensor.dtype == "model" else np.float32
            )
        arrays.append(array)
    return arrays


def bandwidth(cuda: Cuda) -> float:
    """Bytes per second of copying within the device's memory: read once, written once."""
    size = 256 << 20
    buffers, stream = [cuda.buffer(size, "a test") for _ in range(2)], cuda.stream()
    start, end = cuda.event(), cuda.event()
    best = 0.0
    for _ in range(5):
        start.record(stream)
        for _ in range(10):
            buffers[0].take(buffers[1].address, size, stream)
        end.record(stream)
        end.wait()
        best = max(best, 2 * 10 * size / (end.since(start) / 1000))
    return best


def test_time_of_a_decode_step_against_the_bandwidth(launcher, capsys):
    """Each launch of a 7B step, repeated in a graph. What stays in the GPU's cache may look faster than its memory."""
    cuda, case = launcher.cuda, estimates.Case(estimates.official())
    limit, stream = bandwidth(cuda), launcher.stream
    rows, start, end = [], cuda.event(), cuda.event()
    for op in ops_of_model(sizes(case.geometry)):
        arrays = inputs_of(op, case.geometry, case.tokens, case.pages)
        launches, *_memory = launcher.prepare(op, case.dtype, arrays)
        artifacts = launcher.artifacts(op, case.dtype)
        for launch in launches:
            cuda.run(artifacts, [launch], int(stream))  # loads it
            stream.wait()
            graph = cuda.capture(
                stream, lambda code=artifacts, launch=launch: cuda.run(code, [launch] * ROUNDS, int(stream))
            )
            times = []
            for _ in range(10):
                start.record(stream)
                graph.launch(stream)
                end.record(stream)
                end.wait()
                times.append(1000 * end.since(start) / ROUNDS)
            moved = estimates.STEP[op.name, launch.kernel.name](case)
            rows.append((op.name, launch.kernel.name, moved, min(times)))
    with capsys.disabled():
        print(
            f"\n{cuda.name}, {limit / 1e9:.0f} GB/s measured by copying; 7B, {case.tokens} tokens, {case.pages} pages"
        )
        print("| op | kernel | MB | us | share of the bandwidth |\n|---|---|---|---|---|")
        for op_name, kernel, moved, spent in rows:
            share = moved / limit / (spent / 1e6)
            print(f"| {op_name} | {kernel} | {moved / 1e6:.2f} | {spent:.1f} | {share:.0%} |")
    assert all(0 < spent < 10_000 for *_, spent in rows)
