"""The Triton kernels against the PyTorch references, in Triton's interpreter (tests/emulator): loads, stores and races
checked. Whatever a kernel must not read is NaN, so a finite result shows that it did not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plugins.cached_attention.launch import CachedAttention
from plugins.cached_attention.reference import cached_attention
from plugins.hierarchical_attention.launch import HierarchicalAttention
from plugins.hierarchical_attention.reference import hierarchical_attention
from plugins.select_pages.launch import SelectPages
from plugins.select_pages.reference import select_pages
from tests.emulator.interpreter import call
from tests.plugins.attention_inputs import Sizes, attention_inputs

# Largest difference of a value of size one: float32 sums in another order; the references round weights and scores to
# the model dtype on the way, the kernels do not.
BOUND = {"float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}

CASES = {
    "decode": Sizes(),
    "no page": Sizes(counts=(0,)),
    "all pages": Sizes(counts=(9,)),
    "short pages": Sizes(counts=(5,), short_pages=True),
    "pages of more than a tile": Sizes(page_size=70, pages=4, counts=(3,), short_pages=True),
    "first token": Sizes(past=(0,), begin=(0,)),
    "no room left": Sizes(past=(59,), counts=(1,)),
    "split boundary": Sizes(capacity=300, past=(256,), counts=(3,)),
    "ragged last split": Sizes(capacity=300, past=(257,), counts=(9,), begin=(120,)),
    "image at the end": Sizes(past=(41,), begin=(24,)),
    "grouped heads": Sizes(heads=8, kv_heads=2),
    "head size 96": Sizes(head_dim=96),
    "batch": Sizes(past=(41, 0, 17), counts=(2, 0, 9), begin=(3, 0, 1), kv_heads=2, short_pages=True),
    "prefill": Sizes(past=(20,), steps=7),
    "prefill from nothing": Sizes(past=(0,), steps=5, counts=(0,)),
    "prefill of several tiles": Sizes(capacity=170, past=(3,), steps=150, begin=(90,), counts=(4,)),
    "prefill, batch, grouped": Sizes(heads=8, kv_heads=2, past=(4, 30), steps=9, counts=(0, 3), begin=(0, 2)),
    "prefill, head size 96": Sizes(head_dim=96, past=(5,), steps=6),
}


def rounded(arrays: list[np.ndarray], dtype: str) -> list[np.ndarray]:
    """The float32 inputs that the model has in its own dtype, as that dtype (bfloat16 as its bits)."""
    kinds = [tensor.dtype for tensor in HierarchicalAttention.inputs]
    return [
        to_bits(torch.from_numpy(array).to(getattr(torch, dtype))) if kind == "model" else array
        for array, kind in zip(arrays, kinds, strict=False)
    ]


def to_bits(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def to_torch(array: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def check(sizes: Sizes, dtype: str, paged: bool, run=call) -> None:
    """`run(op, dtype, inputs)` -> outputs, in place of the interpreter on a GPU."""
    count = 14 if paged else 9
    arrays = rounded(attention_inputs(sizes)[:count], dtype)
    tame = rounded(attention_inputs(sizes, poison=0.0)[:count], dtype)  # the reference multiplies by weights of zero
    reference, op = (hierarchical_attention, HierarchicalAttention) if paged else (cached_attention, CachedAttention)
    attributes = sizes.attributes(paged)
    expected = reference(*map(to_torch, tame), *attributes.values())
    found = [to_torch(array) for array in run(op(**attributes), dtype, arrays)]
    for name, left, right in zip(("context", "present_key", "present_value", "map"), expected, found, strict=True):
        assert right.shape == left.shape, name
        if name.startswith("present"):  # copies and rotated keys; what lies behind them stays as it was
            for row, length in enumerate(sizes.past):
                end = length + sizes.steps
                assert torch.isfinite(right[row, :, :end]).all(), name
                assert torch.isnan(right[row, :, end:]).all(), name
                error = (right[row, :, :end].float() - left[row, :, :end].float()).abs().max()
                assert error <= BOUND[dtype], (name, row, error)
        else:
            assert torch.isfinite(right).all(), name
            error = (right.float() - left.float()).abs().max()
            assert error <= BOUND[dtype], (name, error)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("case", CASES)
def test_attention(case, dtype):
    check(CASES[case], dtype, paged=True)
    if "page" not in case:
        check(CASES[case], dtype, paged=False)


def test_attention_at_the_size_of_7b():
    sizes = Sizes(
        heads=32, kv_heads=32, head_dim=128, grid=24, pages=81, page_size=64, capacity=1200, past=(1100,), counts=(10,),
        begin=(35,),
    )  # fmt: skip
    check(sizes, "float16", paged=True)


def selection_by_kernel(maps, sides, budget, cells, threshold):
    op = SelectPages(grid=maps.shape[1], cells=cells, threshold=threshold)
    return call(op, "float32", [maps, sides, budget])


def test_selection_survives_values_that_are_no_numbers():
    """Every page has a place of its own in the list, whatever the map holds: the attention kernel follows it."""
    maps = np.random.default_rng(0).random((2, 6, 6), np.float32)
    maps[0, 2:4] = np.nan
    maps[1] = np.nan
    pages, count = selection_by_kernel(maps, np.zeros((2, 2), np.int64), np.full(2, 9, np.int64), 3, 48)
    assert [sorted(row) for row in pages.tolist()] == [list(range(9))] * 2
    assert count[1] == 0


@pytest.mark.parametrize("grid", [9, 10, 12, 24])
@pytest.mark.parametrize("cells", [3, 9])
def test_selection(grid, cells):
    maps = np.random.default_rng(grid * cells).random((3, grid, grid), np.float32) ** 4
    maps[2, 1, 2] = maps[2, 7, 8] = maps[2].max()  # equal scores
    sides, budget = np.array([[0, 1], [2, 0], [0, 0]]), np.array([4, 81, 0])
    expected = select_pages(*map(torch.from_numpy, (maps, sides, budget)), grid, cells, 48)
    for left, right in zip(expected, selection_by_kernel(maps, sides, budget, cells, 48), strict=True):
        assert left.tolist() == right.tolist()
