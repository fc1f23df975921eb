"""How a command line that can fail ends: an error or an interruption is a message and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable

from plugins.errors import FlexError


def run(main: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """The exit status of a command: what `main` returns (None is 0), 1 after a FlexError, 130 after Ctrl-C.

    interrupted: what is said then.
    """
    try:
        return main() or 0
    except FlexError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
