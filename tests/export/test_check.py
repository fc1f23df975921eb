"""The gate of a build, for all at once that --fit may choose: what it holds such a bundle to, and that nothing passes
which is past that."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.bundle.folder import Bundle
from engines.bundle.precision import INT4
from engines.bundle.tensors import MODEL, in_vision
from engines.errors import ParityError
from engines.ort import OrtDecoder, OrtModel
from engines.sizing.choices import CHOICES, made
from engines.sizing.fit import room_of
from engines.sizing.fitting import fit
from engines.sizing.needs import Configuration
from engines.targets import target
from export.build import BuildOptions, build
from export.check import Limits, limits_of, parity, stored_of
from export.checkpoint.folder import Checkpoint
from export.weights.stored import Stored
from tests.checkpoints import write_checkpoint
from tests.conftest import once
from tests.geometries import official, tiny

WHOLE = {"precision": "int4", "block_size": 32, "kv": "int8", "kv_cache": "int8", "head": "int8", "vision": "int8"}
HELD_TO = Limits(features=0.07, prefill=0.2, decode=0.5, cells=0.1)
PAST = 1.5  # times the limit: with half of it used up already, that is still past it


@pytest.fixture(scope="module")
def whole(shared) -> tuple[Checkpoint, Path]:
    """The checkpoint, and a bundle that was parity-checked when it was built."""
    g = tiny(hidden=64, intermediate=128, head_dim=16)
    folder = once(shared / "whole-checkpoint", lambda path: write_checkpoint(path, g))
    out = once(shared / "whole", lambda path: build(BuildOptions(folder, path, **WHOLE)))
    return Checkpoint.open(folder, folder / "clip"), out


def held_to(c: Configuration) -> Limits:
    return limits_of(c.precision, c.geometry, c.vision != MODEL)


def test_what_is_proposed_is_held_to_bounds_of_its_own(whole):
    asked = Configuration(official())
    proposed = fit(asked, room_of(target("orin-nano-8"))).assessment.configuration
    assert proposed.precision == INT4 and proposed.geometry.int8_pages and proposed.geometry.int8_cache
    assert proposed.head == "model"
    assert held_to(proposed) == replace(HELD_TO, features=0.02)  # in its vision nothing is in codes
    everything = made(asked, CHOICES)
    assert everything.geometry.int8_cache and everything.vision == "int8" and held_to(everything) == HELD_TO
    bundle = Bundle(whole[1])
    assert limits_of(bundle.precision, bundle.manifest.geometry, coded_vision=True) == HELD_TO
    assert stored_of(bundle) == "int4, int8 pages, int8 cache, head int8, vision int8"


def shift(values: np.ndarray, limit: float) -> None:
    """One value by more than is allowed, as a share of the largest."""
    values.reshape(-1)[0] += PAST * limit * np.abs(values).max()


def damaged(monkeypatch, stage: str) -> None:
    """What ONNX Runtime computes, but for what a stage looks at."""
    owner, method = {"vision": (OrtModel, "vision"), "page": (OrtModel, "project")}.get(
        stage.split()[0], (OrtDecoder, "run")
    )
    original, calls = getattr(owner, method), list[str]()

    def run(self, *arguments, **named):
        result = original(self, *arguments, **named)
        calls.append(stage)
        if stage == "vision features" and len(calls) == 1:
            shift(result.numpy(), HELD_TO.features)
        if stage == "page values":
            scales = next(name for name in result if name.startswith("page_value_scale."))
            result[scales].numpy()[:] *= 1 + PAST * HELD_TO.features
        if stage == "prefill logits" and len(calls) == 1:
            shift(result.logits, HELD_TO.prefill)
        if stage == "decode logits" and len(calls) > 1:
            shift(result.logits, HELD_TO.decode)
        if stage == "selected cells":
            result.page_count[:] = result.pages.shape[-1]
        return result

    monkeypatch.setattr(owner, method, run)


@pytest.mark.parametrize(
    "stage", ["vision features", "page values", "prefill logits", "decode logits", "selected cells"]
)
def test_what_is_past_its_bound_fails(whole, monkeypatch, stage):
    checkpoint, bundle = whole
    damaged(monkeypatch, stage)
    with pytest.raises(ParityError, match=f"^{stage} differs") as caught:
        parity(Bundle(bundle), checkpoint)
    assert f"for {stored_of(Bundle(bundle))}" in caught.value.expected


def test_a_code_that_is_not_the_checkpoints_fails(whole, tmp_path):
    folder = Path(shutil.copytree(whole[1], tmp_path / "bundle"))
    stored = Stored(Bundle(folder))
    _, tensor = stored._tensors[next(filter(in_vision, stored.schemes))]
    with open(folder / "vision.weights", "r+b") as file:
        file.seek(tensor.offset + tensor.length - 1)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x10]))
    with pytest.raises(ParityError, match="steps"):
        parity(Bundle(folder, verify=False), whole[0])
