"""The compiled kernels on an NVIDIA GPU: numerics against the references.

The comparisons are those of the interpreter; what they launch goes through engines/cuda.py.
"""

from __future__ import annotations

import pytest

from plugins.artifacts import Artifacts
from plugins.compiler.ptxas import SMS
from tests.gpu import require_gpu
from tests.on_gpu import compiled
from tests.plugins.checks import (
    check_attention,
    check_int8_attention,
    check_int8_cache,
    check_int8_projection,
    check_page_slots,
    check_projection,
    check_selection,
)
from tests.plugins.harness import Launcher
from tests.plugins.inputs import ATTENTION_CASES, INT8_ATTENTION_CASES, INT8_CACHE_CASES, PROJECTION_CASES

pytestmark = pytest.mark.gpu

# Triton's exp2 and the tensor cores round otherwise than numpy.
BOUND = {"float32": 1e-4, "float16": 8e-3, "bfloat16": 6e-2}


@pytest.fixture(scope="module")
def launcher() -> Launcher:
    cuda = require_gpu()
    sms = (cuda.sm,) if cuda.sm in SMS else SMS[:1]  # of a GPU nobody has heard of the driver compiles the PTX

    def compile(kernels) -> Artifacts:
        return compiled.compiled(kernels, sms)

    return Launcher(cuda, compile)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention(case, dtype, launcher):
    check_attention(ATTENTION_CASES[case], dtype, launcher, paged=True, bound=BOUND)
    if "page" not in case:
        check_attention(ATTENTION_CASES[case], dtype, launcher, paged=False, bound=BOUND)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("case", PROJECTION_CASES)
def test_projection(case, dtype, launcher):
    check_projection(PROJECTION_CASES[case], dtype, launcher, bound=BOUND)


@pytest.mark.parametrize("dtype", BOUND)
def test_pages_in_8_bits(dtype, launcher):
    for sizes in INT8_ATTENTION_CASES.values():
        check_int8_attention(sizes, dtype, launcher, bound=BOUND)
    for case in PROJECTION_CASES.values():
        check_int8_projection(case, dtype, launcher, bound=BOUND)


@pytest.mark.parametrize("dtype", BOUND)
def test_cache_in_8_bits(dtype, launcher):
    for sizes in INT8_CACHE_CASES.values():
        check_int8_cache(sizes, dtype, launcher, bound=BOUND, ties=2)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", PROJECTION_CASES)
@pytest.mark.parametrize("int8", [False, True], ids=["floats", "int8"])
def test_page_slots(int8, case, dtype, launcher):
    check_page_slots(PROJECTION_CASES[case], dtype, launcher, launcher, int8=int8)


@pytest.mark.parametrize("grid", [9, 24])
@pytest.mark.parametrize("cells", [3, 9])
def test_selection(grid, cells, launcher):
    check_selection(grid, cells, launcher)


def test_ptx_alone_runs(launcher):
    """What a GPU without a cubin of its own loads: the driver compiles the PTX."""
    cuda = launcher.cuda
    other = next(sm for sm in SMS if sm != cuda.sm)
    by_ptx = Launcher(cuda, lambda kernels: compiled.compiled(kernels, (other,)))
    check_attention(ATTENTION_CASES["decode"], "float16", by_ptx, paged=True, bound=BOUND)
