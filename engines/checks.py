"""Checks of what callers hand in, with errors that say found and expected."""

from __future__ import annotations

from typing import TypeGuard

from engines.errors import FlexError, OptionError


def is_integer(value: object) -> TypeGuard[int]:
    """Whether `value` is one of Python's integers; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def require_integer(
    value: object,
    found: str,
    low: int | None = None,
    high: int | None = None,
    *,
    none: str | None = None,
    error: type[FlexError] = OptionError,
) -> None:
    """Raise `error` unless `value` is an integer from `low` to `high`, both included (None: no bound).

    found: what the message says of the value, such as "batch 0". none: None is allowed, and means this ("every core").
    """
    if value is None and none is not None:
        return
    if is_integer(value) and (low is None or value >= low) and (high is None or value <= high):
        return
    bounds = "" if low is None else f" of at least {low}" if high is None else f", {low} .. {high}"
    raise error(found, expected=f"an integer{bounds}" + (f", or None for {none}" if none else ""))
