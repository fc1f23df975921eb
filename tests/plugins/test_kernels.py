"""The Triton kernels against the PyTorch references, in Triton's interpreter (tests/emulator): loads, stores and races
checked. Then as the GPU tests run them, on the emulated driver: with arguments from Python down to its argument block.
"""

from __future__ import annotations

import numpy as np
import pytest

from engines.cuda import Cuda
from plugins.artifacts import Artifacts
from plugins.compiler.kernels import variants_of
from plugins.select_pages.launch import SelectPages
from tests.emulator.driver import Driver, emulated, emulated_artifacts
from tests.emulator.interpreter import call
from tests.plugins.checks import ATTENTION_BOUND, check_attention, check_projection, check_selection
from tests.plugins.harness import Launcher
from tests.plugins.inputs import ATTENTION_CASES, PROJECTION_CASES, Sizes


@pytest.mark.parametrize("dtype", ATTENTION_BOUND)
@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention(case, dtype):
    check_attention(ATTENTION_CASES[case], dtype, call, paged=True)
    if "page" not in case:
        check_attention(ATTENTION_CASES[case], dtype, call, paged=False)


def test_attention_at_the_size_of_7b():
    sizes = Sizes(
        heads=32, kv_heads=32, head_dim=128, grid=24, pages=81, page_size=64, capacity=1200, past=(1100,), counts=(10,),
        begin=(35,),
    )  # fmt: skip
    check_attention(sizes, "float16", call, paged=True)


def test_selection_survives_values_that_are_no_numbers():
    """Every page has a place of its own in the list, whatever the map holds: the attention kernel follows it."""
    maps = np.random.default_rng(0).random((2, 6, 6), np.float32)
    maps[0, 2:4] = np.nan
    maps[1] = np.nan
    inputs = {"map": maps, "margins": np.zeros((2, 2), np.int64), "page_budget": np.full(2, 9, np.int64)}
    found = call(SelectPages(grid=6, cells=3, threshold=48), "float32", inputs)
    assert [sorted(row) for row in found["pages"].tolist()] == [list(range(9))] * 2
    assert found["page_count"][1] == 0


@pytest.mark.parametrize("grid", [9, 10, 12, 24])
@pytest.mark.parametrize("cells", [3, 9])
def test_selection(grid, cells):
    check_selection(grid, cells, call)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", ["batch", "prefill, batch, grouped"])
def test_attention_through_the_driver(case, dtype):
    driver = Driver()
    check_attention(ATTENTION_CASES[case], dtype, Launcher(Cuda(driver), emulated_artifacts), paged=True)
    assert {"attend_pages", "combine"} <= set(driver.launches)


@pytest.mark.parametrize(("sm", "rows"), [(86, 128), (90, 64), (121, 128)])
def test_each_gpu_runs_its_own_variant(sm, rows):
    """Of one file with code for several SMs: its grid is that of the tile which the code of this SM has."""

    def variants(kernels) -> Artifacts:
        made = ((each, sms) for kernel in kernels for each, sms in variants_of(kernel, (86, 90)))
        return Artifacts(tuple(emulated(each, each.name, sms) for each, sms in made), {})

    sizes = ATTENTION_CASES["prefill, head size 96"]
    launcher = Launcher(Cuda(Driver(sm=sm)), variants)
    check_attention(sizes, "float16", launcher, paged=False)
    op = sizes.cached()
    made = launcher.artifacts(op, "float16")
    (prefill,) = (kernel for kernel in made.on(op.kernels("float16"), sm) if kernel.name == "prefill")
    assert prefill.constant("ROWS") == rows and len([c for c in made.compiled if c.kernel.name == "prefill"]) == 2


def test_projection_through_the_driver():
    check_projection(PROJECTION_CASES["batch"], "float16", Launcher(Cuda(Driver()), emulated_artifacts))
