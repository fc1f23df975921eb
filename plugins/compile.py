"""Kernels -> code for every board, without a GPU: `python -m plugins.compile --bundle BUNDLE --out kernels.zip`.

Triton writes one PTX text per kernel, old enough for the oldest CUDA served (plugins/compiler/ptx.py); ptxas makes
a cubin of it for each SM (plugins/compiler/ptxas.py). Boards need neither.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plugins.artifacts import Artifacts, Compiled, KernelError
from plugins.compiler.ptxas import SMS, Code, assemble, find_assemblers
from plugins.op import TRITON_TYPES, Kernel
from plugins.registry import kernels_of_model

OFFICIAL_7B = {
    "hidden": 4096, "heads": 32, "kv_heads": 32, "head_dim": 128,
    "grid": 24, "cells": 9, "page_size": 64, "threshold": 48, "int8_pages": 0,
}  # fmt: skip
DTYPE_OF_PRECISION = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}  # as bundle.json calls it


def compile_kernels(
    kernels: Iterable[Kernel], sms: Sequence[int] = SMS, progress: Callable[[int, int, str], None] | None = None
) -> Artifacts:
    """Compile kernels (of one model and dtype) for the SMs; `progress` is told (steps done, steps, what was done).

    Takes seconds, and about 200 MB for each core. Raises KernelError: no compiler, an unknown SM, a kernel that does
    not compile, spills registers, or needs more shared memory than a board has.
    """
    kernels, sms = list(kernels), sorted(set(sms))
    if not sms or not set(sms) <= set(SMS):
        raise KernelError(f"SMs {sms}", expected=f"some of {', '.join(map(str, SMS))}", fix="correct --sm")
    if len({kernel.name for kernel in kernels}) < len(kernels):
        raise KernelError("two kernels of one name", expected="the kernels of one model in one dtype, each once")
    assemblers = find_assemblers()
    # Where no code is wanted of a ptxas, it assembles for one SM all the same: it must accept the PTX.
    targets = [(a, sm) for a in assemblers.values() for sm in ([sm for sm in a.sms if sm in sms] or a.sms[:1])]
    jobs = [(kernel, *target) for kernel in kernels for target in targets]
    total = len(kernels) + len(jobs)
    report = progress or (lambda done, total, what: None)

    cores = _cores()
    with tempfile.TemporaryDirectory(prefix="kernels-") as name, ThreadPoolExecutor(cores) as pool:
        folder = Path(name)
        shares = [kernels[start::cores] for start in range(min(cores, len(kernels)))]
        texts: dict[Kernel, dict[str, Any]] = {}
        for made in pool.map(_run_triton, shares, [folder / f"{index}.json" for index in range(len(shares))]):
            for kernel, text in made.items():
                (folder / f"{kernel.name}.ptx").write_text(text["ptx"])
                texts[kernel] = text
                report(len(texts), total, f"{kernel.name}: PTX")

        def run(job: tuple) -> Code:
            kernel, assembler, sm = job
            return assemble(assembler, folder / f"{kernel.name}.ptx", sm, texts[kernel]["shared"])

        codes: dict[Kernel, dict[int, Code]] = {kernel: {} for kernel in kernels}
        for done, ((kernel, _, sm), code) in enumerate(zip(jobs, pool.map(run, jobs), strict=True), len(kernels) + 1):
            if sm in sms:
                codes[kernel][sm] = code
            report(done, total, f"{kernel.name}: SM {sm}")

    compiled = tuple(
        Compiled(
            kernel=kernel,
            entry=texts[kernel]["entry"],
            shared=texts[kernel]["shared"],
            threads=32 * kernel.warps,
            ptx=texts[kernel]["ptx"].encode(),
            cubins={sm: code.cubin for sm, code in codes[kernel].items()},
            registers={sm: code.registers for sm, code in codes[kernel].items()},
        )
        for kernel in kernels
    )
    versions = {"triton": importlib.metadata.version("triton")}
    return Artifacts(compiled, versions | {f"ptxas {cuda}": a.version for cuda, a in assemblers.items()})


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_triton(kernels: Sequence[Kernel], result: Path) -> dict[Kernel, dict[str, Any]]:
    """What plugins.compiler.ptx.to_ptx returns for each kernel, from a fresh process that writes it to `result`."""
    # No TRITON_INTERPRET, and nothing else that would make another machine's code differ; a cache that goes away again;
    # no line numbers, whose file names do.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"TRITON_CACHE_DIR": str(result.with_suffix(".cache")), "TRITON_DISABLE_LINE_INFO": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    run = subprocess.run(
        [sys.executable, "-m", "plugins.compiler.ptx", str(result)],
        input=json.dumps([asdict(kernel) for kernel in kernels]),
        env=environment,
        capture_output=True,
        text=True,
    )
    names = ", ".join(kernel.name for kernel in kernels)
    if run.returncode:
        raise KernelError(
            f"Triton ended with status {run.returncode} while compiling {names}: {run.stderr.strip()[-1000:]}",
            expected="PTX",
            fix="free some memory, if it was killed (status -9)",
        )
    made = dict(zip(kernels, json.loads(result.read_text()), strict=True))
    for kernel, text in made.items():
        if "error" in text:
            raise KernelError(f"kernel {kernel.name} ({kernel.function}) does not compile: {text['error'][:2000]}")
    return made


def sizes_of_bundle(folder: Path) -> tuple[dict[str, int], str]:
    """Attributes of a bundle's ops, and the dtype it computes in, from its bundle.json; KernelError if unreadable."""
    path = folder / "bundle.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        g, inputs = manifest["geometry"], manifest["parts"]["decoder"]["graphs"]["traced"]["inputs"]
        pages = next(tensor for tensor in inputs if tensor["name"].startswith("page_key."))
        # page_key: [batch, kv_heads, cells * cells, page_size, head_dim]
        derived = {"grid": g["lowres"] // g["vision"]["patch"], "page_size": pages["shape"][3]}
        derived["int8_pages"] = int(pages["dtype"] == "int8")
        sizes = {name: derived[name] if name in derived else g[name] for name in OFFICIAL_7B}
        return sizes, DTYPE_OF_PRECISION[manifest["precision"]]
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, StopIteration) as error:
        raise KernelError(
            f"{path} cannot be read: {error!r}",
            expected="the manifest of a bundle with FlexAttention's decoder",
            fix="name a bundle that export/build.py wrote",
        ) from error


def table(artifacts: Artifacts) -> str:
    """Registers per thread of every kernel and SM, and its shared memory. Spills need no column: they are refused."""
    rows = [["kernel", "threads", "shared", *(f"sm_{sm}" for sm in artifacts.sms)]]
    for c in artifacts.compiled:
        rows.append([c.kernel.name, str(c.threads), str(c.shared), *(str(c.registers[sm]) for sm in artifacts.sms)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(["registers per thread, shared memory in bytes; no spills", *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m plugins.compile", description="Compile the kernels of the plugins.")
    parser.add_argument("--bundle", type=Path, help="compile for this bundle's sizes and precision")
    for name, value in OFFICIAL_7B.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"without --bundle; default {value}")
    parser.add_argument(
        "--dtype", choices=TRITON_TYPES.keys() - {"int8", "int64"}, help="without --bundle; default float16"
    )
    parser.add_argument("--sm", default=",".join(map(str, SMS)), help="compute capabilities, such as 87 for Orin")
    parser.add_argument("--out", type=Path, default=Path("kernels.zip"))
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name) for name in (*OFFICIAL_7B, "dtype") if getattr(options, name) is not None}
    if options.bundle and given:
        parser.error(f"--{next(iter(given)).replace('_', '-')} contradicts --bundle, which tells it")
    try:
        sms = [int(sm) for sm in options.sm.split(",")]
    except ValueError:
        parser.error(f"--sm {options.sm}: expected numbers with commas between, such as 86,87")

    def progress(done: int, total: int, what: str) -> None:
        print(f"\r[{done}/{total}] {what:<40}", end="", file=sys.stderr, flush=True)

    try:
        dtype = given.pop("dtype", "float16")
        sizes = OFFICIAL_7B | given
        if options.bundle:
            sizes, dtype = sizes_of_bundle(options.bundle)
        artifacts = compile_kernels(kernels_of_model(sizes, dtype), sms, progress if sys.stderr.isatty() else None)
        artifacts.write(options.out)
    except KernelError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    print(table(artifacts))
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB, {dtype}, SHA-256 {artifacts.sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
