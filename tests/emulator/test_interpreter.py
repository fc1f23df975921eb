"""The interpreter computes what a GPU would, and catches what a GPU would not survive."""

from __future__ import annotations

import numpy as np
import pytest

from plugins.op import Kernel, Launch
from plugins.select_pages.launch import SelectPages
from tests.emulator.interpreter import call, run
from tests.emulator.memory import MemoryFault, aligned_copy
from tests.emulator.triton_cpu import RaceError, to_bfloat16, to_float32

BLOCK = 16


def launch(name, source, target, *, count=BLOCK, kind="fp32", grid=1, **change):
    parameters = ("source", f"*{kind}"), ("target", f"*{kind}"), ("count", "i32")
    function = f"tests.emulator.kernels_for_tests:{name}"
    kernel = Kernel(name, function, change.get("parameters", parameters), (("BLOCK", BLOCK),))
    addresses = {"source": source.ctypes.data + change.get("offset", 0), "target": target.ctypes.data}
    arguments = addresses | {"count": count} | change.get("arguments", {})
    run([Launch(kernel, (grid, 1, 1), arguments)], [source, target])


def arrays(count=BLOCK, kind=np.float32):
    return aligned_copy(np.arange(count).astype(kind)), aligned_copy(np.zeros(count, kind))


def test_a_load_past_the_end_is_caught():
    source, target = arrays()
    launch("copy_one_too_many", source, target, count=BLOCK - 1)
    assert np.array_equal(target[:-1], source[:-1])
    short = aligned_copy(source[:8])
    with pytest.raises(MemoryFault, match=r"copy_one_too_many: a load touches 4 bytes .* 32 bytes into array 0 of 32"):
        launch("copy_one_too_many", short, target, count=8)


def test_programs_that_interfere_are_caught():
    with pytest.raises(RaceError, match=r"\(0, 0, 0\) and \(1, 0, 0\) both write"):
        launch("all_write_first", *arrays(), grid=3)
    launch("all_write_first", *arrays(), grid=1)
    with pytest.raises(RaceError, match=r"program \(1, 0, 0\) reads .* program \(0, 0, 0\) writes"):
        launch("read_neighbour", *arrays(), grid=2)


def test_what_a_driver_would_not_notice_is_refused():
    source, target = arrays()
    with pytest.raises(ValueError, match="not aligned"):
        launch("all_write_first", source, target, offset=4)
    with pytest.raises(ValueError, match="32-bit"):
        launch("all_write_first", source, target, count=2**31)
    with pytest.raises(ValueError, match="grid"):
        launch("all_write_first", source, target, grid=0)
    with pytest.raises(ValueError, match="function has"):
        launch("all_write_first", source, target, parameters=(("target", "*fp32"), ("source", "*fp32")))
    with pytest.raises(ValueError, match="4 arguments, 3 parameters: limit"):
        launch("all_write_first", source, target, arguments={"limit": 3})


def test_bfloat16_rounds_like_a_gpu():
    torch = pytest.importorskip("torch")
    values = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    source = aligned_copy(values.view(torch.uint16).numpy())
    target = aligned_copy(np.zeros_like(source))
    launch("bfloat16_sum", source, target, kind="bf16")
    expected = values + values * (values > 0).to(torch.bfloat16)
    assert np.array_equal(to_float32(target), expected.float().numpy())
    wide = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    wide[:3] = np.nan, np.inf, 3.3895e38
    assert np.array_equal(
        to_float32(to_bfloat16(wide)), torch.from_numpy(wide).to(torch.bfloat16).float().numpy(), equal_nan=True
    )


def test_float32_dot_loses_what_tf32_loses():
    source = aligned_copy(np.random.default_rng(0).standard_normal((BLOCK, BLOCK)).astype(np.float32))
    target = aligned_copy(np.zeros_like(source))
    launch("float32_dot", source, target)
    error = np.abs(target - source @ source).max()
    assert 1e-4 < error < 2e-2


def test_an_op_with_its_shapes_and_scratch():
    maps = np.zeros((2, 9, 9), np.float32)
    maps[0, 2, 5] = maps[0, 6, 1] = maps[0, 0, 7] = 0.5
    op = SelectPages(grid=9, cells=9, threshold=-1)
    inputs = {"map": maps, "margins": np.zeros((2, 2), np.int64), "page_budget": np.array([2, 9])}
    found = call(op, "float16", inputs)
    assert found["page_count"].tolist() == [2, 0] and found["pages"][0, :2].tolist() == [7, 2 * 9 + 5]
    with pytest.raises(ValueError, match="margins is int32"):
        call(op, "float16", inputs | {"margins": np.zeros((2, 2), np.int32)})
