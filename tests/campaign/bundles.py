"""Damaged bundles. What is accepted must answer as the whole bundle does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from engines.bundle.manifest import DIGEST, MANIFEST, canonical, digest_of
from runtime import Engine
from tests.campaign.checkpoints import KINDS
from tests.campaign.mutate import damaged_bytes, damaged_json, damaged_text
from tests.campaign.trial import Unjudged, Wrong

Damage = Callable[[Path], None]
PROMPT = "what number is in the red square?"


def damages(folder: Path) -> st.SearchStrategy[tuple[str, bool, Damage]]:
    """What can be wrong with the bundle in `folder`: a description, whether its author signed it, and what does it."""
    manifest = json.loads((folder / MANIFEST).read_text())
    names = sorted(manifest["files"])

    def written(name: str, data: bytes) -> Damage:
        return lambda copy: (copy / name).write_bytes(data)

    def bytes_of(name: str) -> st.SearchStrategy[tuple[str, bool, Damage]]:
        whole = (folder / name).read_bytes()
        return (
            damaged_bytes(whole)
            .filter(lambda data: data != whole)
            .map(lambda data: (f"{name}: {len(data)} bytes", False, written(name, data)))
        )

    def kind_of(name: str, kind: str) -> tuple[str, bool, Damage]:
        def damage(copy: Path) -> None:
            (copy / name).unlink()
            KINDS[kind](copy / name)

        return f"{name}: {kind}", False, damage

    return st.one_of(
        damaged_text(manifest).map(lambda data: (f"{data[:3000]!r}", False, written(MANIFEST, data))),
        damaged_json(manifest)
        .filter(lambda value: isinstance(value, dict))
        .map(lambda value: ("signed", True, lambda copy: _sign(copy, value))),
        st.sampled_from(names).flatmap(bytes_of),
        st.builds(kind_of, st.sampled_from([MANIFEST, *names]), st.sampled_from(list(KINDS))),
    )


def _sign(copy: Path, value: dict) -> None:
    """Write a manifest with the digest that belongs to it, as a hostile author would."""
    value = {key: item for key, item in value.items() if key != DIGEST}
    try:
        value[DIGEST] = digest_of(canonical(value))
    except ValueError:  # no JSON has infinity; it is written all the same
        value[DIGEST] = ""
    (copy / MANIFEST).write_text(json.dumps(value))


def answer(folder: Path) -> list[int]:
    """The tokens of one answer."""
    picture = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    with Engine(folder, threads=1) as engine:
        return engine.generate(picture, PROMPT, max_new_tokens=4, stop_at_eos=False).token_ids


def run(folder: Path, expected: list[int], signed: bool, damage: Damage, scratch: Path) -> str:
    """Open a damaged copy and ask it; Wrong when it answers something else."""
    copy = scratch / "bundle"
    shutil.copytree(folder, copy)
    damage(copy)
    found = answer(copy)
    if found != expected and not signed:
        raise Wrong(f"accepted, and answers {found} in place of {expected}")
    if signed:
        raise Unjudged(f"a manifest that was made to fit answers {found}")
    return f"accepted: {found}"
