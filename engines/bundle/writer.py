"""Writing a bundle folder so that a half-written bundle never carries the final name."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from engines.bundle.folder import read_manifest, sha256
from engines.bundle.kinds import BACKENDS, PARTS
from engines.bundle.manifest import DIGEST, MANIFEST, File, Manifest, canonical, digest_of
from engines.bundle.work import OLD, sweep, work_folder, write_whole
from engines.errors import BundleError, ExportError

# What a build that was killed in its last moment leaves in a bundle, unlisted: engines, and a manifest in the making.
_LEFT_OVER = re.compile(
    rf"({'|'.join(PARTS)})(-\d+-\d+)?\.({'|'.join(BACKENDS)})-[0-9a-f]{{8}}\.plan|\.{re.escape(MANIFEST)}-\w+"
)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write bundle.json, whole or not at all, with the digest of its content."""
    content = json.loads(json.dumps(asdict(manifest)))  # as who reads it will have it
    text = json.dumps({**content, DIGEST: digest_of(canonical(content))}, indent=1) + "\n"
    write_whole(folder / MANIFEST, text.encode())


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
    ExportError before the block begins. What a build to `out` that was killed has left beside it is deleted. Errors of
    the file system in the block, a full disk say, are ExportErrors too.
    """
    out = out.resolve()  # a link to a bundle stays a link
    try:
        sweep(out)  # may bring an old bundle back
        _require_replaceable(out)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExportError(f"cannot write to {out.parent}: {error.strerror}", fix="choose another --out") from error
        with work_folder(out) as folder:
            new = folder / "new"
            new.mkdir(mode=0o755)
            yield BundleWriter(new)
            _put_in_place(new, out, folder / OLD)
    except OSError as error:
        raise ExportError(
            f"writing {out} failed: {error.strerror or error} ({_free(out.parent)} free)",
            fix="free disk space or choose another --out"
            if error.errno in (errno.ENOSPC, errno.EDQUOT)
            else "choose another --out",
        ) from error


def _free(folder: Path) -> str:
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB"


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
    entries = {path.name for path in out.iterdir() if not _LEFT_OVER.fullmatch(path.name)}
    if not entries:
        return
    try:
        listed = set(read_manifest(out)[0].files) | {MANIFEST}
    except BundleError as error:
        refuse(f"is not empty and no bundle of this version: {error.found}", "choose another --out, or remove it")
    if entries - listed:
        refuse(f"holds more than a bundle: {sorted(entries - listed)[0]}", "choose another --out, or move that away")


def _put_in_place(new: Path, out: Path, aside: Path) -> None:
    """Rename `new` to `out`; an old bundle there is set aside first, and comes back if that fails (work_folder)."""
    if out.exists():
        out.rename(aside)
    new.rename(out)
