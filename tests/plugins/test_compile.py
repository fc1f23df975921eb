"""Code of every kernel for every board: what NVIDIA's tools say about it, and what is refused.

`cuobjdump`, which comes with Triton, tells what is in a cubin without help from plugins/compiler/ptxas.py.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from plugins.artifacts import Artifacts
from plugins.compile import OFFICIAL_7B, main, table
from plugins.compiler import ptxas
from plugins.compiler.kernels import compile_kernels
from plugins.compiler.ptx import without_scratch
from plugins.compiler.ptxas import SMS, assemble, find_assemblers, read_log
from plugins.errors import KernelError
from plugins.op import FIRST_SM, MODEL_DTYPES, Kernel
from plugins.registry import kernels_of_model, ops_of_model
from plugins.tiles import LEAST_SHARED, SHARED_LIMIT, TILES, Tile, dtype_of, tiled
from tests.conftest import once
from tests.geometries import official
from tests.shapes import input_shapes, sizes

DTYPES = ("float16", "bfloat16")
KERNELS_OF = {dtype: kernels_of_model(OFFICIAL_7B, dtype) for dtype in DTYPES}
KERNELS = KERNELS_OF["float16"]
NAMES = [kernel.name for kernel in KERNELS]
VARIANTS = {
    "head-64": {"head_dim": 64},
    "head-96": {"head_dim": 96},  # padded to 128
    "grouped": {"kv_heads": 8},
    "default-model": {"heads": 4, "kv_heads": 4, "head_dim": 32, "grid": 12, "page_size": 16, "threshold": 64},
    "small-heads": {"heads": 4, "kv_heads": 4, "head_dim": 16, "grid": 6, "cells": 3, "page_size": 4},
    "int8-pages": {"int8_pages": 1},
    "int8-cache": {"int8_cache": 1},
    "int8-both": {"int8_pages": 1, "int8_cache": 1},
    "page-slots": {"page_slots": 1},
    "int8-page-slots": {"int8_pages": 1, "page_slots": 1},
}


CHANGED = {
    "int8-pages": {"attend_pages", "project_pages"},
    "int8-cache": {"append", "dequantise", "attend", "attend_pages"},
    "int8-both": {"append", "dequantise", "attend", "attend_pages", "project_pages"},
    "page-slots": {"project_pages"},
    "int8-page-slots": {"attend_pages", "project_pages"},
}  # kernels that the official model has otherwise, or not at all


@pytest.fixture(scope="session")
def artifacts(shared):
    """artifacts(dtype) -> Artifacts at 7B sizes for all SMs, compiled once for all workers."""

    def get(dtype: str) -> Artifacts:
        kernels = kernels_of_model(OFFICIAL_7B, dtype)
        return Artifacts.read(once(shared / f"kernels-{dtype}", lambda path: compile_kernels(kernels).write(path)))

    return get


def cuobjdump(option: str, cubin: bytes, folder: Path) -> str:
    """What the tool prints about a cubin."""
    tool = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin/cuobjdump"
    (folder / "code.cubin").write_bytes(cubin)
    return subprocess.run([tool, option, folder / "code.cubin"], capture_output=True, text=True, check=True).stdout


def elf_sm(cubin: bytes) -> int:
    """The SM in the header of a cubin: of e_flags, the lowest byte up to CUDA 12, the second from CUDA 13 on."""
    assert cubin[:4] == b"\x7fELF"
    machine, flags = struct.unpack_from("<H", cubin, 18)[0], struct.unpack_from("<I", cubin, 48)[0]
    assert machine == 190  # EM_CUDA
    return flags & 0xFF if cubin[8] == 7 else flags >> 8 & 0xFF


def passed(kernel: Kernel) -> list[int]:
    """Bytes of each argument that a launcher passes."""
    return [4 if kind == "i32" else 8 for _, kind in kernel.parameters]


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_code_of_every_kernel_for_every_board(artifacts, dtype, name, sm, tmp_path):
    compiled = next(c for c in artifacts(dtype).compiled if c.kernel.name == name and sm in c.cubins)
    cubin = compiled.cubins[sm]
    assert elf_sm(cubin) == sm
    pattern = rf"Function {compiled.entry}:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    usage = re.search(pattern, cuobjdump("-res-usage", cubin, tmp_path))
    registers, stack, static, local = map(int, usage.groups())
    assert (stack, local) == (0, 0)  # where registers spill to
    assert 0 < registers <= 255 and registers == compiled.registers[sm]
    assert registers * compiled.threads <= 65536  # of an SM
    assert static <= 1024 and static + compiled.shared <= SHARED_LIMIT[sm]  # newer SMs keep 1024 bytes for themselves
    info = re.findall(r"Ordinal : 0x(\w+)\s+Offset  : 0x\w+\s+Size    : 0x(\w+)", cuobjdump("-elf", cubin, tmp_path))
    sizes = [size for _, size in sorted((int(ordinal, 16), int(size, 16)) for ordinal, size in info)]
    assert sizes == passed(compiled.kernel)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ptx_that_every_board_takes(artifacts, dtype, name):
    compiled = next(c for c in artifacts(dtype).compiled if c.kernel.name == name)
    assert compiled.kernel.arch == FIRST_SM and compiled.shared + 1024 <= LEAST_SHARED
    text = compiled.ptx.decode()
    assert re.search(r"^\.version 8\.0$", text, re.MULTILINE) and re.search(r"^\.target sm_80$", text, re.MULTILINE)
    entry = re.findall(r"^\.visible \.entry (\w+)\(([^)]*)\)\s*\.reqntid (\d+)$", text, re.MULTILINE)
    ((symbol, listed, threads),) = entry
    assert (symbol, int(threads)) == (compiled.entry, compiled.threads)
    kinds = re.findall(r"\.param \.(\w+)", listed)
    assert kinds == ["u32" if size == 4 else "u64" for size in passed(compiled.kernel)]
    assert ".loc" not in text and ".file" not in text  # nothing of the machine it was made on


@pytest.mark.parametrize("name", ["attend", "attend_pages", "prefill", "append", "project_pages"])
def test_threads_load_16_bytes_at_once(artifacts, name):
    text = next(c for c in artifacts("float16").compiled if c.kernel.name == name).ptx.decode()
    assert re.search(
        r"ld\.global\.(L1::evict\w+\.)?v4\.b32|cp\.async\.\w+\.shared\.global \[[^]]+\], \[[^]]+\], 0x10", text
    )


PRODUCTS = "prefill", "project_pages"  # the kernels that tensor cores are for


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensor_cores_do_the_products(artifacts, dtype, name):
    text = next(c for c in artifacts(dtype).compiled if c.kernel.name == name).ptx.decode()
    kind = {"float16": "f16", "bfloat16": "bf16"}[dtype]
    assert f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32" in text


@pytest.mark.parametrize(("sm", "instruction"), [(90, "wgmma.mma_async"), (100, "tcgen05.mma"), (110, "tcgen05.mma")])
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_code_of_an_architecture_of_its_own(artifacts, dtype, name, sm, instruction):
    """Where Triton has matrix instructions that only one architecture knows, its text names that one."""
    compiled = artifacts(dtype).get(tiled(next(k for k in KERNELS_OF[dtype] if k.name == name), sm), sm)
    text = compiled.ptx.decode()
    assert list(compiled.cubins) == [sm] and compiled.kernel.arch == sm
    assert re.search(rf"^\.target sm_{sm}a$", text, re.MULTILINE) and instruction in text
    assert "mma.sync" not in text


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_sizes(dtype, variant, caplog):
    """compile_kernels refuses spills and too much shared memory, and has both versions of ptxas read every PTX, which
    call none of it slow."""
    kernels, official = (kernels_of_model(OFFICIAL_7B | VARIANTS.get(name, {}), dtype) for name in (variant, None))
    made = compile_kernels([kernel for kernel in kernels if kernel not in official], (87, 90, 110))
    assert {c.kernel.name for c in made.compiled} >= CHANGED.get(
        variant, {"append", "prefill", "attend", "attend_pages"}
    )
    assert made.sms == (87, 90, 110) and not caplog.records


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_wgmma_runs_side_by_side(artifacts, dtype, name, tmp_path):
    compiled = artifacts(dtype).get(tiled(next(k for k in KERNELS_OF[dtype] if k.name == name), 90), 90)
    (tmp_path / f"{name}.0.ptx").write_bytes(compiled.ptx)
    assembler = next(each for each in find_assemblers().values() if 90 in each.sms)
    code = assemble(assembler, tmp_path / f"{name}.0.ptx", 90, 90, compiled.shared, SHARED_LIMIT[90])
    assert code.cubin == compiled.cubins[90] and not code.slow


def test_slow_code_is_told(monkeypatch, caplog):
    """What ptxas 12.6 says of projection to int8 pages in Hopper's own instructions, which no row therefore chooses."""
    rows = (replace(row, most=()) if row.kernel == "project_pages" and row.native else row for row in TILES)
    monkeypatch.setattr("plugins.tiles.TILES", tuple(rows))
    kernels = kernels_of_model(OFFICIAL_7B | {"int8_pages": 1}, "float16")
    (kernel,) = (kernel for kernel in kernels if kernel.name == "project_pages")
    made = compile_kernels([kernel], (90,))
    assert made.compiled[1].kernel.arch == 90 and made.compiled[1].cubins[90]
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "kernel project_pages for SM 90 is right but slow" in record.message
    assert "(C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized" in record.message


def test_float32():
    """The tiles of its attention fit the registers where the ptxas of CUDA 13 gives them out."""
    kernels = (kernels_of_model(OFFICIAL_7B | change, "float32") for change in ({}, VARIANTS["int8-pages"]))
    attention = {kernel for each in kernels for kernel in each if kernel.name in ("attend", "attend_pages")}
    for kernel in attention:
        assert compile_kernels([kernel], (100, 110, 120)).sms == (100, 110, 120)


def test_float32_compiles_for_boards_too():
    """It ships nowhere, but the kernels' reference precision must not be one that only the interpreter runs."""
    kernels = {kernel.name: kernel for kernel in kernels_of_model(OFFICIAL_7B, "float32")}
    made = compile_kernels([kernels["prefill"], kernels["attend_pages"]], (87, 120))
    assert b"mma." not in made.get(kernels["prefill"]).ptx  # no tf32, which would round inputs to 10 bits


@pytest.mark.parametrize("steps", [1, 640])
@pytest.mark.parametrize("sm", [None, *SMS])
def test_launches_pass_what_the_code_takes(artifacts, sm, steps):
    """On each SM, and on one nobody has heard of: arguments, and a grid for the tile that the code has."""
    made = artifacts("float16")
    for op in ops_of_model(OFFICIAL_7B):
        given = input_shapes(official(), batch=2, steps=steps)[op.name]
        addresses = {tensor.name: 256 * at for at, tensor in enumerate((*op.inputs, *op.outputs))}
        assert len(addresses) == len(op.inputs) + len(op.outputs)  # no input has the name of an output
        launches = op.launches("float16", given, addresses, 1 << 20, made.on(op.kernels("float16"), sm))
        assert list(given) == [tensor.name for tensor in op.inputs] and launches
        for launch in launches:
            code = made.get(launch.kernel, sm)
            assert launch.kernel == code.kernel and sm in (*code.cubins, None)
            assert len(launch.ordered(code.kernel)) == len(passed(code.kernel)), launch.kernel.name
            assert launch.grid[0] < 2**31 and max(launch.grid[1:]) <= 65535
            if launch.kernel.name == "prefill":
                assert launch.grid[0] == -(-(steps - 1) // code.kernel.constant("ROWS"))


@pytest.mark.parametrize("row", TILES, ids=lambda row: f"{row.kernel}-{TILES.index(row)}")
def test_every_row_of_the_table_is_some_kernels(row):
    """Each is reached, by the official model or a variant of it, and says where it comes from."""
    sizes_of = (OFFICIAL_7B | change for change in ({}, *VARIANTS.values()))
    kernels = [kernel for each in sizes_of for dtype in MODEL_DTYPES for kernel in kernels_of_model(each, dtype)]
    used = [
        kernel for kernel in kernels if next((r for r in TILES if r.holds(kernel, (row.sms or (None,))[0])), 0) is row
    ]
    assert used and row.source and dtype_of(used[0]) in row.dtypes
    assert set(row.sms) <= set(SMS) and (row.sms or not row.native)
    made = tiled(used[0], row.sms[0] if row.sms else None)
    assert dict(made.constants).items() >= dict(row.constants).items()
    assert (made.warps, made.stages, made.arch) == (row.warps, row.stages, row.sms[0] if row.native else FIRST_SM)


def test_a_row_changes_nothing_but_the_tile(monkeypatch):
    kernel = KERNELS[0]
    row = Tile(kernel.name, (("THRESHOLD", 1),), 4, 2, "a test")
    monkeypatch.setattr("plugins.tiles.TILES", (row,))
    with pytest.raises(ValueError, match=r"select_pages: \['THRESHOLD'\] of its row are not among its tile"):
        tiled(kernel)
    monkeypatch.setattr("plugins.tiles.TILES", ())
    assert tiled(kernel) == kernel


def test_equal_on_every_machine(artifacts, monkeypatch, tmp_path):
    """The environment of whoever compiles, an interpreting test run included, changes nothing."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    monkeypatch.chdir(tmp_path)
    some = KERNELS[:2]
    assert compile_kernels(some, (87,)).sha256 == artifacts("float16").subset(some, (87,)).sha256


def test_progress():
    told = []
    compile_kernels(KERNELS[:1], (87, 110), lambda *step: told.append(step))
    assert told == [(1, 3, "select_pages: PTX"), (2, 3, "select_pages: SM 87"), (3, 3, "select_pages: SM 110")]


BAD = """
import triton
import triton.language as tl

@triton.jit
def spills(x, N: tl.constexpr):
    at = tl.arange(0, N)
    value = tl.load(x + at)
    for _ in range(0, 9):
        value += tl.load(x + at)
        tl.store(x + at, value)
        value *= tl.load(x + N + at)
    tl.store(x + at, value)

@triton.jit
def greedy(x, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    total = tl.zeros([N, N], tl.float32)
    for step in range(0, 99):
        total = tl.dot(tl.load(x + step * N * N + at), tl.load(x + (step + 99) * N * N + at), total)
    tl.store(x + at, total.to(tl.float16))

@triton.jit
def wrong(x, N: tl.constexpr):
    tl.store(x, undefined_name)
"""


@pytest.fixture
def bad(tmp_path, monkeypatch):
    """bad(name, N, **changes) -> a kernel that cannot be used."""
    (tmp_path / "bad_kernels.py").write_text(BAD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # what the compiler's own process looks into, beside this project

    def get(name: str, n: int, **changes: object) -> Kernel:
        kernel = Kernel(name, f"bad_kernels:{name}", (("x", "*fp16"),), (("N", n),), warps=1)
        return replace(kernel, **changes)

    return get


@pytest.mark.parametrize(
    ("function", "n", "changes", "message"),
    [
        ("spills", 16384, {}, r"spills for SM 87 spills \d+ bytes(.|\n)*no spills(.|\n)*fix: "),
        (
            "greedy",
            64,
            {"warps": 4, "stages": 8},
            r"greedy for SM 87 needs \d+ bytes of shared memory(.|\n)*at most 101376",
        ),
        ("wrong", 16, {}, r"kernel wrong \(bad_kernels:wrong\) does not compile: (.|\n)*undefined_name"),
        ("absent", 16, {}, r"kernel absent(.|\n)*has no attribute 'absent'"),
        ("wrong", 16, {"function": "no_such_module:wrong"}, "kernel wrong(.|\n)*No module named 'no_such_module'"),
        ("wrong", 16, {"parameters": (("y", "*fp16"),)}, r"takes \['x', 'N'\], the plugin declares \['y', 'N'\]"),
        ("wrong", 16, {"constants": ()}, r"takes \['x', 'N'\], the plugin declares \['x'\]"),
    ],
)
def test_kernels_no_board_can_use(bad, function, n, changes, message):
    with pytest.raises(KernelError, match=message):
        compile_kernels([bad(function, n, **changes)], (87,))


def test_scratch_that_is_used():
    kernel = Kernel("k", "m:k", (("x", "*fp16"), ("n", "i32")), ())
    parameters = (".u64 .ptr .global .align 1 k_param_0", ".u32 k_param_1", ".u64 k_param_2", ".u64 k_param_3")
    listed = ",\n".join(f"\t.param {parameter}" for parameter in parameters)
    ptx = f".visible .entry k(\n{listed}\n)\n{{{{\n\tld.param.b64 %rd1, [{{}}];\n}}}}\n"
    kept = without_scratch(ptx.format("k_param_0"), kernel)
    assert re.findall(r"k_param_\d", kept) == ["k_param_0", "k_param_1", "k_param_0"]
    with pytest.raises(ValueError, match="global scratch memory"):
        without_scratch(ptx.format("k_param_3"), kernel)
    with pytest.raises(ValueError, match="PTX parameters"):
        without_scratch(ptx.format("k_param_0"), replace(kernel, parameters=kernel.parameters[:1]))


@pytest.mark.parametrize("sms", [(), (75,), (86, 75)])
def test_sms_nobody_serves(sms):
    with pytest.raises(KernelError, match=r"some of 80, 86(.|\n)*--sm"):
        compile_kernels(KERNELS[:1], sms)


def test_two_kernels_of_one_name():
    with pytest.raises(KernelError, match="one name"):
        compile_kernels([KERNELS[0], replace(KERNELS[0], warps=8)], (87,))


INSTALL = r"python -m pip install 'triton>=3\.7\.1,<3\.10' 'nvidia-cuda-nvcc-cu12==12\.6\.\*'"


def test_without_cuda_12(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(KernelError, match=rf"no ptxas of CUDA 12\.6(.|\n)*{INSTALL}"):
        compile_kernels(KERNELS[:1], (87,))


def test_without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KernelError, match=f"Triton is not installed(.|\n)*{INSTALL}"):
        compile_kernels(KERNELS[:1], (87,))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo release 12.9, V12.9.86", r"is of version 12\.9\.86\n  expected: ptxas of CUDA 12\.6"),
        ("echo release 12.60, V12.60.1", r"is of version 12\.60\.1"),
        ("echo nothing known", "is of version unknown"),
        ("exit 3", "does not run"),
        (None, "does not run"),
    ],
)
def test_another_ptxas(monkeypatch, tmp_path, script, message):
    program = tmp_path / "ptxas"
    if script:
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    package = importlib.metadata.distribution(ptxas.NVCC)
    monkeypatch.setattr(type(package), "locate_file", lambda self, file: program)
    with pytest.raises(KernelError, match=f"{message}(.|\n)*fix: {INSTALL}"):
        ptxas.find_assemblers()


def test_a_report_that_cannot_be_read():
    log = "0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\nUsed 32 registers, 64 bytes smem"
    assert read_log(log) == (32, 12, 64)
    with pytest.raises(KernelError, match="cannot read what ptxas reports"):
        read_log("all went well")


def test_the_default_sizes_are_the_official_ones():
    assert sizes(official()) == OFFICIAL_7B


def test_command(tmp_path, capsys):
    out = tmp_path / "kernels.zip"
    given = {"hidden": 48, "heads": 4, "kv_heads": 2, "head_dim": 16, "grid": 6, "cells": 3, "page_size": 4}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    assert main([*options, "--int8-pages=1", "--dtype=float32", "--sm=87,110", "--out", str(out)]) == 0
    made = Artifacts.read(out)
    assert made.sms == (87, 110)
    assert [c.kernel for c in made.compiled] == kernels_of_model(OFFICIAL_7B | given | {"int8_pages": 1}, "float32")
    printed = capsys.readouterr().out
    assert table(made) in printed and made.sha256 in printed
    assert len(table(made).splitlines()) == 3 + len(made.compiled)


def test_the_table_shows_every_variant(artifacts):
    """Its tile, and on each SM the registers of the one variant that runs there."""
    made = artifacts("float16")
    heading, rows = table(made).splitlines()[2], [line for line in table(made).splitlines() if " prefill " in line]
    assert heading.split() == ["kernel", "tile", "stages", "threads", "shared", *(f"sm_{sm}" for sm in SMS)]
    variants = [c for c in made.compiled if c.kernel.name == "prefill"]
    assert len(rows) == len(variants) > 1
    for row, c in zip(rows, variants, strict=True):
        tile = [f"{name}={c.kernel.constant(name)}" for name in ("ROWS", "BLOCK")]
        own = "" if c.kernel.arch == FIRST_SM else "*"
        registers = [f"{c.registers[sm]}{own}" for sm in SMS if sm in c.registers]
        assert row.split() == ["prefill", *tile, str(c.kernel.stages), str(c.threads), str(c.shared), *registers]


def test_command_with_bad_input(tmp_path, capsys):
    assert main(["--sm", "75", "--out", str(tmp_path / "kernels.zip")]) == 1
    assert "correct --sm" in capsys.readouterr().err
    for wrong in (["--sm", "ampere"], ["--heads", "many"], ["--dtype", "int8"]):
        with pytest.raises(SystemExit):
            main(wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cores", [1, 4])
def test_the_number_of_cores_changes_nothing(monkeypatch, artifacts, cores):
    monkeypatch.setattr("plugins.compiler.kernels.usable_cores", lambda: cores)
    wanted = [kernel for kernel in KERNELS if kernel.name in ("append", "select_pages", "combine")]
    assert compile_kernels(wanted, (87,)).to_bytes() == artifacts("float16").subset(wanted, (87,)).to_bytes()
