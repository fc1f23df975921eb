"""The report on precisions: bounds on what int8, int4 and fp8 cost, and what it says when a block size does not fit."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

import numpy as np
import pytest

from engines.bundle.precision import COLUMN
from engines.bundle.tensors import APART, fitting_blocks, quantised_tensors
from export.build import BuildOptions, build
from export.checkpoint.config import read_config
from tests.conftest import once
from tests.parity import gates
from tests.parity.report import ROWS, ROWS_APART, WHOLE, Replay, Row, official_cases, overlap, replay, table
from tests.paths import OFFICIAL

AT_ONCE = "a cell flips in the first step of each run"
BY_THREADS = "with one thread a cell flips in the first step of each run, with two it does not"


@dataclass(frozen=True)
class Bound:
    """What a row may cost. before: of a logit, in the steps of a run before any cell differs; always: in all of them.
    worst: IoU of the selected pages in the worst layer, at least. others: tokens of 65 that may differ. none: why there
    may be no step before a flip; "": there must be one."""

    before: float
    always: float
    worst: float
    others: int
    none: str = ""


# About twice what was measured (docs/figures.md, Precisions). Weights of the official small model are random; 16 is the
# only block size that divides its widths.
BOUNDS = {
    Row("int8", 16): Bound(0.2, 5.0, 0.85, 20, BY_THREADS),
    Row("int4", 16): Bound(1.0, 7.0, 0.45, 45, AT_ONCE),
    Row("int8", COLUMN): Bound(0.2, 4.5, 0.8, 20, AT_ONCE),
    Row("fp8", COLUMN): Bound(0.5, 5.0, 0.7, 35, AT_ONCE),
    Row("fp16", embeddings="int8"): Bound(0.12, 1.9, 0.95, 4),
    # A head of int8 changes nothing but tokens.
    Row("int8", 16, head="int8"): Bound(0.2, 5.0, 0.85, 20, BY_THREADS),
    Row("int8", 16, head="int4"): Bound(0.2, 5.0, 0.85, 30, BY_THREADS),
    Row("int8", 16, vision="int8"): Bound(0.2, 4.5, 0.75, 25, AT_ONCE),
    Row("int8", 16, vision="int4"): Bound(1.0, 8.5, 0.4, 45, AT_ONCE),
    Row("int4", 16, head="int8", vision="int8", embeddings="int8"): Bound(1.0, 8.5, 0.45, 48, AT_ONCE),
    WHOLE: Bound(1.0, 7.5, 0.45, 45, AT_ONCE),
}
# Replayed step by step, against bounds of their own: test_precisions.py, pages/test_int8_pages.py, and
# cache/test_official_runs.py.
REPLAYED = {
    **{Row(name): bounds for name, bounds in gates.BOUNDS.items()},
    Row("fp32", kv="int8"): gates.INT8_PAGES,
    Row("fp32", kv_cache="int8"): gates.with_int8(gates.BOUNDS["fp32"], gates.INT8_CACHE),
    Row("fp32", kv="int8", kv_cache="int8"): gates.with_int8(gates.BOUNDS["fp32"], gates.INT8_CACHE, gates.INT8_PAGES),
}


def why_unbounded(row: Row) -> str:
    """Why nothing bounds what a row costs; "" where no reason is known."""
    geometry = read_config(OFFICIAL / "weights").geometry
    blocks = fitting_blocks(quantised_tensors(geometry).values())
    if row.block not in (None, COLUMN, *blocks):
        return "it has no figures of official runs: its blocks divide none of the small model's widths"
    if row.calibrated:
        return "what calibration gives is tested where it is made: tests/export/weights/test_calibrate.py"
    if row in (Row("int4", 16, head="int8"), Row("int4", 16, head="int4")):
        return "a head costs no pages: int8, beside what else there is in codes, and int4, beside int8, are bounded"
    return ""


def require(found: Replay, bound: Bound) -> None:
    """That a replay is within a bound; NaN never is."""
    assert found.tokens[1] == 13 * 5 and found.tokens[1] - found.tokens[0] <= bound.others
    assert found.always <= bound.always and np.min(found.overlap) >= bound.worst
    assert found.before <= bound.before or (np.isnan(found.before) and bound.none)


@pytest.mark.parametrize("row", BOUNDS, ids=lambda row: row.label)
def test_what_a_row_costs(row, shared):
    out = shared / f"report-{row.label.replace(', ', '-').replace(' ', '-')}"
    apart = {kind: getattr(row, kind) for kind in APART}
    apart |= {"kv": row.kv, "kv_cache": row.kv_cache}
    options = BuildOptions(OFFICIAL / "weights", out, row.precision, row.block, **apart, check="none")
    found = replay(once(options.out, lambda _: build(options)), official_cases())
    print(row.label, found)
    require(found, BOUNDS[row])


def test_every_row_has_a_bound_or_a_reason():
    for row in (*ROWS, *ROWS_APART):
        bound = BOUNDS.get(row) or REPLAYED.get(row)
        if bound is None:
            assert why_unbounded(row), row.label
        else:
            assert all(np.isfinite(each) for each in astuple(bound) if not isinstance(each, str)), row.label
    assert {*BOUNDS, *REPLAYED} <= {*ROWS, *ROWS_APART}


@pytest.mark.parametrize(
    "change",
    [
        {"before": 0.21}, {"before": float("nan")}, {"always": 5.1}, {"always": float("nan")},
        {"overlap": (1.0, 0.84)}, {"overlap": (1.0, float("nan"))}, {"tokens": (44, 65)}, {"tokens": (12, 13)},
    ],
    ids=str,
)  # fmt: skip
def test_a_check_can_fail(change):
    bound = Bound(0.2, 5.0, 0.85, 20)
    right = Replay(0.1, 2.5, (0.97, 0.93), (57, 65))
    require(right, bound)
    with pytest.raises(AssertionError):
        require(replace(right, **change), bound)
    require(replace(right, before=float("nan")), replace(bound, none=AT_ONCE))  # where the row says why


def test_overlap():
    found = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0]], bool)
    expected = np.array([[0, 1, 1], [0, 0, 0], [0, 1, 0]], bool)
    assert overlap(found, expected).tolist() == pytest.approx([1 / 3, 1, 0])


def test_block_sizes_that_do_not_divide_are_said():
    lines = table((OFFICIAL / "weights", OFFICIAL / "weights"), 0, 0, [Row("int4", 64)])
    assert not any(line.startswith("| int4") for line in lines)
    assert "down_proj.weight with its 176 inputs" in lines[-1]
