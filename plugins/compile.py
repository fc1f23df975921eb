"""The kernels of a model of any size, compiled: `python -m plugins.compile --out kernels.zip`.

Shows what they need on each SM. A bundle's own kernels come with it: export/build.py compiles them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from plugins.artifacts import Artifacts
from plugins.command import run
from plugins.compiler.kernels import compile_kernels
from plugins.compiler.ptxas import SMS
from plugins.op import MODEL_DTYPES
from plugins.registry import kernels_of_model

OFFICIAL_7B = {
    "hidden": 4096, "heads": 32, "kv_heads": 32, "head_dim": 128,
    "grid": 24, "cells": 9, "page_size": 64, "threshold": 48, "int8_pages": 0,
}  # fmt: skip


def table(artifacts: Artifacts) -> str:
    """Registers per thread of every kernel and SM, and its shared memory. Spills need no column: they are refused."""
    rows = [["kernel", "threads", "shared", *(f"sm_{sm}" for sm in artifacts.sms)]]
    for c in artifacts.compiled:
        rows.append([c.kernel.name, str(c.threads), str(c.shared), *(str(c.registers[sm]) for sm in artifacts.sms)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(["registers per thread, shared memory in bytes; no spills", *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the command line; returns the exit status."""
    parser = argparse.ArgumentParser("python -m plugins.compile", description="Compile the kernels of the plugins.")
    for name, value in OFFICIAL_7B.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--dtype", choices=MODEL_DTYPES, default="float16", help="default float16")
    parser.add_argument("--sm", default=",".join(map(str, SMS)), help="compute capabilities, such as 87 for Orin")
    parser.add_argument("--out", type=Path, default=Path("kernels.zip"))
    options = parser.parse_args(arguments)
    try:
        sms = [int(sm) for sm in options.sm.split(",")]
    except ValueError:
        parser.error(f"--sm {options.sm}: expected numbers with commas between, such as 86,87")

    def progress(done: int, total: int, what: str) -> None:
        print(f"\r[{done}/{total}] {what:<40}", end="", file=sys.stderr, flush=True)

    def work() -> None:
        kernels = kernels_of_model({name: getattr(options, name) for name in OFFICIAL_7B}, options.dtype)
        artifacts = compile_kernels(kernels, sms, progress if sys.stderr.isatty() else None)
        artifacts.write(options.out)
        print(table(artifacts))
        print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB, {options.dtype}, SHA-256 {artifacts.sha256}")

    return run(work, "interrupted; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
