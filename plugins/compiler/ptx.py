"""Triton function -> PTX, in a process of its own: `python -m plugins.compiler.ptx RESULT < KERNELS`.

Triton's interpreter (TRITON_INTERPRET=1), which tests use, and its compiler exclude each other within a process.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from plugins.artifacts import kernel_of
from plugins.op import FIRST_SM, Kernel

# 8.0 is of CUDA 12.0: what Triton writes by itself is too new for JetPack 6. Newer architectures have newer text.
PTX_VERSION_OF_ARCH = {FIRST_SM: 80, 90: 80, 100: 86, 110: 90}
POINTER_ALIGNMENT = 16  # bytes, of every pointer: lets a thread load 16 bytes at once
SCRATCH = 2  # Triton ends every parameter list with the addresses of two scratch buffers
_PARAMETERS = re.compile(r"(?<=\.entry )(?P<entry>\w+)\((?P<list>[^)]*)\)")
_PARAMETER = re.compile(r"\.param (?P<type>\.\w+)[^,]*\s(?P<name>\w+)\s*")


def main() -> None:
    """KERNELS: a JSON list of kernels. RESULT: a file for the JSON list of what `to_ptx` returns for each."""
    kernels = [kernel_of(record) for record in json.load(sys.stdin)]
    Path(sys.argv[1]).write_text(json.dumps([_checked(kernel) for kernel in kernels]))


def _checked(kernel: Kernel) -> dict[str, Any]:
    """`to_ptx`, or {"error": why not}: whatever is wrong with a kernel, its author must learn which and what."""
    try:
        return to_ptx(kernel)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def to_ptx(kernel: Kernel) -> dict[str, Any]:
    """{"ptx": text, "entry": symbol, "shared": bytes of dynamic shared memory}.

    ValueError when the function and the kernel declare different parameters, or the code uses Triton's scratch
    buffers; what Triton raises when the function does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = kernel.function.split(":")
    function = getattr(importlib.import_module(module), name)
    constants = dict(kernel.constants) | dict.fromkeys(kernel.absent)
    types = dict(kernel.parameters) | dict.fromkeys(constants, "constexpr")
    runtime = [name for name in function.arg_names if types.get(name) != "constexpr"]
    if set(function.arg_names) != set(types) or runtime != [name for name, _ in kernel.parameters]:
        raise ValueError(f"{kernel.function} takes {function.arg_names}, the plugin declares {list(types)}")
    signature = {name: types[name] for name in function.arg_names}
    aligned = {
        (index,): [["tt.divisibility", POINTER_ALIGNMENT]]
        for index, name in enumerate(function.arg_names)
        if types[name].startswith("*")
    }
    compiled = triton.compile(
        ASTSource(function, signature, constants, aligned),
        target=GPUTarget("cuda", kernel.arch, 32),
        options={
            "ptx_version": PTX_VERSION_OF_ARCH[kernel.arch],
            "num_warps": kernel.warps,
            "num_stages": kernel.stages,
            "enable_fp_fusion": True,  # a * b + c rounded once; Triton 3.10 changes its default
        },
    )
    return {
        "ptx": without_scratch(compiled.asm["ptx"], kernel),
        "entry": compiled.metadata.name,
        "shared": compiled.metadata.shared,
    }


def parameters(ptx: str) -> list[tuple[str, str]]:
    """(name, PTX type) of each parameter of the one entry of a PTX text. ValueError for one of another form."""
    (entry,) = _PARAMETERS.finditer(ptx)
    found = []
    for text in map(str.strip, entry["list"].split(",")):
        match = _PARAMETER.fullmatch(text)
        if match is None:
            raise ValueError(f"no parameter of a kernel: {text}")
        found.append((match["name"], match["type"]))
    return found


def without_scratch(ptx: str, kernel: Kernel) -> str:
    """The text without the two scratch parameters, which must be unused: ValueError otherwise.

    They are removed rather than passed as null: a launcher that passes what the kernel declares, and no more, is then
    right, where otherwise the driver would read beyond the end of its arguments.
    """
    names = [name for name, _ in parameters(ptx)]
    expected = [".u32" if type_ == "i32" else ".u64" for _, type_ in kernel.parameters]
    found = [type_ for _, type_ in parameters(ptx)]
    if found != [*expected, *[".u64"] * SCRATCH]:
        raise ValueError(f"PTX parameters {found}, expected {expected} and {SCRATCH} scratch addresses")
    (entry,) = _PARAMETERS.finditer(ptx)
    kept = ",\n".join(f"\t{line.strip()}" for line in entry["list"].split(",")[:-SCRATCH])
    text = f"{ptx[: entry.start('list')]}\n{kept}\n{ptx[entry.end('list') :]}"
    used = [name for name in names[-SCRATCH:] if re.search(rf"\b{name}\b", text)]
    if used:
        raise ValueError(f"needs global scratch memory (PTX parameter {used[0]}), which no launcher provides")
    return text


if __name__ == "__main__":
    main()
