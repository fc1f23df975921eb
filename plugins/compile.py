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
from plugins.op import FIRST_SM, MODEL_DTYPES
from plugins.registry import kernels_of_model

OFFICIAL_7B = {
    "hidden": 4096, "heads": 32, "kv_heads": 32, "head_dim": 128,
    "grid": 24, "cells": 9, "page_size": 64, "threshold": 48, "int8_pages": 0, "int8_cache": 0,
    "page_slots": 0,
}  # fmt: skip


HEADING = """\
registers per thread, shared memory in bytes; no spills; empty: another variant runs there (plugins/tiles.py)
*: code of the architecture's own instructions"""


def table(artifacts: Artifacts) -> str:
    """A row for each variant of a kernel: its tile, stages, threads and shared memory, and the registers per thread on
    each SM that runs it. Spills need no column: they are refused."""
    rows = [["kernel", "tile", "stages", "threads", "shared", *(f"sm_{sm}" for sm in artifacts.sms)]]
    for c in artifacts.compiled:
        kernel, constants = c.kernel, dict(c.kernel.constants)
        tile = " ".join(f"{name}={constants[name]}" for name in kernel.tile if name in constants)
        sizes = map(str, (kernel.stages, c.threads, c.shared))
        own = "" if kernel.arch == FIRST_SM else "*"
        used = (f"{c.registers[sm]}{own}" if sm in c.registers else "" for sm in artifacts.sms)
        rows.append([kernel.name, tile, *sizes, *used])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([HEADING, *lines])


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
