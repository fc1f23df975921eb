"""The line that says what was not tested."""

from __future__ import annotations

import pytest

from tests.skips import in_one_line


def skipped(reason: str) -> pytest.TestReport:
    where = "test_x.py", 1, f"Skipped: {reason}"
    return pytest.TestReport("test_x.py::test", ("test_x.py", 1, "test"), {}, "skipped", where, "setup")


def test_reasons_are_counted():
    where = "test_y.py", 3, "Skipped: tensorrt-rtx is not installed"
    file = pytest.CollectReport("test_y.py", "skipped", where, None)
    gpu = [skipped("needs an NVIDIA GPU: no driver"), skipped("needs an NVIDIA GPU: no device\nmore")]
    assert in_one_line([skipped("needs onnxruntime-gpu: pip install it"), *gpu, file]) == (
        "skipped: 2 tests (needs an NVIDIA GPU), 1 test (needs onnxruntime-gpu), 1 file (tensorrt-rtx is not installed)"
    )
    assert in_one_line([]) == ""
