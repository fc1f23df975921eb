"""Official decode steps with the Triton kernels in place of the ONNX bodies: plugins, launches and kernels on the CPU.

Prefill with kernels: tests/engines/test_trt.py, on a smaller model.
"""

from __future__ import annotations

import numpy as np
import pytest

from engines.bundle.pages import cell_of_row
from runtime import Engine
from tests.conftest import once
from tests.emulator.driver import Driver
from tests.emulator.tensorrt import install, with_plans

STEPS = 3  # of the official 13: the interpreter takes its time


@pytest.mark.parametrize("case", ["small_150x200"], indirect=True)
def test_official_tokens_and_masks(case, bundle, shared, monkeypatch):
    driver = Driver()
    install(driver, monkeypatch)
    folder = once(
        shared / f"{case.weights}-kernels",
        lambda folder: with_plans(bundle("fp32", case.weights), folder, "tensorrt", plugins=True, prefill=False),
    )
    engine, golden = Engine(folder), case.golden
    cell = cell_of_row(engine.geometry)
    answer = engine.generate(
        case.image, input_ids=golden["input_ids"].tolist(), max_new_tokens=STEPS, trace=True, stop_at_eos=False
    )
    assert answer.token_ids == golden["output_ids"][1 : 1 + STEPS].tolist()
    assert np.array_equal(answer.trace.cells[:, :, cell][:, :, :, cell], golden["select_mask"][:STEPS])
    assert np.abs(answer.trace.logits - golden["logits"][:STEPS]).max() <= 2e-4
    assert driver.launches.count("select_pages") == STEPS * len(engine.geometry.selecting_layers)
    assert driver.counts["cuGraphLaunch"] == STEPS - 1
