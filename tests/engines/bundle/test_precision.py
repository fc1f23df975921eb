"""The table of precisions does not contradict itself, nor the targets."""

from __future__ import annotations

import pytest

from engines.bundle.precision import BLOCK_SIZES, COLUMN, DEFAULT, FP8, FP32, INT4, INT8, PRECISIONS, precision_named
from engines.errors import OptionError
from engines.targets import TARGETS


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=str)
def test_what_is_said_of_a_precision_fits_together(precision):
    assert precision_named(precision.name) is precision and str(precision) == precision.name
    assert precision.itemsize == {"float32": 4, "float16": 2, "bfloat16": 2}[precision.dtype]
    assert precision.ort_dtype in (precision.dtype, "float32")
    assert precision.quantises == bool(precision.block_sizes) == (precision.default_block is not None)
    assert set(precision.block_sizes) <= {*BLOCK_SIZES, COLUMN}
    if precision.quantises:
        assert precision.block_size() == precision.default_block and precision.block_size(16) == 16
        assert precision.default_block in precision.block_sizes and precision.widened
    bits = [each.bits or 8 * each.itemsize for each in (precision, *precision.smaller)]
    assert bits == sorted(bits, reverse=True) and len(set(bits)) == len(bits)  # each proposal is smaller


def test_calibration_is_for_integers_in_blocks():
    assert INT4.calibrates(128) and INT8.calibrates(16)
    assert not INT8.calibrates(COLUMN) and not FP8.calibrates(COLUMN) and not DEFAULT.calibrates(128)


def test_a_name_nobody_knows():
    with pytest.raises(OptionError, match="precision 'nvfp4'") as caught:
        precision_named("nvfp4")
    assert "fp16, fp32" in caught.value.expected


def test_targets_name_precisions_that_can_be_built():
    for board in TARGETS.values():
        served = {PRECISIONS[name] for name in board.precisions}  # no name is unknown
        assert FP32 not in served  # it runs everywhere
        assert all(board.sm >= (each.least_sm or 0) for each in served)
        assert (FP8 in served) == (board.sm >= FP8.least_sm)
