"""Kernels -> code for every board, without a GPU.

Triton writes one PTX text per kernel, old enough for the oldest CUDA served (plugins/compiler/ptx.py); ptxas makes
a cubin of it for each SM (plugins/compiler/ptxas.py). Boards need neither.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plugins import child
from plugins.artifacts import Artifacts, Compiled
from plugins.compiler.ptxas import SMS, Assembler, Code, assemble, find_assemblers
from plugins.cores import usable_cores
from plugins.errors import KernelError
from plugins.op import Kernel


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

    cores = usable_cores()
    with tempfile.TemporaryDirectory(prefix="kernels-") as name, ThreadPoolExecutor(cores) as pool:
        folder = Path(name)
        shares = [kernels[start::cores] for start in range(min(cores, len(kernels)))]
        texts: dict[Kernel, dict[str, Any]] = {}
        for made in pool.map(_run_triton, shares, [folder / f"{index}.json" for index in range(len(shares))]):
            for kernel, text in made.items():
                (folder / f"{kernel.name}.ptx").write_text(text["ptx"])
                texts[kernel] = text
                report(len(texts), total, f"{kernel.name}: PTX")

        def run(job: tuple[Kernel, Assembler, int]) -> Code:
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


def _run_triton(kernels: Sequence[Kernel], result: Path) -> dict[Kernel, dict[str, Any]]:
    """What plugins.compiler.ptx.to_ptx returns for each kernel, from a fresh process that writes it to `result`."""
    # No TRITON_INTERPRET, and nothing else that would make another machine's code differ; a cache that goes away again;
    # no line numbers, whose file names do.
    environment = {name: value for name, value in child.environment().items() if not name.startswith("TRITON_")}
    environment |= {"TRITON_CACHE_DIR": str(result.with_suffix(".cache")), "TRITON_DISABLE_LINE_INFO": "1"}
    run = subprocess.run(
        child.python("plugins.compiler.ptx", str(result)),
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
