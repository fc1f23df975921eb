"""Bundles on every machine: from a path, or once per machine from object storage."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import fsspec

from engines.bundle.folder import Bundle, read_manifest
from engines.bundle.manifest import MANIFEST
from engines.bundle.work import locked, work_folder
from engines.errors import BundleError, OptionError
from plugins.files import SETTINGS_LIMIT

_CHUNK = 4 << 20
_MADE = "bundle"  # in the work folder


def default_cache() -> Path:
    """Where bundles from object storage are kept, unless said otherwise."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "flexattention" / "bundles"


def is_remote(where: str) -> bool:
    """Whether a bundle's place is a URL."""
    return "://" in where


def local_bundle(where: str, digest: str | None, cache: Path | None) -> Path:
    """The folder of a bundle on this machine.

    where: a path, which is returned as it is; or a URL of a folder that fsspec can read, such as s3://bucket/name,
    which is downloaded to `cache`/DIGEST (None: see default_cache) unless it is there. One process of a machine
    downloads, the others wait for it; what is there is whole and was checked file by file. digest: of the bundle, as
    python -m engines.doctor prints it; a URL needs it. OptionError, BundleError.
    """
    if not is_remote(where):
        return Path(where)
    if digest is None:
        raise OptionError(
            f"bundle={where:.200} without a digest", expected="DIGEST=sha256:..., so that all machines have the same",
            fix="python -m engines.doctor BUNDLE prints it, where the bundle was built",
        )  # fmt: skip
    cache = default_cache() if cache is None else cache
    place = cache / digest.replace(":", "-")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f"{place.name}.lock"):
            if not place.is_dir():
                with work_folder(place) as work:
                    _download(where, digest, work / _MADE)
                    (work / _MADE).rename(place)
    except OSError as error:
        raise BundleError(
            f"{cache} cannot be written: {error.strerror}", expected="a folder with room for the bundle",
            fix="CACHE=FOLDER names another",
        ) from error  # fmt: skip
    return place


def _download(where: str, digest: str, folder: Path) -> None:
    """The bundle at a URL into a new folder: its manifest first, which must have the digest; then what that lists."""
    folder.mkdir()
    try:
        source, root = fsspec.core.url_to_fs(where)
    except (ImportError, ValueError) as error:  # no driver for this kind of URL
        raise _unreadable(where, error) from error
    _copy(source, f"{root}/{MANIFEST}", folder / MANIFEST, SETTINGS_LIMIT)
    manifest, found = read_manifest(folder)
    if found != digest:
        raise BundleError(f"{where} has the digest {found}", expected=digest, fix="DIGEST= of that one, or its place")
    needed = sum(file.bytes for file in manifest.files.values())
    if needed > (free := shutil.disk_usage(folder).free):
        raise BundleError(
            f"{folder.parent.parent} has {free / 1e9:.2f} GB of room", expected=f"{needed / 1e9:.2f} GB for {where}",
            fix="CACHE=FOLDER on a larger disk",
        )  # fmt: skip
    for name, file in manifest.files.items():  # read_manifest lets no name through that leads out of the folder
        _copy(source, f"{root}/{name}", folder / name, file.bytes)
    Bundle(folder, expect=digest)  # every size and SHA-256


def _copy(source: Any, name: str, path: Path, most: int) -> None:
    """A file of fsspec's file system `source`; BundleError when it cannot be read or has more than `most` bytes."""
    with path.open("xb") as written:
        try:
            reading = source.open(name, "rb")
        except Exception as error:  # of whatever driver
            raise _unreadable(name, error) from error
        with reading:
            left = most
            while chunk := _read(reading, name):
                left -= len(chunk)
                if left < 0:
                    raise BundleError(f"{name} has more than {most} bytes", expected="the bundle as it was built")
                written.write(chunk)


def _read(reading: Any, name: str) -> bytes:
    try:
        chunk: bytes = reading.read(_CHUNK)
    except Exception as error:  # the network fails, in the words of whatever driver
        raise _unreadable(name, error) from error
    return chunk


def _unreadable(name: str, error: Exception) -> BundleError:
    return BundleError(
        f"{name:.200} cannot be read: {type(error).__name__}: {error!s:.300}",
        expected="a bundle's folder that this machine may read",
        fix="check the address and the credentials; s3:// needs the package s3fs, gs:// gcsfs, az:// adlfs",
    )
