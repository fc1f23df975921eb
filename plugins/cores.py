"""How many processor cores there are for this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Cores this process may keep busy, at least 1: those of the machine, or fewer where the process is kept to some
    (taskset, a container's cpuset), or to a share of their time (a container's quota, rounded up).

    `root`: of the file system, to look at another one's control groups.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *_quotas(root)]))


def _quotas(root: Path) -> Iterator[int]:
    """The cores that each control group of this process has time for: its own, and all those it lies in."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:  # version 2
            for folder in _upwards(root / "sys/fs/cgroup", path):
                quota, _, period = _text(folder / "cpu.max").partition(" ")
                yield from _cores(quota, period)
        elif "cpu" in controllers.split(","):  # version 1
            for folder in _upwards(root / "sys/fs/cgroup" / controllers, path):
                yield from _cores(_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """The folder of a control group and those above it, up to where the hierarchy is mounted. A container may see the
    path that the host has, which is not there, and its own group at the mount."""
    names = [name for name in path.split("/") if name not in ("", ".", "..")]
    for count in range(len(names), -1, -1):
        yield mount.joinpath(*names[:count])


def _cores(quota: str, period: str) -> Iterator[int]:
    """Microseconds of quota in each period -> cores; nothing for "max", -1, or what is no number."""
    try:
        share, of = int(quota), int(period)
    except ValueError:
        return
    if share > 0 and of > 0:
        yield -(-share // of)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
