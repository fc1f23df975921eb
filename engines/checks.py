"""Checks of what callers hand in, with errors that say found and expected."""

from __future__ import annotations

from numbers import Integral
from typing import TypeGuard, overload

from engines.errors import FlexError, OptionError


def is_integer(value: object) -> TypeGuard[int]:
    """Whether `value` is a whole number, NumPy's included; True and False are none.

    Keep `int(value)` of it, not itself: NumPy's wrap around where Python's grow.
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


def shown(value: object) -> str:
    """`value` in a message: its repr, at most 60 characters of it, and its type where there is none. Python does not
    print integers of more than 4300 digits."""
    try:
        return f"{value!r:.60}"
    except Exception:  # whatever somebody's __repr__ raises
        return f"{type(value).__name__} that cannot be printed"


@overload
def require_integer(
    value: object,
    found: str,
    low: int | None = None,
    high: int | None = None,
    *,
    none: None = None,
    error: type[FlexError] = OptionError,
) -> int: ...


@overload
def require_integer(
    value: object,
    found: str,
    low: int | None = None,
    high: int | None = None,
    *,
    none: str,
    error: type[FlexError] = OptionError,
) -> int | None: ...


def require_integer(
    value: object,
    found: str,
    low: int | None = None,
    high: int | None = None,
    *,
    none: str | None = None,
    error: type[FlexError] = OptionError,
) -> int | None:
    """`value` as one of Python's integers; `error` unless it is whole, from `low` to `high`, both included (None: no
    bound).

    found: what the message says of the value, such as "batch 0". none: None is allowed, and means this ("every core").
    The fix is the nearest integer there is, or None where that is allowed.
    """
    if value is None and none is not None:
        return None
    if is_integer(value) and (low is None or value >= low) and (high is None or value <= high):
        return int(value)
    bounds = "" if low is None else f" of at least {low}" if high is None else f", {low} .. {high}"
    nearest = low if is_integer(value) and low is not None and value < low else high if is_integer(value) else None
    ways = [f"use {nearest}"] if nearest is not None else []
    ways += [f"leave it out: {none}"] if none else []
    expected = f"an integer{bounds}" + (f", or None for {none}" if none else "")
    raise error(found, expected=expected, fix=", or ".join(ways) or None)
