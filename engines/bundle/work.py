"""Folders and files in the making: beside what they become, locked while their process lives, and swept up by the next
build to the same place when it was killed."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = "lock"  # in a work folder: flocked by the process that works there, as long as it lives
OLD = "old"  # in a work folder: the bundle that stood at the place until the new one is there
_MARK = b"flexattention: a build works here while this file is locked\n"


@contextmanager
def work_folder(place: Path) -> Iterator[Path]:
    """A new folder beside `place`, hidden, of a name that nobody can guess, and deleted with everything in it after the
    block; but what the block set aside in it under the name OLD goes back to `place` if nothing is there. What killed
    builds to the same place have left is deleted first. Raises OSError."""
    sweep(place)
    while True:
        # Known by name before it is made: an interruption right after it was made finds what to delete.
        folder, ours, lock = place.with_name(f".{place.name}-{secrets.token_hex(4)}"), True, None
        try:
            try:
                folder.mkdir(mode=0o700)
            except FileExistsError:
                ours = False
                continue
            lock = _marked(folder)
            if lock is None:  # swept up before it was locked: no build ever worked there
                continue
            yield folder
            return
        finally:
            try:
                if ours:
                    _clear(folder, place)
            finally:
                if lock is not None:
                    os.close(lock)


def sweep(place: Path) -> None:
    """Delete the work folders of builds to `place` that were killed, and none of a build that lives: only a folder of
    ours whose lock nobody holds. A bundle that was set aside, and whose successor never came, is put back."""
    name = re.compile(re.escape(f".{place.name}-") + "[0-9a-f]{8}")
    try:
        found = [path for path in place.parent.iterdir() if name.fullmatch(path.name)]
    except OSError:  # no such folder yet, or none that can be listed: nothing to sweep
        return
    for folder in found:
        lock = _abandoned(folder)
        if lock is None:
            continue
        try:
            _clear(folder, place)
        finally:
            os.close(lock)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock that the file at `path` stands for, and hold it in the block: one process at a time. The file
    stays, empty. A link of that name is not followed. Raises OSError, also where the file system knows no locks."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all: a new file of an unguessable name takes its place. A link
    at `path` is replaced, not followed. Raises OSError."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), 0o644)  # a temporary file is its owner's alone
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _clear(folder: Path, place: Path) -> None:
    """Delete a work folder; what was set aside in it goes back to a place where nothing is. If it cannot, it stays."""
    if (folder / OLD).is_dir() and (not os.path.lexists(place) or (place.is_dir() and not any(place.iterdir()))):
        (folder / OLD).rename(place)
    shutil.rmtree(folder, ignore_errors=True)


def _marked(folder: Path) -> int | None:
    """The descriptor of the lock of a folder just made, held; None when somebody else has it, or the folder is gone."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    try:
        os.write(lock, _MARK)
        if _taken(lock, without=True) and os.path.samestat(os.fstat(lock), os.lstat(folder / LOCK)):
            return lock
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _abandoned(folder: Path) -> int | None:
    """The descriptor of the lock of a folder that some killed build left behind, now held; None for any other folder.
    Where the file system knows no locks nobody can tell, and nothing is abandoned."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # no work folder, or somebody else's
        return None
    with suppress(OSError):  # it vanished meanwhile; a pipe of that name
        ours = not folder.is_symlink() and folder.stat().st_uid == os.geteuid()
        if ours and os.read(lock, len(_MARK) + 1) == _MARK and _taken(lock, without=False):
            return lock
    os.close(lock)
    return None


def _taken(descriptor: int, *, without: bool) -> bool:
    """Whether this process now holds the lock; `without`: the answer where the file system knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return without
    return True
