"""Opening a bundle folder: its manifest checked against itself, its files against the manifest."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import TypeAdapter, ValidationError

from engines.bundle.consistency import contradiction
from engines.bundle.manifest import DIGEST, FORMAT, MANIFEST, File, Manifest, canonical, digest_of
from engines.bundle.precision import PRECISIONS, Precision
from engines.bundle.rebuild import rebuild, rebuild_unknown
from engines.checks import is_integer
from engines.errors import BundleError, OptionError
from plugins.files import open_file, read_json

_CHUNK = 4 << 20
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Bundle:
    """An opened bundle: `manifest` (checked) and `path`. digest: "sha256:...", one for all of it, since the manifest
    holds those of the files. checked: what the system said of each file when it was checked."""

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True, expect: str | None = None) -> None:
        """Read and check `path`/bundle.json, then that every file it lists is there, readable and of its size, and
        with `verify` its SHA-256. `expect`: the digest it must have; without `verify`, that speaks of the manifest
        alone.

        Raises BundleError; OptionError for an `expect` that is no digest. `verify=False` skips the hashes alone (13 GB
        take about 10 s).
        """
        if expect is not None and not (isinstance(expect, str) and _DIGEST.fullmatch(expect)):
            raise OptionError(f"expect {expect!r:.100}", expected='"sha256:" and 64 hexadecimal digits')
        self.path = Path(path)
        self.manifest, self.digest = read_manifest(self.path)
        if expect is not None and self.digest != expect:
            raise BundleError(
                f"{self.path} has the digest {self.digest}",
                expected=expect,
                fix="get the bundle again from where that digest comes from; if it was rebuilt or got other engines on "
                f"purpose, expect the digest that this prints: python -m engines.doctor {self.path}",
            )
        self.checked = {name: self._check(name, file, verify) for name, file in self.manifest.files.items()}

    @property
    def precision(self) -> Precision:
        """What the manifest's name of a precision means."""
        return PRECISIONS[self.manifest.precision]

    def file(self, name: str) -> Path:
        """Path of a file the manifest lists."""
        return self.path / name

    def graph(self, part: str, kind: str) -> Path:
        """The .onnx file of a part ("vision", "pages", "decoder") of a kind; BundleError if there is none."""
        graphs = self.manifest.parts[part].graphs
        if kind not in graphs:
            raise BundleError(
                f"{self.path} holds no {kind} graph of {part}",
                expected=f"one of {sorted(graphs)}",
                fix=rebuild(self.manifest, self.path),
            )
        return self.file(graphs[kind].file)

    def _check(self, name: str, file: File, verify: bool) -> os.stat_result:
        path, fix = self.file(name), f"copy the bundle again, or rebuild it: {rebuild(self.manifest, self.path)}"
        with open_file(path, BundleError, fix=fix) as opened:
            found = os.fstat(opened.fileno())  # before it is read: what is written meanwhile shows later
            if found.st_size != file.bytes:
                raise BundleError(f"{path} has {found.st_size} bytes", expected=f"{file.bytes} bytes", fix=fix)
            try:
                digest = _sha256(opened) if verify else file.sha256
            except OSError as error:  # its disk fails
                raise BundleError(f"{path} cannot be read: {error.strerror}", fix=fix) from error
        if digest != file.sha256:
            raise BundleError(f"{path} was changed: SHA-256 {digest}", expected=file.sha256, fix=fix)
        return found


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks. Raises OSError."""
    with open(path, "rb") as file:
        return _sha256(file)


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """What `folder`/bundle.json says, checked against itself, and its digest. Raises BundleError.

    Bundles of before there were digests hold none, and open: theirs is computed the same way.
    """
    path, fix = folder / MANIFEST, f"rebuild it, with the options it had: {rebuild_unknown(folder)}"
    found = _content(folder, path, fix)
    number = found.get("format") if isinstance(found, dict) else None
    if not is_integer(number):
        raise BundleError(
            f"{path} is no manifest: format {number!r:.50}", expected="JSON with a whole number `format`", fix=fix
        )
    if number != FORMAT:
        upgrade = "upgrade this project, or rebuild the bundle with this version"
        raise BundleError(
            f"{path} has format {number!r:.50}", expected=f"format {FORMAT}", fix=upgrade if number > FORMAT else fix
        )
    try:
        text, digest, told = json.dumps(found), digest_of(canonical(found)), found.get(DIGEST)
    except RecursionError:
        raise BundleError(f"{path} is no manifest: nested too deep", expected="one as written", fix=fix) from None
    if DIGEST in found and told != digest:
        raise BundleError(
            f"{path} was changed: its content has the digest {digest}",
            expected=f"{told!r:.100}, which it holds",
            fix=f"copy the bundle again, or {fix}",
        )
    unknown = sorted(found.keys() - Manifest.__dataclass_fields__.keys() - {DIGEST})
    if told is None and unknown:  # with a digest, a newer version wrote it, and older ones can do without
        raise BundleError(f"{path}: unknown key {unknown[0]!r:.100}", expected="a manifest as written", fix=fix)
    try:  # as JSON: only there does the strict mode take a list for a tuple
        manifest = TypeAdapter(Manifest).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BundleError(
            f"{path}: {where:.200}: {first['msg']:.200}", expected="a manifest as written", fix=fix
        ) from error
    if problem := contradiction(manifest):
        raise BundleError(f"{path}: {problem}", expected="a manifest as written", fix=fix)
    return manifest, digest


def _content(folder: Path, path: Path, fix: str) -> Any:
    """What bundle.json holds, as JSON. BundleErrors tell a folder that is not there from one without a manifest."""
    try:
        is_folder = stat.S_ISDIR(folder.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_folder = False
    except (OSError, ValueError) as error:  # no permission, a name too long, a zero character in it
        why = error.strerror if isinstance(error, OSError) else error
        raise BundleError(f"{folder!s:.200} cannot be read: {why}", expected="a bundle folder") from None
    if not is_folder or not _exists(path):
        what = f"no {MANIFEST} in {folder}" if is_folder else f"no bundle folder {folder}"
        raise BundleError(what, expected="a folder written by export/build.py", fix=rebuild_unknown(folder))
    return read_json(path, BundleError, fix=fix)


def _exists(path: Path) -> bool:
    """Whether something has this name, or may have: in a folder that cannot be searched, opening it will tell."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except OSError:
        pass
    return True


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
