"""Official cases, and bundles built from the official weights: once for all workers of a test run."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.backend import Image
from engines.bundle.geometry import Geometry
from engines.bundle.pages import margins
from export.build import BuildOptions, build
from export.checkpoint.config import read_config
from export.checkpoint.folder import Checkpoint
from export.network.reference import ReferenceModel
from tests.conftest import once
from tests.paths import OFFICIAL

CASES = sorted(path.stem for path in (OFFICIAL / "cases").glob("*.json"))
IMAGE_TOKEN = -200


@dataclass(frozen=True)
class Case:
    """One official end-to-end run; `golden` holds the arrays its README describes."""

    name: str
    golden: dict[str, np.ndarray]
    overrides: dict[str, str]

    @property
    def image(self) -> Path:
        return OFFICIAL / "images" / f"{self.name}.png"

    @property
    def weights(self) -> str:
        """Name of the checkpoint this case needs."""
        return "degenerate" if self.overrides else "plain"

    def ids(self, g: Geometry) -> np.ndarray:
        """The embedded prompt: [1, n], -1-j for image feature j."""
        row: list[int] = []
        for token in self.golden["input_ids"].tolist():
            row += (-1 - np.arange(g.image_tokens)).tolist() if token == IMAGE_TOKEN else [token]
        return np.array([row], np.int64)

    def begin(self) -> np.ndarray:
        return self.golden["image_range"][:1]

    def margins(self, g: Geometry) -> np.ndarray:
        return np.array([margins(*self.golden["ori_size"].tolist(), g.grid)], np.int64)

    def tiles(self, g: Geometry) -> np.ndarray:
        """[10, 3, 336, 336] from the golden pixels, so that each rung stands on its own."""
        z, side = g.zoom, g.lowres
        hires = self.golden["pixel_values_1008"].reshape(3, z, side, z, side).transpose(1, 3, 0, 2, 4)
        return np.concatenate((self.golden["pixel_values_336"][None], hires.reshape(z * z, 3, side, side)))

    def encode(self, model, g: Geometry) -> Image:
        """The case's image on a backend, or on the reference."""
        tiles = self.tiles(g)
        low, high = model.vision(tiles[:1]), model.vision(tiles[1:])
        return Image(low, model.project(high, self.begin()), self.begin(), self.margins(g))

    def replay(self, model, g: Geometry, budget: int = 81):
        """Prefill, then the official decoding steps with the official tokens; yields (step, decoder, result)."""
        ids = self.ids(g)
        decoder = model.decoder(self.encode(model, g), ids.shape[1] + len(self.golden["logits"]))
        decoder.run(ids[:, :-1])
        for step in range(len(self.golden["logits"])):
            token = ids[:, -1:] if step == 0 else self.golden["output_ids"][step].reshape(1, 1)
            yield step, decoder, decoder.run(token, budget)


@pytest.fixture(params=CASES)
def case(request) -> Case:
    meta = json.loads((OFFICIAL / "cases" / f"{request.param}.json").read_text())
    with np.load(OFFICIAL / "cases" / f"{request.param}.npz") as arrays:
        return Case(request.param, dict(arrays), meta.get("overrides", {}))


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
