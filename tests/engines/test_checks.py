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
    nearest = {0: "use 1", 6: "use 5"}  # True and 1.0 equal 1, and are none
    assert caught.value.fix == (nearest.get(value) if type(value) is int else None)


def test_bounds_none_and_the_error():
    for value in (1, 5, np.uint8(5)):
        kept = require_integer(value, "rows", 1, 5)
        assert kept == value and type(kept) is int
    require_integer(-7, "any")
    assert require_integer(None, "rows", 1, none="every row") is None
    with pytest.raises(BackendError) as caught:
        require_integer(0, "rows", 1, none="every row", error=BackendError)
    assert caught.value.expected == "an integer of at least 1, or None for every row"
    assert caught.value.fix == "use 1, or leave it out: every row"
    with pytest.raises(OptionError) as caught:
        require_integer("2", "rows '2'", 1, none="every row")
    assert caught.value.fix == "leave it out: every row"
