"""Official cases, and bundles built from the official weights: once for all workers of a test run."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from export.checkpoint.config import read_config
from export.checkpoint.folder import Checkpoint
from export.network.reference import ReferenceModel
from tests.parity.built import official_bundle, official_checkpoint
from tests.parity.official import CASES, Case, recorded


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return recorded(request.param)


@pytest.fixture(scope="session")
def checkpoint(shared):
    """checkpoint(name) -> folder: see official_checkpoint."""
    return partial(official_checkpoint, shared)


@pytest.fixture(scope="session")
def bundle(shared):
    """bundle(precision, name="plain") -> folder: see official_bundle."""
    return partial(official_bundle, shared)


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
