"""What `python export/build.py --plan` prints."""

from __future__ import annotations

import io

from rich.console import Console

from export.build import parse_arguments, print_sizes


def printed(*arguments: object) -> tuple[bool, str]:
    """Whether it fits, or something does with --fit, and what --plan prints with these arguments."""
    console = Console(file=io.StringIO(), width=200)
    fits = print_sizes(parse_arguments(["--plan", *map(str, arguments)]), console)
    return fits, console.file.getvalue()
