"""Writing a bundle folder so that a half-written bundle never carries the final name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from engines.bundle.folder import MANIFEST, read_manifest, sha256
from engines.bundle.manifest import File, Manifest
from engines.errors import BundleError, ExportError


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write bundle.json, whole or not at all."""
    temporary = folder / f".{MANIFEST}-{os.getpid()}"
    temporary.write_text(json.dumps(asdict(manifest), indent=1) + "\n")
    temporary.replace(folder / MANIFEST)


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
        write_manifest(self.folder, manifest)


@contextmanager
def write_bundle(out: Path) -> Iterator[BundleWriter]:
    """A writer into a temporary folder beside `out`, renamed to `out` when the block succeeds, deleted when it fails.

    A bundle at `out` is replaced, and stays as it is when anything fails. Whatever else is there is never touched: an
    ExportError before the block begins. Errors of the file system in the block, a full disk say, are ExportErrors too.
    """
    out = out.resolve()  # a link to a bundle stays a link
    _require_replaceable(out)
    folder = unused_beside(out)
    try:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o755)
        except OSError as error:
            raise ExportError(f"cannot write to {out.parent}: {error.strerror}", fix="choose another --out") from error
        yield BundleWriter(folder)
        _put_in_place(folder, out)
    except OSError as error:
        free = shutil.disk_usage(out.parent).free
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise ExportError(
            f"writing {out} failed: {error.strerror or error} ({free / 1e9:.1f} GB free)",
            fix="free disk space or choose another --out" if full else "choose another --out",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def unused_beside(path: Path) -> Path:
    """A hidden name beside `path` that nothing has. Known before there is a folder of that name: an interruption right
    after it was made finds what to delete."""
    return path.with_name(f".{path.name}-{secrets.token_hex(4)}")


def _require_replaceable(out: Path) -> None:
    """ExportError unless `out` is nothing, an empty folder, or a bundle and nothing but a bundle."""

    def refuse(what: str, fix: str = "choose another --out") -> None:
        raise ExportError(f"{out} {what}", expected="nothing there, an empty folder, or a bundle to replace", fix=fix)

    if not out.exists():
        return
    if not out.is_dir():
        refuse("is a file")
    if out.is_mount() or out == Path.cwd() or out in Path.cwd().parents:
        refuse("is the current folder or a mount point, which cannot be replaced", "choose a folder inside it")
    entries = {path.name for path in out.iterdir()}
    if not entries:
        return
    try:
        listed = set(read_manifest(out).files) | {MANIFEST}
    except BundleError as error:
        refuse(f"is not empty and no bundle of this version: {error.found}", "choose another --out, or remove it")
    if entries - listed:
        refuse(f"holds more than a bundle: {sorted(entries - listed)[0]}", "choose another --out, or move that away")


def _put_in_place(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`; an old bundle there is set aside first and comes back if that fails."""
    if not out.exists():
        folder.rename(out)
        return
    aside = folder.with_name(f"{folder.name}-old")
    out.rename(aside)
    try:
        folder.rename(out)
    except OSError:
        aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)
