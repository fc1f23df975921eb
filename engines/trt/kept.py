"""Finished engines of a build that was cut short, kept beside the bundle until a build succeeds: the next one goes on
after them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from engines.bundle.folder import sha256
from engines.bundle.work import write_whole
from engines.errors import BackendError
from engines.trt.worker import Built, Job

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Record:
    sha256: str
    built: Built


class Kept:
    """Engines by what they are made of; of others than this build's, none is ever taken. count: those there are."""

    def __init__(self, folder: Path | None) -> None:
        """`folder`: where they are kept, made when there is one to keep; None: nowhere. BackendError for a folder of
        that name which is somebody else's."""
        self.folder, self.count = folder, 0
        if folder is not None and os.path.lexists(folder):
            self._require_ours(folder)

    def find(self, key: str, plan: Path) -> tuple[Built, str] | None:
        """Put the engine of this key at `plan`: how it was built, and its SHA-256; None when it is not kept, or not
        whole. Raises OSError."""
        if self.folder is None or not (self.folder / f"{key}.json").is_file():
            return None
        try:
            record = TypeAdapter(_Record).validate_json((self.folder / f"{key}.json").read_bytes())
            _same_file(self.folder / f"{key}.plan", plan)
        except (ValidationError, FileNotFoundError):
            return None
        if sha256(plan) != record.sha256:
            plan.unlink()
            return None
        self.count += 1
        return record.built, record.sha256

    def keep(self, key: str, plan: Path, digest: str, built: Built) -> None:
        """Keep the engine at `plan`, which stays there, too. Raises OSError."""
        if self.folder is None:
            return
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self._require_ours(self.folder)
        there = self.folder / f"{key}.plan"
        there.unlink(missing_ok=True)
        _same_file(plan, there)
        write_whole(self.folder / f"{key}.json", json.dumps(asdict(_Record(digest, built))).encode())
        self.count += 1

    def done(self) -> None:
        """The build has succeeded: none is needed any more."""
        self.count = 0
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def tell(self) -> None:
        """Log what a build that did not succeed has left."""
        if self.count:
            logger.warning(
                f"{self.count} finished engines are kept in {self.folder}: the next build goes on after them"
            )

    @staticmethod
    def _require_ours(folder: Path) -> None:
        if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.geteuid():
            raise BackendError(
                f"{folder} is no folder of this user's", expected="nothing, or what a build left", fix="move it away"
            )


def key_of(job: Job, version: str, gpu: str | None, *digests: str | None) -> str:
    """What an engine is made of, as a name: the job without where things lie, the builder's version, the name of the
    GPU whose times it goes by, if there is one, and the digests of graph, weights and kernels."""
    nowhere = replace(job, graph="", weights="", plan="", kernels=None, timing_cache=None, rebuild="")
    text = json.dumps([asdict(nowhere), version, gpu, *digests], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _same_file(source: Path, target: Path) -> None:
    """The file under a further name; a copy where the file system has no such thing."""
    try:
        os.link(source, target, follow_symlinks=False)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target, follow_symlinks=False)
