"""Bundles whose manifest says something else, as if it had been written so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines.bundle.manifest import DIGEST, MANIFEST, canonical, digest_of


def edit(folder: Path, change: Callable[[dict[str, Any]], object], *, sealed: bool = True) -> None:
    """Apply `change` to the content of bundle.json; `sealed`: with the digest of what it then holds, else with none, as
    bundles of before there were digests."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.pop(DIGEST, None)
    change(manifest)
    if sealed:
        manifest[DIGEST] = digest_of(canonical(manifest))
    (folder / MANIFEST).write_text(json.dumps(manifest))
