"""Bundles of the official weights, each made once in a folder that tests, and who packs for a GPU, share."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.conftest import once  # first: it keeps what the tracer makes

from export.build import BuildOptions, build  # isort: skip
from tests.paths import OFFICIAL


def official_checkpoint(shared: Path, name: str) -> Path:
    """A checkpoint's folder: "plain" official weights, or "degenerate": two layers with constant maps."""

    def make(folder: Path) -> None:
        fresh = folder.with_suffix(".tmp")
        shutil.copytree(OFFICIAL / "weights", fresh)
        tensors = load_file(fresh / "model.safetensors")
        for layer in (8, 10):
            tensors[f"model.layers.{layer}.self_attn.q_proj.weight"].zero_()
        save_file(tensors, fresh / "model.safetensors")
        fresh.rename(folder)

    return OFFICIAL / "weights" if name == "plain" else once(shared / "degenerate", make)


def official_bundle(shared: Path, precision: str, name: str = "plain") -> Path:
    """The folder of a bundle of such a checkpoint, built and parity-checked by export.build."""
    options = {"model": official_checkpoint(shared, name), "precision": precision}
    return once(shared / f"{name}-{precision}", lambda folder: build(BuildOptions(**options, out=folder)))
