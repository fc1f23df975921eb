"""What the GPU tests do, on the emulated driver: kernels get their arguments from Python down to the argument block."""

from __future__ import annotations

import pytest

from engines.cuda import Cuda
from tests.emulator.driver import Driver, emulated_artifacts
from tests.plugins import test_kernels, test_project_pages
from tests.plugins.launcher import Launcher


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", ["batch", "prefill, batch, grouped"])
def test_attention(case, dtype):
    driver = Driver()
    launcher = Launcher(Cuda(driver), emulated_artifacts)
    test_kernels.check(test_kernels.CASES[case], dtype, paged=True, run=launcher)
    assert {"attend_pages", "combine"} <= set(driver.launches)


def test_projection():
    launcher = Launcher(Cuda(Driver()), emulated_artifacts)

    def by_driver(dtype, arrays):
        op = test_project_pages.ProjectPages(**test_project_pages.attributes(arrays))
        return launcher(op, dtype, arrays)

    test_project_pages.test_equals_the_reference("batch", by_driver, "float16")
