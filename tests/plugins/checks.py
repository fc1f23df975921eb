"""What every way to run an op must come to: comparisons with the references, on the CPU and on a GPU alike.

`run`: see harness.py. Whatever an op must not read is NaN, so a finite result shows that it did not.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from plugins.select_pages.launch import SelectPages
from tests.plugins.harness import Run, by_reference
from tests.plugins.inputs import (
    Sizes,
    attention_inputs,
    in_slots,
    int8_attention_inputs,
    int8_projection_inputs,
    on_int8_cache,
    projection_inputs,
    projection_op,
    rounded,
    to_torch,
)

# Largest difference of a value of size one: float32 sums in another order; the references round weights and scores to
# the model dtype on the way, the kernels do not.
ATTENTION_BOUND = {"float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}
PROJECTION_BOUND = {"float32": 2e-5, "float16": 8e-3, "bfloat16": 6e-2}
PAGE_SLOTS = 6  # of nine pages, unless more are held at once


def dequantised(whole: torch.Tensor | np.ndarray, step: torch.Tensor | np.ndarray) -> torch.Tensor:
    """The values of an int8 store."""
    return torch.as_tensor(whole).float() * torch.as_tensor(step)[..., None]


def compare_attention(
    sizes: Sizes, expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], bound: float
) -> None:
    """The cache as far as it holds tokens, and untouched behind them; context and map."""
    assert found.keys() == expected.keys()
    for name in expected:
        left, right = to_torch(expected[name]), to_torch(found[name])
        assert right.shape == left.shape, name
        if name.startswith("present"):  # copies and rotated keys; what lies behind them stays as it was
            for row, length in enumerate(sizes.past):
                end = length + sizes.steps
                assert torch.isfinite(right[row, :, :end]).all(), name
                assert torch.isnan(right[row, :, end:]).all(), name
                error = (right[row, :, :end].float() - left[row, :, :end].float()).abs().max()
                assert error <= bound, (name, row, error)
        else:
            assert torch.isfinite(right).all(), name
            error = (right.float() - left.float()).abs().max()
            assert error <= bound, (name, error)


def check_attention(
    sizes: Sizes, dtype: str, run: Run, *, paged: bool, bound: Mapping[str, float] = ATTENTION_BOUND
) -> None:
    """flex::HierarchicalAttention, or without `paged` flex::CachedAttention."""
    op = sizes.hierarchical() if paged else sizes.cached()
    tame = rounded(op, dtype, attention_inputs(sizes, poison=0.0))  # the reference multiplies by weights of zero
    found = run(op, dtype, rounded(op, dtype, attention_inputs(sizes)))
    compare_attention(sizes, by_reference(op, dtype, tame), found, bound[dtype])


def check_int8_attention(sizes: Sizes, dtype: str, run: Run, *, bound: Mapping[str, float] = ATTENTION_BOUND) -> None:
    """flex::HierarchicalAttention of int8 pages. The scales of unlisted pages and short ends are NaN, too."""
    op = sizes.hierarchical(int8_pages=1)
    poisoned = int8_attention_inputs(sizes, dtype, poison=np.nan)
    assert np.isnan(poisoned["page_value_scale"]).any() or sizes.counts == (sizes.pages,)
    tame = int8_attention_inputs(sizes, dtype, poison=0.0)
    compare_attention(sizes, by_reference(op, dtype, tame), run(op, dtype, poisoned), bound[dtype])


def check_int8_cache(
    sizes: Sizes, dtype: str, run: Run, *, bound: Mapping[str, float] = ATTENTION_BOUND, ties: int = 0
) -> None:
    """Both ops over an int8 cache, with pages of floats and int8 ones. Scales of whatever nobody may look at are NaN,
    before and after. `ties`: see compare_int8_cache."""
    tame, poisoned = (on_int8_cache(sizes, dtype, poison=poison) for poison in (0.0, np.nan))
    for (op, given), (_, arrays) in zip(poisoned, tame, strict=True):
        expected, found = by_reference(op, dtype, arrays), run(op, dtype, given)
        compare_int8_cache(sizes, given, expected, found, bound[dtype], ties=ties)


def compare_int8_cache(
    sizes: Sizes,
    given: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
    bound: float,
    *,
    ties: int = 0,
) -> None:
    """Attention over an int8 cache, whose inputs are `given`: what is there and what lies behind the new tokens stays
    as it was, NaN or not; the new tokens are stored as in `expected`, but for a thousandth of the numbers, or for
    `ties` of them if that is more; context and map."""
    assert found.keys() == expected.keys()
    for half in ("key", "value"):
        for store in (half, f"{half}_scale"):
            past, left, right = given[f"past_{store}"], expected[f"present_{store}"], found[f"present_{store}"]
            assert right.shape == left.shape == past.shape and right.dtype == left.dtype == past.dtype, store
            for row, length in enumerate(sizes.past):
                end = length + sizes.steps
                for old in (slice(length), slice(end, None)):
                    assert np.array_equal(right[row, :, old], past[row, :, old], equal_nan=store != half), store
                new, wanted = right[row, :, length:end], left[row, :, length:end]
                if store == half:
                    # What differs in its last bit may be a tie that is rounded to the other side, by one step: halves
                    # of a step are common where numbers have few bits, and a GPU divides otherwise.
                    moved = np.abs(new.astype(int) - wanted)
                    assert moved.max() <= 1 and moved.sum() <= max(ties, 1e-3 * moved.size), store
                else:
                    np.testing.assert_allclose(new, wanted, rtol=1e-6, err_msg=store)
    for name in ("context", "map"):
        left, right = to_torch(expected[name]), to_torch(found[name])
        assert right.shape == left.shape and torch.isfinite(right).all(), name
        error = (right.float() - left.float()).abs().max()
        assert error <= bound, (name, error)


def check_projection(
    case: Mapping[str, object], dtype: str, run: Run, *, bound: Mapping[str, float] = PROJECTION_BOUND
) -> None:
    """flex::ProjectPages. Unprojected pages are NaN before and, where nobody wants them, after."""
    plain = projection_inputs(**case)
    op = projection_op(plain)
    arrays = rounded(op, dtype, plain)
    expected, found = by_reference(op, dtype, arrays), run(op, dtype, arrays)
    present = to_torch(expected["present_projected"])
    assert torch.equal(to_torch(found["present_projected"]), present)
    for name in ("present_key", "present_value"):
        left, right = to_torch(expected[name]).float(), to_torch(found[name]).float()
        assert torch.equal(left.isnan(), right.isnan()), name
        assert not right[present[:, None].expand(right.shape[:3]) == 1].isnan().any(), name
        assert (left - right).nan_to_num().abs().max() <= bound[dtype], name


def check_int8_projection(
    case: Mapping[str, object], dtype: str, run: Run, *, bound: Mapping[str, float] = PROJECTION_BOUND
) -> None:
    """flex::ProjectPages with an int8 store. Scales of unprojected pages are NaN before and, where nobody wants them,
    after; what was there stays."""
    arrays = int8_projection_inputs(dtype, **case)
    op = projection_op(arrays)
    expected = {name: to_torch(array) for name, array in by_reference(op, dtype, arrays).items()}
    found = {name: torch.as_tensor(array) for name, array in run(op, dtype, arrays).items()}
    assert found.keys() == expected.keys()
    assert torch.equal(found["present_projected"], expected["present_projected"])
    present = expected["present_projected"].bool()
    for half in ("key", "value"):
        store, scale = f"present_{half}", f"present_{half}_scale"
        there = present[:, None, :, None].expand_as(expected[scale])
        assert torch.equal(~found[scale].isnan(), there)
        values, others = (dequantised(each[store], each[scale]) for each in (expected, found))
        # A product that differs in its last bit may be a tie that is rounded to the other side: one step.
        step = expected[scale][..., None]
        error = (values - others).abs()
        assert (error[there] <= (1.01 * step + bound[dtype]).expand_as(error)[there]).all()
        old = (torch.from_numpy(arrays["projected"]) == 1)[:, None, :, None].expand_as(there)
        assert torch.equal(found[store][old], torch.from_numpy(arrays[f"page_{half}"])[old])
    if dtype == "float32" and present.any():
        keys = found["present_key"] != expected["present_key"]
        assert keys[present[:, None].expand(keys.shape[:3])].float().mean() < 1e-3


def check_selection(grid: int, cells: int, run: Run) -> None:
    """flex::SelectPages on random maps, one of which has equal scores."""
    maps = np.random.default_rng(grid * cells).random((3, grid, grid), np.float32) ** 4
    maps[2, 1, 2] = maps[2, 7, 8] = maps[2].max()
    inputs = {"map": maps, "margins": np.array([[0, 1], [2, 0], [0, 0]]), "page_budget": np.array([4, 81, 0])}
    op = SelectPages(grid=grid, cells=cells, threshold=48)
    expected, found = by_reference(op, "float32", inputs), run(op, "float32", inputs)
    assert {name: array.tolist() for name, array in found.items()} == {
        name: array.tolist() for name, array in expected.items()
    }


def check_page_slots(case: Mapping[str, object], dtype: str, plain: Run, slotted: Run, *, int8: bool) -> None:
    """flex::ProjectPages with fewer page slots than pages, where there are fewer at once: each page is what a store of
    every page (`plain`) has, bit for bit, in its slot, and the other slots are as they were."""
    if int8:
        arrays = int8_projection_inputs(dtype, **case)
    else:
        arrays = projection_inputs(**case)
        arrays = rounded(projection_op(arrays), dtype, arrays)
    expected = plain(projection_op(arrays), dtype, arrays)
    present = np.array(expected["present_projected"]) == 1
    others = in_slots(arrays, count=max(PAGE_SLOTS, int(present.sum(1).max())))
    op = projection_op(others)
    assert op.attributes["page_slots"] == 1 and op.inputs[-1].name == "slots"
    found = slotted(op, dtype, others)
    assert found.keys() == expected.keys()
    assert np.array_equal(np.array(found["present_projected"]) == 1, present)
    for name in found.keys() - {"present_projected"}:
        before = others[name.replace("present", "page")]
        for row, held in enumerate(present):
            slots = others["slots"][row, held]
            assert np.array_equal(found[name][row][:, slots], expected[name][row][:, held], equal_nan=True), name
            rest = np.setdiff1d(np.arange(before.shape[2]), slots)
            assert np.array_equal(found[name][row][:, rest], before[row][:, rest], equal_nan=True), name
