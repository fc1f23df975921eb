"""The base of all errors raised on purpose, and those of the kernels. Every one says what was found, what was expected
and what fixes it."""

from __future__ import annotations

from typing import TypeVar

Error = TypeVar("Error", bound="FlexError")


class FlexError(Exception):
    """Base of all errors raised on purpose. `found` is required; `expected` and `fix` complete the message.

    Catch `FlexError` to catch everything; catch a subclass to tell the causes apart.
    """

    def __init__(self, found: str, *, expected: str | None = None, fix: str | None = None) -> None:
        self.found, self.expected, self.fix = found, expected, fix
        lines = [found]
        if expected:
            lines.append(f"  expected: {expected}")
        if fix:
            lines.append(f"  fix: {fix}")
        super().__init__("\n".join(lines))

    def within(self: Error, where: str, *, fix: str | None = None) -> Error:  # Python 3.10 has no typing.Self
        """The same error, which first says where it arose: only who called knows the bundle, or the part of a model.

        `fix`, if given, takes the place of its own.
        """
        return type(self)(f"{where}: {self.found}", expected=self.expected, fix=fix or self.fix)


class KernelError(FlexError):
    """Kernels cannot be compiled, read, or used here."""
