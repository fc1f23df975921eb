"""The digest of a bundle: one SHA-256 over its manifest, which holds that of every file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

DIGEST = "digest"  # the key of bundle.json that holds the digest of all others


def canonical(manifest: Mapping[str, object]) -> str:
    """What bundle.json holds, its own digest left out, as JSON with sorted keys, without spaces, in ASCII: how the file
    is laid out does not matter; any name, number or text in it does. RecursionError for what is nested too deep."""
    content = {key: value for key, value in manifest.items() if key != DIGEST}
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest_of(text: str) -> str:
    """ "sha256:..." of a canonical text."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
