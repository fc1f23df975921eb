"""Integers, and what is none."""

from __future__ import annotations

import numpy as np
import pytest

from engines.checks import require_integer
from engines.errors import BackendError, OptionError


@pytest.mark.parametrize("value", [True, False, 1.0, "1", None, np.bool_(True), np.float64(1), 0, 6])
def test_what_is_no_integer_in_range(value):
    with pytest.raises(OptionError, match="rows") as caught:
        require_integer(value, f"rows {value!r}", 1, 5)
    assert caught.value.expected == "an integer, 1 .. 5"


def test_bounds_none_and_the_error():
    for value in (1, 5, np.uint8(5)):
        kept = require_integer(value, "rows", 1, 5)
        assert kept == value and type(kept) is int
    require_integer(-7, "any")
    assert require_integer(None, "rows", 1, none="every row") is None
    with pytest.raises(BackendError) as caught:
        require_integer(0, "rows", 1, none="every row", error=BackendError)
    assert caught.value.expected == "an integer of at least 1, or None for every row"
