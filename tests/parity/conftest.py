"""Official cases, and bundles built from the official weights: once for all workers of a test run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.build import BuildOptions, build
from export.checkpoint.config import read_config
from export.checkpoint.folder import Checkpoint
from export.network.reference import ReferenceModel
from tests.conftest import once
from tests.parity.official import CASES, Case, recorded
from tests.paths import OFFICIAL


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return recorded(request.param)


@pytest.fixture(scope="session")
def checkpoint(shared):
    """checkpoint(name) -> folder: "plain" official weights, or "degenerate": two layers with constant maps."""

    def make(folder: Path) -> None:
        fresh = folder.with_suffix(".tmp")
        shutil.copytree(OFFICIAL / "weights", fresh)
        tensors = load_file(fresh / "model.safetensors")
        for layer in (8, 10):
            tensors[f"model.layers.{layer}.self_attn.q_proj.weight"].zero_()
        save_file(tensors, fresh / "model.safetensors")
        fresh.rename(folder)

    return lambda name: OFFICIAL / "weights" if name == "plain" else once(shared / "degenerate", make)


@pytest.fixture(scope="session")
def bundle(shared, checkpoint):
    """bundle(precision, name="plain") -> folder, built and parity-checked by export.build."""

    def get(precision: str, name: str = "plain") -> Path:
        options = {"model": checkpoint(name), "precision": precision}
        return once(shared / f"{name}-{precision}", lambda folder: build(BuildOptions(**options, out=folder)))

    return get


@pytest.fixture(scope="session")
def reference(checkpoint):
    """reference(name, dtype=float32) -> the PyTorch model of a checkpoint."""
    cache: dict[tuple[str, torch.dtype], ReferenceModel] = {}

    def get(name: str, dtype: torch.dtype = torch.float32) -> ReferenceModel:
        if (name, dtype) not in cache:
            config = read_config(checkpoint(name))
            cache[name, dtype] = ReferenceModel(
                config.geometry, Checkpoint.open(checkpoint(name), config.tower_folder), dtype
            )
        return cache[name, dtype]

    return get
