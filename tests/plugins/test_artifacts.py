"""The file of compiled kernels: round trip, what a plan takes from it, and everything that can be wrong with it."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from engines.cuda import Cuda
from plugins.artifacts import REBUILD_KERNELS, Artifacts, Compiled
from plugins.compile import OFFICIAL_7B
from plugins.errors import KernelError
from plugins.op import Kernel
from plugins.registry import kernels_of_model
from plugins.tiles import tiled
from tests.emulator.driver import Driver, emulated
from tests.plugins.checks import (
    check_attention,
    check_int8_attention,
    check_int8_projection,
    check_projection,
    check_selection,
)
from tests.plugins.harness import Launcher
from tests.plugins.inputs import Sizes

KERNELS = kernels_of_model(OFFICIAL_7B, "float16")
SELECT, ATTEND = KERNELS[0], KERNELS[3]


# Files of formats 1 and 3, as older versions wrote them, with words in place of code.
OLD = Path(__file__).parent / "data"
OLD_SIZES = {
    "hidden": 48, "heads": 4, "kv_heads": 4, "head_dim": 16, "grid": 9, "cells": 3, "page_size": 4, "threshold": 48,
}  # fmt: skip


def made_up(kernel, sms=(86, 120)) -> Compiled:
    code = {sm: f"{kernel.name} for {sm}".encode() * 9 for sm in sms}
    return Compiled(kernel, kernel.name, 512, 128, b"// " + kernel.name.encode(), code, dict.fromkeys(sms, 96))


@pytest.fixture
def artifacts():
    return Artifacts(tuple(map(made_up, KERNELS)), {"triton": "3.9.0"})


def test_round_trip(artifacts, tmp_path):
    artifacts.write(tmp_path / "kernels.zip")
    data = (tmp_path / "kernels.zip").read_bytes()
    read = Artifacts.read(tmp_path / "kernels.zip")
    assert read == artifacts and read.sms == (86, 120)
    assert read.to_bytes() == data and read.sha256 == hashlib.sha256(data).hexdigest()
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.zip"]


def test_a_plan_takes_what_it_needs(artifacts):
    part = artifacts.subset([SELECT, ATTEND, SELECT], [120])
    assert [c.kernel for c in part.compiled] == [SELECT, ATTEND] and part.sms == (120,)
    assert part.get(ATTEND) == replace(made_up(ATTEND), cubins={120: made_up(ATTEND).cubins[120]}, registers={120: 96})
    assert len(part.to_bytes()) < len(artifacts.to_bytes()) and Artifacts.from_bytes(part.to_bytes()) == part


def test_variants(artifacts):
    """Each SM has the variant that holds its cubin, every other GPU the first; a plan takes what its SMs run."""
    any_gpu = ATTEND
    wide = replace(ATTEND, constants=tuple((dict(ATTEND.constants) | {"BLOCK": 128}).items()), warps=8)
    own = replace(wide, arch=90)
    three = tuple(made_up(kernel, sms) for kernel, sms in ((any_gpu, (86,)), (wide, (80, 87)), (own, (90,))))
    other = made_up(SELECT, (80, 86, 87, 90))
    both = Artifacts((*three, other), {})
    assert both.sms == (80, 86, 87, 90) and Artifacts.from_bytes(both.to_bytes()) == both
    for sm, kernel in {80: wide, 86: any_gpu, 87: wide, 90: own, 120: any_gpu, None: any_gpu}.items():
        assert both.on([ATTEND, SELECT], sm) == (kernel, SELECT)
        assert both.get(kernel, sm).kernel == kernel
    with pytest.raises(KernelError, match="BLOCK=128\n  expected: BLOCK=64"):
        both.get(any_gpu, 87)
    part = both.subset([SELECT, ATTEND], [87])
    assert [(c.kernel, c.cubins.keys(), c.registers.keys()) for c in part.compiled] == [
        (SELECT, {87}, {87}), (any_gpu, set(), set()), (wide, {87}, {87}),
    ]  # fmt: skip
    assert Artifacts.from_bytes(part.to_bytes()) == part and part.sms == (87,)
    with pytest.raises(KernelError, match="two kernels of one name"):
        Artifacts((three[0], replace(three[1], cubins=three[0].cubins)), {})
    with pytest.raises(KernelError, match="no PTX for every GPU"):
        Artifacts(three[2:], {})


def test_a_gpu_loads_its_own_code_or_the_ptx(artifacts):
    compiled = artifacts.get(ATTEND)
    assert compiled.code(86) == compiled.cubins[86]
    assert compiled.code(87) == compiled.ptx
    with pytest.raises(KernelError, match=r"SM 75(.|\n)*SM 80 or newer(.|\n)*fix: "):
        compiled.code(75)


def test_missing_sm(artifacts):
    with pytest.raises(KernelError) as caught:
        artifacts.subset([SELECT], [87])
    assert caught.value.found == "no compiled kernels for SM 87" and caught.value.expected == "SMs among 86, 120"
    assert caught.value.fix.startswith(REBUILD_KERNELS)


def test_missing_kernel(artifacts):
    with pytest.raises(KernelError, match="no compiled kernel attend\n  expected: one of: select_pages\n"):
        artifacts.subset([SELECT], [86]).get(ATTEND)


@pytest.mark.parametrize(
    ("change", "found", "expected"),
    [
        ({"constants": tuple((dict(ATTEND.constants) | {"SPLIT": 256}).items())}, "SPLIT=64", "SPLIT=256"),
        ({"constants": ATTEND.constants[1:]}, "HEADS=32", "no HEADS"),
        ({"parameters": (("query", "*bf16"), *ATTEND.parameters[1:])}, r"query=\*fp16", r"query=\*bf16"),
        ({"parameters": ATTEND.parameters[1:]}, r"query=\*fp16", "no query"),
        ({"absent": ()}, "past_key_scale, past_value_scale absent", "nothing absent"),
        ({"warps": 8}, "warps 2", "warps 8"),
        ({"function": "elsewhere:attend"}, "function plugins.cached_attention", "function elsewhere:attend"),
    ],
)
def test_another_variant_is_refused(artifacts, change, found, expected):
    with pytest.raises(KernelError, match=f"attend was compiled with {found}(.|\n)*expected: {expected}(.|\n)*fix: "):
        artifacts.get(replace(ATTEND, **change))


def test_the_order_of_parameters_is_no_variant(artifacts):
    """Arguments are passed by name, in the order of whatever code there is."""
    assert artifacts.get(replace(ATTEND, parameters=ATTEND.parameters[::-1])).kernel == ATTEND


def test_truncated_anywhere(artifacts):
    data = artifacts.to_bytes()
    for length in {*range(0, len(data), 97), 1, 21, 22, len(data) - 1}:
        with pytest.raises(KernelError, match=f"{length} bytes that are no whole file"):
            Artifacts.from_bytes(data[:length])


def test_a_changed_byte_is_noticed_or_changes_nothing(artifacts):
    data, noticed = artifacts.to_bytes(), 0
    for at in range(0, len(data), 31):
        try:
            assert Artifacts.from_bytes(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :]) == artifacts
        except KernelError:
            noticed += 1
    assert noticed > len(data) / 31 / 2


def zipped(files: dict[str, str], method=zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"\x7fELF and so on",
        zipped({"readme.txt": "another zip"}),
        zipped({"index.json": "no JSON"}),
        zipped({"index.json": "[]"}),
        zipped({"index.json": '{"format": 2, "kernels": [{"kernel": {}}], "versions": {}}'}),
        zipped({"index.json": '{"format": 1, "kernels": [{"kernel": {}}], "versions": {}}'}),
        zipped({"index.json": '{"format": 1, "kernels": 5, "versions": {}}'}),
        zipped({"index.json": " " * 999}, zipfile.ZIP_DEFLATED),
    ],
)
def test_foreign_files(data, tmp_path):
    path = tmp_path / "kernels.zip"
    path.write_bytes(data)
    with pytest.raises(KernelError, match=f"{path}: {len(data)} bytes that are no whole file(.|\n)*fix: copy it again"):
        Artifacts.read(path)


def test_format_2_knows_no_tiles():
    """There every kernel has one variant. Which of its constants are its tile, the op that asks knows."""
    with zipfile.ZipFile(OLD / "format-3-float.zip") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    index = json.loads(files["index.json"]) | {"format": 2}
    index["kernels"] = [record for record in index["kernels"] if "86" in record["cubins"]]
    for record in index["kernels"]:
        del record["kernel"]["tile"], record["kernel"]["arch"]
        record["cubins"] = {"86": record["cubins"]["86"]}
        if record["kernel"]["name"] == "attend":
            record["kernel"]["constants"] = [*(dict(record["kernel"]["constants"]) | {"SPLIT": 128}).items()]
    old = Artifacts.from_bytes(zipped(files | {"index.json": json.dumps(index)}))
    kernels = kernels_of_model(OLD_SIZES, "float16")
    attend = next(kernel for kernel in kernels if kernel.name == "attend")
    (kernel,) = old.on([attend], 86)
    assert kernel == replace(attend, constants=kernel.constants, tile=()) and kernel.constant("SPLIT") == 128
    assert old.subset(kernels, [86]).sms == (86,)
    with pytest.raises(KernelError, match="HEADS=4\n  expected: HEADS=8"):
        old.on([replace(attend, constants=tuple((dict(attend.constants) | {"HEADS": 8}).items()))], 86)


@pytest.mark.parametrize("number", [0, 6, 3.0, True, "3"])
def test_a_format_that_is_none(number):
    data = zipped({"index.json": json.dumps({"format": number})})
    with pytest.raises(KernelError, match=f"format {number!r}\n  expected: format 1 to 5"):
        Artifacts.from_bytes(data)


def test_a_file_that_cannot_be_read_or_written(artifacts, tmp_path):
    with pytest.raises(KernelError, match=r"nothing\.zip is missing"):
        Artifacts.read(tmp_path / "nothing.zip")
    with pytest.raises(KernelError, match=r"cannot write .*: No such file(.|\n)*--out"):
        artifacts.write(tmp_path / "no folder" / "kernels.zip")
    (tmp_path / "folder").mkdir()
    with pytest.raises(KernelError, match=r"cannot write .*folder: Is a directory"):
        artifacts.write(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_kernels_that_do_not_belong_together():
    with pytest.raises(KernelError, match="two kernels of one name"):
        Artifacts((made_up(SELECT), made_up(SELECT)), {})
    with pytest.raises(KernelError, match="different SMs"):
        Artifacts((made_up(SELECT), made_up(ATTEND, (86,))), {})


@pytest.mark.parametrize(("int8", "file"), [(0, "format-1-float.zip"), (1, "format-1-int8.zip")])
def test_format_1_holds_the_kernels_of_today(int8, file):
    """There the kernels of int8 pages were functions, and symbols, of their own; and their tiles were others."""
    old = Artifacts.read(OLD / file)
    kernels = kernels_of_model(OLD_SIZES | {"int8_pages": int8}, "float16")
    taken = old.subset(kernels, [86])
    assert tuple(c.kernel for c in taken.compiled) == old.on(kernels, 86)
    for kernel, wanted in zip(old.on(kernels, 86), kernels, strict=True):
        fixed = [
            dict(each.constants).items() - {(n, v) for n, v in each.constants if n in wanted.tile}
            for each in (kernel, wanted)
        ]
        assert fixed[0] == fixed[1] and kernel.name == wanted.name
        if kernel.name in ("attend", "attend_pages", "combine"):
            assert (kernel.constant("SPLIT"), wanted.constant("SPLIT"), kernel.warps) == (128, 64, 4)
            with pytest.raises(KernelError, match="was compiled with SPLIT=128"):
                old.get(wanted, 86)
    entries = {c.kernel.name: c.entry for c in taken.compiled}
    assert entries["attend_pages"] == ("attend_int8_pages" if int8 else "attend_pages")
    assert entries["project_pages"] == ("project_int8_pages" if int8 else "project_pages")
    assert Artifacts.from_bytes(taken.to_bytes()) == taken
    others = kernels_of_model(OLD_SIZES | {"int8_pages": 1 - int8}, "float16")
    for kernel in others[-2:]:
        with pytest.raises(
            KernelError, match=f"pages was compiled with INT8_PAGES={int8}\n  expected: INT8_PAGES={1 - int8}"
        ):
            old.on([kernel], 86)


@pytest.mark.parametrize(("int8", "file"), [(0, "format-3-float.zip"), (1, "format-3-int8.zip")])
def test_format_3_holds_the_kernels_of_today(int8, file):
    """All but those of an int8 cache, which it did not know, in whatever variant an SM has."""
    old = Artifacts.read(OLD / file)
    kernels = kernels_of_model(OLD_SIZES | {"int8_pages": int8}, "float16")
    assert old.sms == (86, 90)
    for sm in old.sms:
        for found, wanted in zip(old.on(kernels, sm), (tiled(kernel, sm) for kernel in kernels), strict=True):
            same = replace(wanted, constants=found.constants, absent=found.absent)
            assert found == same and dict(found.constants) == dict(wanted.constants)
            assert set(found.absent) == set(wanted.absent)
    taken = old.subset(kernels, [90])
    assert taken.sms == (90,) and Artifacts.from_bytes(taken.to_bytes()) == taken
    names = {kernel.name: kernel for kernel in kernels_of_model(OLD_SIZES | {"int8_cache": 1}, "float16")}
    assert names["prefill"] in kernels
    for name in ("append", "attend"):
        with pytest.raises(KernelError, match=f"{name} was compiled with INT8_CACHE=0\n  expected: INT8_CACHE=1"):
            old.on([names[name]], 90)
    with pytest.raises(KernelError, match="no compiled kernel dequantise"):
        old.on([names["dequantise"]], 90)
    with pytest.raises(KernelError, match=f"INT8_PAGES={int8}\n  expected: INT8_PAGES={1 - int8}"):
        old.on(kernels_of_model(OLD_SIZES | {"int8_pages": 1 - int8}, "float16")[-2:], 90)


OLD_INPUTS = Sizes(grid=9, capacity=120, past=(100,), steps=3)


def check_old_ops(launcher: Launcher, int8: int) -> None:
    """The ops that know pages, of the sizes and the kind of pages that old files are for."""
    case = {"counts": (4,), "done": (1,), "kv_heads": 4}
    if int8:
        check_int8_attention(OLD_INPUTS, "float16", launcher)
        check_int8_projection(case, "float16", launcher)
    else:
        check_attention(OLD_INPUTS, "float16", launcher, paged=True)
        check_projection(case, "float16", launcher)
    check_selection(9, 3, launcher)


@pytest.mark.parametrize("sm", [86, 90])
@pytest.mark.parametrize(("int8", "file"), [(0, "format-3-float.zip"), (1, "format-3-int8.zip")])
def test_format_3_launches(int8, file, sm):
    """As `test_format_1_launches`, on SMs that have variants of their own."""
    old = [emulated(c.kernel, c.entry, tuple(c.cubins)) for c in Artifacts.read(OLD / file).compiled]
    launcher = Launcher(Cuda(Driver(sm=sm)), lambda _: Artifacts(tuple(old), {}))
    check_old_ops(launcher, int8)


def as_it_was(kernel: Kernel, entry: str) -> Compiled:
    """A kernel of a file, with the function of its time for code."""
    made = emulated(kernel, entry)
    code = {
        sm: cubin.replace(b"plugins.project_pages.kernel", b"tests.plugins.old_kernels")
        for sm, cubin in made.cubins.items()
    }
    return replace(made, cubins=code)


@pytest.mark.parametrize(("int8", "file"), [(0, "format-1-float.zip"), (1, "format-1-int8.zip")])
def test_format_1_launches(int8, file):
    """Through the driver's wrapper, with what the emulated driver takes for code, whose parameters are in an order that
    no op has."""
    kernels = [(c.kernel, c.entry) for c in Artifacts.read(OLD / file).compiled]
    turned = [as_it_was(replace(kernel, parameters=kernel.parameters[::-1]), entry) for kernel, entry in kernels]
    driver = Driver()
    launcher = Launcher(Cuda(driver), lambda _: Artifacts(tuple(turned), {}))
    check_old_ops(launcher, int8)
    check_attention(OLD_INPUTS, "float16", launcher, paged=False)
    assert set(driver.launches) == {entry for _, entry in kernels}
