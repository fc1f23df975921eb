"""Opening a bundle folder, and writing one so that a half-written bundle never carries the final name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from engines.errors import BundleError, ExportError
from engines.manifest import FORMAT, File, Manifest

MANIFEST = "bundle.json"
REBUILD = "python export/build.py --model CHECKPOINT --out {path}"
_CHUNK = 4 << 20


class Bundle:
    """An opened bundle: `manifest` (checked) and `path`."""

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        """Read and check `path`/bundle.json, then the size of every file it lists and, with `verify`, its SHA-256.

        Raises BundleError. `verify=False` skips the hashes alone (13 GB take about 10 s).
        """
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        for name, file in self.manifest.files.items():
            self._check(name, file, verify)

    def file(self, name: str) -> Path:
        """Path of a file the manifest lists."""
        return self.path / name

    def graph(self, part: str, kind: str) -> Path:
        """The .onnx file of a part ("vision", "pages", "decoder") for "traced" or a backend; BundleError if none."""
        graphs = self.manifest.parts[part].graphs
        if kind not in graphs:
            raise BundleError(
                f"{self.path} holds no {part} graph for {kind}",
                expected=f"one of {sorted(graphs)}",
                fix=f"{REBUILD.format(path=self.path)} --backend {kind}",
            )
        return self.file(graphs[kind])

    def _check(self, name: str, file: File, verify: bool) -> None:
        if Path(name).name != name:
            raise BundleError(f"{self.path} lists {name!r}", expected="names of files inside the bundle")
        path, fix = self.file(name), f"copy the bundle again, or rebuild it: {REBUILD.format(path=self.path)}"
        if not path.is_file():
            raise BundleError(f"{path} is missing", expected=f"a file of {file.bytes} bytes", fix=fix)
        size = path.stat().st_size
        if size != file.bytes:
            raise BundleError(f"{path} has {size} bytes", expected=f"{file.bytes} bytes", fix=fix)
        if verify and (digest := sha256(path)) != file.sha256:
            raise BundleError(f"{path} was changed: SHA-256 {digest}", expected=file.sha256, fix=fix)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        what = f"no {MANIFEST} in {folder}" if folder.is_dir() else f"no bundle folder {folder}"
        raise BundleError(what, expected="a folder written by export/build.py", fix=REBUILD.format(path=folder))
    rebuild = f"rebuild it: {REBUILD.format(path=folder)}"
    try:
        content = json.loads(path.read_text())
        found = content["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path} is no manifest: {error!r}", expected="JSON with a `format`", fix=rebuild) from error
    if found != FORMAT:
        newer = isinstance(found, int) and found > FORMAT
        fix = "upgrade this project, or rebuild the bundle with this version" if newer else rebuild
        raise BundleError(f"{path} has format {found!r}", expected=f"format {FORMAT}", fix=fix)
    try:
        return TypeAdapter(Manifest).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BundleError(f"{path}: {where}: {first['msg']}", expected="a manifest as written", fix=rebuild) from error


class BundleWriter:
    """Files written through this object are hashed on the way and listed in the manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, File] = {}

    def write(self, name: str, chunks: Iterator[bytes], progress: Callable[[int], None] | None = None) -> None:
        """Write a file from chunks; `progress` is told the bytes of each."""
        digest, size = hashlib.sha256(), 0
        with open(self.folder / name, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                if progress:
                    progress(len(chunk))
        self.files[name] = File(size, digest.hexdigest())

    def add(self, name: str) -> None:
        """List a file that something else wrote into the folder."""
        path = self.folder / name
        self.files[name] = File(path.stat().st_size, sha256(path))

    def finish(self, manifest: Manifest) -> None:
        """Write bundle.json, last."""
        (self.folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n")


@contextmanager
def write_bundle(out: Path) -> Iterator[BundleWriter]:
    """A writer into a temporary folder beside `out`, renamed to `out` when the block succeeds, deleted when it fails.

    An existing bundle at `out` is replaced; anything else there is an ExportError, and so is a full disk.
    """
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} exists and is no bundle", expected="a bundle or nothing", fix="choose another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise ExportError(f"cannot write to {out.parent}: {error.strerror}", fix="choose another --out") from error
    try:
        folder.chmod(0o755)  # mkdtemp's 0700 would lock other users out of the finished bundle
        yield BundleWriter(folder)
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
    except OSError as error:
        free = shutil.disk_usage(out.parent).free
        raise ExportError(
            f"writing {out} failed: {error.strerror or error} ({free / 1e9:.1f} GB free)",
            fix="free disk space or choose another --out",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
