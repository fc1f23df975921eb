"""Kernels -> code for every board, without a GPU.

Triton writes the PTX text of each variant of a kernel that plugins/tiles.py wants, old enough for the oldest CUDA it is
for (plugins/compiler/ptx.py); ptxas makes a cubin of it for each of its SMs (plugins/compiler/ptxas.py). Boards need
neither.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
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
from plugins.op import FIRST_SM, Kernel
from plugins.tiles import LEAST_SHARED, SHARED_LIMIT, tiled

_log = logging.getLogger(__name__)


def compile_kernels(
    kernels: Iterable[Kernel], sms: Sequence[int] = SMS, progress: Callable[[int, int, str], None] | None = None
) -> Artifacts:
    """Compile kernels (of one model and dtype) for the SMs; `progress` is told (steps done, steps, what was done).

    Takes seconds, and about 200 MB for each core. Raises KernelError: no compiler, an unknown SM, a kernel that does
    not compile, spills registers, or needs more shared memory than a board has. Code that ptxas calls slow is logged
    as a warning: it is right, and a model of odd sizes may have no better.
    """
    kernels, sms = list(kernels), sorted(set(sms))
    if not sms or not set(sms) <= set(SMS):
        raise KernelError(f"SMs {sms}", expected=f"some of {', '.join(map(str, SMS))}", fix="correct --sm")
    if len({kernel.name for kernel in kernels}) < len(kernels):
        raise KernelError("two kernels of one name", expected="the kernels of one model in one dtype, each once")
    assemblers = find_assemblers()
    variants = [variant for kernel in kernels for variant in variants_of(kernel, sms)]
    jobs = [
        (variant, assembler, sm)
        for variant, wanted in variants
        for assembler in assemblers.values()
        for sm in _targets(variant, assembler, wanted)
    ]
    for_any_gpu = set(map(tiled, kernels))
    total = len(variants) + len(jobs)
    report = progress or (lambda done, total, what: None)

    cores = usable_cores()
    with tempfile.TemporaryDirectory(prefix="kernels-") as name, ThreadPoolExecutor(cores) as pool:
        folder = Path(name)
        shares = [[variant for variant, _ in variants[start::cores]] for start in range(min(cores, len(variants)))]
        texts: dict[Kernel, dict[str, Any]] = {}
        files: dict[Kernel, Path] = {}
        for made in pool.map(_run_triton, shares, [folder / f"{index}.json" for index in range(len(shares))]):
            for variant, text in made.items():
                files[variant] = folder / f"{variant.name}.{len(files)}.ptx"
                files[variant].write_text(text["ptx"])
                texts[variant] = text
                report(len(texts), total, f"{variant.name}: PTX")

        def run(job: tuple[Kernel, Assembler, int]) -> Code:
            variant, assembler, sm = job
            limit = LEAST_SHARED if variant in for_any_gpu else SHARED_LIMIT[sm]
            return assemble(assembler, files[variant], sm, variant.arch, texts[variant]["shared"], limit)

        codes: dict[Kernel, dict[int, Code]] = {variant: {} for variant, _ in variants}
        wanted_of = dict(variants)
        for done, ((variant, _, sm), code) in enumerate(zip(jobs, pool.map(run, jobs), strict=True), len(variants) + 1):
            if sm in wanted_of[variant]:
                codes[variant][sm] = code
                for slow in code.slow:
                    _log.warning("kernel %s for SM %d is right but slow, says ptxas: %s", variant.name, sm, slow)
            report(done, total, f"{variant.name}: SM {sm}")

    compiled = tuple(
        Compiled(
            kernel=variant,
            entry=texts[variant]["entry"],
            shared=texts[variant]["shared"],
            threads=32 * variant.warps,
            ptx=texts[variant]["ptx"].encode(),
            cubins={sm: code.cubin for sm, code in codes[variant].items()},
            registers={sm: code.registers for sm, code in codes[variant].items()},
        )
        for variant, _ in variants
    )
    versions = {"triton": importlib.metadata.version("triton")}
    return Artifacts(compiled, versions | {f"ptxas {cuda}": a.version for cuda, a in assemblers.items()})


def variants_of(kernel: Kernel, sms: Sequence[int]) -> list[tuple[Kernel, list[int]]]:
    """A kernel's variants for some SMs, each with its SMs: first, whether or not an SM has it, the one for any GPU."""
    found: dict[Kernel, list[int]] = {tiled(kernel): []}
    for sm in sms:
        found.setdefault(tiled(kernel, sm), []).append(sm)
    return list(found.items())


def _targets(variant: Kernel, assembler: Assembler, wanted: Sequence[int]) -> Sequence[int]:
    """The SMs to assemble a variant for. What every GPU must take goes through each ptxas, if only to see it taken."""
    here = [sm for sm in assembler.sms if sm in wanted]
    return here or (assembler.sms[:1] if variant.arch == FIRST_SM else ())


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
