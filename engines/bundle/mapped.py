"""Files of a bundle that a backend has mapped into memory, watched for writes.

What writes into such a file (`cp` over it, rsync --inplace) changes the weights under the running model, and what cuts
it off ends the process with SIGBUS at the next read. A file that is replaced by rename, or deleted, does neither: the
mapping keeps the old one.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable

from engines.bundle.folder import Bundle
from engines.errors import BundleError
from plugins.files import open_file


class MappedFiles:
    """Some files of an opened bundle, held open, so that whatever happens to their names the files that were mapped are
    the ones looked at. Descriptors are closed when this object goes."""

    def __init__(self, bundle: Bundle, names: Iterable[str]) -> None:
        """To be made before the backend maps the files `names`. BundleError when one cannot be opened."""
        self._bundle = bundle
        self._descriptors: dict[str, int] = {}
        weakref.finalize(self, _close, self._descriptors)
        for name in names:
            with open_file(bundle.file(name), BundleError) as file:
                self._descriptors[name] = os.dup(file.fileno())  # not inherited by processes that this one starts

    def require_mapped(self) -> None:
        """To be called when the backend has mapped them: BundleError if it may have mapped others than were checked."""
        self.require_unchanged()
        for name, descriptor in self._descriptors.items():
            path = self._bundle.file(name)
            try:
                same = os.path.samestat(os.fstat(descriptor), path.stat())
            except OSError:
                same = False
            if not same:
                raise BundleError(f"{path} was replaced since the bundle was opened", fix="open it again")

    def require_unchanged(self) -> None:
        """BundleError if one was written to, or cut off, since the bundle checked it, as far as its size and its time
        tell. A few microseconds."""
        for name, descriptor in self._descriptors.items():
            now, before = os.fstat(descriptor), self._bundle.checked[name]
            if (now.st_size, now.st_mtime_ns, now.st_ino) != (before.st_size, before.st_mtime_ns, before.st_ino):
                raise BundleError(
                    f"{self._bundle.file(name)} was written to while the bundle was open ({now.st_size} bytes, was "
                    f"{before.st_size})",
                    expected="files that stay as they were: the model reads its weights from them",
                    fix="open the bundle again; to put another in its place, write it beside and rename it",
                )


def _close(descriptors: dict[str, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
