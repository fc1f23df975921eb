"""Compiled kernels, as a bundle and a plan carry them to a board. Needs nothing but Python.

plugins/compiler/kernels.py makes them. The file is a zip: `index.json`, for each variant of a kernel its PTX, and for
each kernel one cubin per SM. Entries are stored as they are, in a fixed order with fixed times: equal kernels are equal
bytes on every machine.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from plugins.errors import Error, KernelError
from plugins.files import read_file
from plugins.op import CACHE_SCALES, FIRST_SM, OF_PAGE_SLOTS, PAGE_SCALES, Kernel

FORMAT = 5  # raised when an older reader would misread the file; what the others lack: `_upgraded`
_INDEX = "index.json"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can hold
REBUILD_KERNELS = "build the bundle again, with the options it was built with: they are in its bundle.json"
MOST_BYTES = 1 << 30  # of a file: it is read whole. A 7B model's kernels, for every board, have 3 MB
PAGE_KERNELS = "attend_pages", "project_pages"  # those that read or write pages, and those of the cache
CACHE_KERNELS = "append", "attend", "attend_pages"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Compiled:
    """One variant of a kernel, compiled: its tile and its architecture hold for some SMs, and for others not.

    entry: its symbol in the code. shared: bytes of dynamic shared memory. threads: of one program. ptx: assembles for
    every SM from FIRST_SM on, that of a kernel's other architectures only there. cubins, registers: code and registers
    per thread by SM (86 is 8.6), none where a variant is there for its PTX alone. The order of the kernel's parameters
    is that of the code, which may be older than the op that asks for it.
    """

    kernel: Kernel
    entry: str
    shared: int
    threads: int
    ptx: bytes
    cubins: dict[int, bytes]
    registers: dict[int, int]

    def code(self, sm: int) -> bytes:
        """What a GPU of this SM loads: its cubin, else the PTX, which the driver assembles when it loads it.

        KernelError for an SM older than FIRST_SM.
        """
        if sm < FIRST_SM:
            raise KernelError(
                f"kernel {self.kernel.name} on SM {sm}",
                expected=f"SM {FIRST_SM} or newer",
                fix="use a GPU of the Ampere generation or newer, or the onnxruntime backend",
            )
        return self.cubins.get(sm, self.ptx)


@dataclass(frozen=True)
class Artifacts:
    """The compiled kernels of one model in one dtype. `versions`: of the compilers that made them.

    Of the variants of a kernel the first is the one whose PTX every GPU takes.
    """

    compiled: tuple[Compiled, ...]
    versions: dict[str, str]

    def __post_init__(self) -> None:
        sms: dict[str, list[int]] = {}
        for name, variants in self._by_name.items():
            sms[name] = sorted(sm for c in variants for sm in c.cubins)
            codes = [c.kernel for c in variants]
            if len(set(sms[name])) < len(sms[name]) or len(set(codes)) < len(codes):
                raise KernelError(f"two kernels of one name, {name}", expected="kernels of one model in one dtype")
            if variants[0].kernel.arch != FIRST_SM:
                raise KernelError(f"kernel {name} has no PTX for every GPU", expected="it as the first variant")
        if len(set(map(tuple, sms.values()))) > 1:
            raise KernelError("kernels for different SMs in one file", expected="the same SMs for each")

    @cached_property
    def _by_name(self) -> dict[str, list[Compiled]]:
        """The variants of each kernel, in their order."""
        found: dict[str, list[Compiled]] = {}
        for c in self.compiled:
            found.setdefault(c.kernel.name, []).append(c)
        return found

    @property
    def sms(self) -> tuple[int, ...]:
        """The SMs there is a cubin for."""
        first = next(iter(self._by_name.values()), [])
        return tuple(sorted(sm for c in first for sm in c.cubins))

    def get(self, kernel: Kernel, sm: int | None = None) -> Compiled:
        """The compiled form of this very kernel that a GPU of this SM runs (None: one without a cubin of its own);
        KernelError if it is missing or another one. Only the order of its parameters may differ."""
        return self._checked(kernel, sm, tile=True)

    def on(self, kernels: Iterable[Kernel], sm: int | None) -> tuple[Kernel, ...]:
        """The kernels as the code for this SM has them: what an op's `launches` must be given. Their tiles, parameters'
        order and architecture may differ from those asked for; KernelError if one is missing or differs in more."""
        return tuple(self._checked(kernel, sm, tile=False).kernel for kernel in kernels)

    def _checked(self, kernel: Kernel, sm: int | None, *, tile: bool) -> Compiled:
        """`get`; without `tile` that of any tile."""
        variants = self._by_name.get(kernel.name)
        if variants is None:
            names = ", ".join(self._by_name) or "none"
            raise KernelError(f"no compiled kernel {kernel.name}", expected=f"one of: {names}", fix=REBUILD_KERNELS)
        found = next((c for c in variants if sm in c.cubins), variants[0])
        difference = _difference(found.kernel, kernel, tile=tile)
        if difference:
            is_, wanted = difference
            raise KernelError(
                f"kernel {kernel.name} was compiled with {is_}",
                expected=f"{wanted}, as this model needs",
                fix=REBUILD_KERNELS,
            )
        return found

    def subset(self, kernels: Iterable[Kernel], sms: Iterable[int]) -> Artifacts:
        """What one plan needs: these kernels, whatever their tiles, their cubins for these SMs alone, and the PTX that
        every GPU takes. Errors: see `on`."""
        sms = sorted(set(sms))
        missing = [sm for sm in sms if sm not in self.sms]
        if missing:
            have = ", ".join(map(str, self.sms)) or "none"
            raise KernelError(
                f"no compiled kernels for SM {', '.join(map(str, missing))}",
                expected=f"SMs among {have}",
                fix=f"{REBUILD_KERNELS}; and for these SMs, where this project has code for them",
            )
        chosen: list[Compiled] = []
        for kernel in dict.fromkeys(kernels):
            for sm in (None, *sms):
                self._checked(kernel, sm, tile=False)
            for index, c in enumerate(self._by_name[kernel.name]):
                kept = [sm for sm in sms if sm in c.cubins]
                if kept or index == 0:
                    registers = {sm: c.registers[sm] for sm in kept}
                    chosen.append(replace(c, cubins={sm: c.cubins[sm] for sm in kept}, registers=registers))
        return Artifacts(tuple(chosen), self.versions)

    @cached_property
    def sha256(self) -> str:
        """Hex SHA-256 of `to_bytes`, which is that of the file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The file."""
        records, files = [], {}
        for c in self.compiled:
            name = c.kernel.name
            number = self._by_name[name].index(c)
            record = {key: getattr(c, key) for key in ("entry", "shared", "threads")}
            ptx = f"{name}.{number}.ptx" if number else f"{name}.ptx"
            record |= {"kernel": asdict(c.kernel), "ptx": ptx, "cubins": {}, "registers": {}}
            files[record["ptx"]] = c.ptx
            for sm in sorted(c.cubins):
                record["cubins"][str(sm)] = file = f"{name}.sm_{sm}.cubin"
                record["registers"][str(sm)] = c.registers[sm]
                files[file] = c.cubins[sm]
            records.append(record)
        index = {"format": FORMAT, "versions": self.versions, "kernels": records}
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for file, content in {_INDEX: json.dumps(index, indent=1, sort_keys=True).encode(), **files}.items():
                info = zipfile.ZipInfo(file, _EPOCH)
                info.create_system, info.external_attr = 3, 0o644 << 16  # as written on Unix, wherever this runs
                archive.writestr(info, content)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "the compiled kernels") -> Artifacts:
        """The content of a file; KernelError, which calls it `name`, unless it is whole and of this format."""
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                files = {info.filename: _stored(archive, info) for info in archive.infolist()}
            index = json.loads(files[_INDEX])
            number = index["format"]
            if type(number) is int and 1 <= number <= FORMAT:
                records = [record | {"kernel": _upgraded(record["kernel"], number)} for record in index["kernels"]]
                return cls(tuple(_compiled(record, files) for record in records), dict(index["versions"]))
        except (
            zipfile.BadZipFile, struct.error, LookupError, ValueError, TypeError, AttributeError, EOFError,
            OverflowError, RuntimeError, KernelError,
        ) as error:  # fmt: skip
            raise KernelError(
                f"{name}: {len(data)} bytes that are no whole file of compiled kernels ({error})",
                expected="a file as plugins.compile writes it",
                fix=f"copy it again, or {REBUILD_KERNELS}",
            ) from error
        raise KernelError(f"{name} has format {number!r}", expected=f"format 1 to {FORMAT}", fix=REBUILD_KERNELS)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Artifacts:
        """Read a file; KernelError if it cannot be read, is no ordinary file, or see `from_bytes`."""
        data = read_file(path, KernelError, limit=MOST_BYTES, fix=REBUILD_KERNELS)
        return cls.from_bytes(data, str(path))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file: whole, or not at all. KernelError if it cannot be written."""
        path = Path(path)
        temporary = None
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
                temporary = Path(file.name)
                file.write(self.to_bytes())
            temporary.chmod(0o644)  # a temporary file is its owner's alone
            temporary.replace(path)
        except OSError as error:
            raise KernelError(f"cannot write {path}: {error.strerror}", fix="choose another --out") from error
        finally:
            if temporary:
                temporary.unlink(missing_ok=True)


def with_command(error: Error, command: str, where: str | None = None) -> Error:
    """The same error, for who knows the bundle: with the command that builds it again where its fix says no more than
    that it should be. `where` it arose: see FlexError.within."""
    fix = error.fix and error.fix.replace(REBUILD_KERNELS, f"build it again: {command}")
    if where:
        return error.within(where, fix=fix)
    return type(error)(error.found, expected=error.expected, fix=fix)


def kernel_of(record: Mapping[str, Any]) -> Kernel:
    """The Kernel that `dataclasses.asdict` and JSON turned into this record."""
    parameters, constants = (
        tuple((str(name), value) for name, value in record[key]) for key in ("parameters", "constants")
    )
    absent, tile = (tuple(map(str, record.get(key, ()))) for key in ("absent", "tile"))
    name, function, warps, stages = (record[key] for key in ("name", "function", "warps", "stages"))
    return Kernel(name, function, parameters, constants, warps, stages, absent, tile, record.get("arch", FIRST_SM))


def _upgraded(record: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    """The record of a kernel in a file of format `number`, as today's has it; its code is the same.

    Up to format 3 no kernel knows an int8 cache, and of int8 pages a constant of another name says whether they are.
    In format 1 the kernels of int8 pages are functions of their own, without that constant, and two parameters of
    `select_pages` have other names than the op's tensors. Format 2 has one variant of each kernel and no tiles. Up to
    format 4 no kernel knows page slots.
    """
    name, upgraded = record["name"], {"absent": [], **record}
    if number == 1:
        name = name.replace("_int8_pages", "_pages")
        upgraded |= {"name": name, "function": record["function"].replace("_int8_pages", "_pages")}
        if name in PAGE_KERNELS:
            int8 = name != record["name"]
            upgraded["constants"] = [*record["constants"], ["INT8", int(int8)]]
            upgraded["absent"] = [] if int8 else [*PAGE_SCALES]
        if name == "select_pages":
            names = {"budget": "page_budget", "count": "page_count"}
            upgraded["parameters"] = [[names.get(each, each), kind] for each, kind in record["parameters"]]
    if number <= 3:
        constants = [["INT8_PAGES" if each == "INT8" else each, value] for each, value in upgraded["constants"]]
        if name in CACHE_KERNELS:
            constants.append(["INT8_CACHE", 0])
            upgraded["absent"] = [*upgraded["absent"], *CACHE_SCALES]
        upgraded["constants"] = constants
    if number <= 4 and name == "project_pages":
        upgraded["constants"] = [*upgraded["constants"], ["PAGE_SLOTS", 0]]
        upgraded["absent"] = [*upgraded["absent"], *OF_PAGE_SLOTS]
    return upgraded


def _compiled(record: Mapping[str, Any], files: Mapping[str, bytes]) -> Compiled:
    kernel = kernel_of(record["kernel"])
    if not _NAME.fullmatch(kernel.name):
        raise ValueError(f"kernel name {kernel.name!r}")
    return Compiled(
        kernel=kernel,
        entry=record["entry"],
        shared=record["shared"],
        threads=record["threads"],
        ptx=files[record["ptx"]],
        cubins={int(sm): files[file] for sm, file in record["cubins"].items()},
        registers={int(sm): number for sm, number in record["registers"].items()},
    )


def _stored(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """An entry's content, which is in the file as it is: nothing can unfold to more than the file holds."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    return archive.read(info)


def _difference(found: Kernel, wanted: Kernel, *, tile: bool) -> tuple[str, str] | None:
    """The first thing two variants of a kernel differ in, as each has it; None if only in the order of parameters, or
    without `tile` also in how they cut the work and for which architecture. Older code may lack a constant of that, or
    have one that is gone: its op's launches_of must know."""
    free = set() if tile else {*found.tile, *wanted.tile}
    for key in ("constants", "parameters"):
        is_, should = dict(getattr(found, key)), dict(getattr(wanted, key))
        for name in dict.fromkeys([*should, *is_]):
            if is_.get(name) != should.get(name) and name not in free:
                has, needs = (f"{name}={pairs[name]}" if name in pairs else f"no {name}" for pairs in (is_, should))
                return has, needs
    for key in ("function", *(("warps", "stages", "arch") if tile else ())):
        if getattr(found, key) != getattr(wanted, key):
            return f"{key} {getattr(found, key)}", f"{key} {getattr(wanted, key)}"
    absent = [", ".join(sorted(kernel.absent)) or "nothing" for kernel in (found, wanted)]
    return None if absent[0] == absent[1] else (f"{absent[0]} absent", f"{absent[1]} absent")
