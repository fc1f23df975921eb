"""transformers in the parity gate: what this project misreads of a checkpoint, it reads right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from engines.bundle.geometry import Geometry
from engines.bundle.precision import FP32
from engines.errors import ParityError
from export import build as building
from export import second_opinion
from export.check import LIMITS
from export.checkpoint.config import read_config
from export.checkpoint.folder import Checkpoint
from export.network.reference import ReferenceModel
from export.options import BuildOptions
from tests.checkpoints import write_checkpoint
from tests.geometries import tiny

ROWS = ["transformers' CLIP", "transformers' Llama"]
MISREAD = {  # what a reader could get wrong: the geometry it makes, and where transformers differs
    "rope_theta": ({"rope_theta": 500.0}, "Llama"),
    "rms_norm_eps": ({"rms_eps": 1e-2}, "Llama"),
    "the tower's activation": ({"vision": "gelu"}, "CLIP"),
    "the selected layer": ({"vision": 1}, "CLIP"),
}


def build(checkpoint: Path, out: Path, precision: str = "fp32", **options: object) -> str:
    """What a build prints."""
    console = Console(record=True, width=200, file=(out.parent / "console").open("w"))
    building.build(BuildOptions(model=checkpoint, precision=precision, out=out, **options), console)
    return console.export_text()


def misread(g: Geometry, change: dict) -> Geometry:
    vision = change.get("vision")
    if vision == "gelu":
        return replace(g, vision=replace(g.vision, activation="gelu"))
    if vision == 1:
        return replace(g, vision=replace(g.vision, layers=1))
    return replace(g, **change)


@pytest.mark.parametrize(
    ("change", "precision"),
    [
        ({}, "fp16"),
        ({"attention_bias": True, "kv_heads": 2, "projector_depth": 1}, "fp32"),
        ({"tied_embeddings": True}, "int8"),
    ],
)
def test_transformers_agrees(change, precision, tmp_path):
    g = tiny(**change)
    blocks = {"block_size": 16} if precision == "int8" else {}
    printed = build(write_checkpoint(tmp_path / "checkpoint", g), tmp_path / "bundle", precision, **blocks)
    rows = ROWS if precision == "int8" else [*ROWS, *(f"{row}, the bundle" for row in ROWS)]  # int8 rounds weights
    assert all(row in printed for row in rows) and ("the bundle" in printed) == (precision != "int8")
    assert "not compared" not in printed


@pytest.mark.parametrize("what", MISREAD)
def test_what_could_be_misread_shows(what, tmp_path):
    change, where = MISREAD[what]
    checkpoint, g = write_checkpoint(tmp_path / "checkpoint", tiny()), tiny()
    asked, config = second_opinion.request(g), read_config(checkpoint)
    theirs = second_opinion.of_transformers(checkpoint, asked)
    weights = Checkpoint.open(checkpoint, config.tower_folder)

    def errors(read: Geometry) -> dict[str, float]:
        ours = second_opinion.of_model(ReferenceModel(read, weights), asked)
        return {
            "CLIP": np.abs(ours.features - theirs.features).max() / np.abs(theirs.features).max(),
            "Llama": np.abs(ours.logits - theirs.logits).max() / np.abs(theirs.logits).max(),
        }

    assert max(errors(g).values()) < LIMITS[FP32].features
    assert errors(misread(g, change))[where] > 100 * LIMITS[FP32].features


def test_what_both_sides_of_parity_misread_stops_the_build(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny())
    read = building.read_config
    monkeypatch.setattr(
        building, "read_config", lambda folder: replace(c := read(folder), geometry=replace(c.geometry, rms_eps=1e-2))
    )
    with pytest.raises(ParityError, match="transformers' Llama"):
        build(checkpoint, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_tensor_that_was_left_out_is_found(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny(attention_bias=True))
    weights = load_file(checkpoint / "model.safetensors")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "attention_bias": False}))
    weights = {
        name: of for name, of in weights.items() if "self_attn" not in name or "vision" in name or "weight" in name
    }
    extra = {"model.layers.1.mlp.up_proj.bias": torch.ones(48)}
    save_file({**weights, **extra}, checkpoint / "model.safetensors")
    with pytest.raises(ParityError, match=r"no place for model.layers.1.mlp.up_proj.bias"):
        second_opinion.of_transformers(checkpoint, second_opinion.request(tiny()))


def test_other_end_tokens_are_found(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny())
    read = building.read_config
    monkeypatch.setattr(building, "read_config", lambda folder: replace(read(folder), eos_token_ids=(2, 7)))
    with pytest.raises(ParityError, match=r"ends an answer at the tokens \[2\], this bundle at \[2, 7\]"):
        build(checkpoint, tmp_path / "bundle")


def test_a_pad_token_behind_the_vocabulary_and_vicunas_generation_config_are_no_matter(tmp_path, capfd):
    """As many checkpoints of LLaVA have them. transformers would end in an assertion, and warn of the temperature."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny())
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "pad_token_id": config["vocab_size"]}))
    (checkpoint / "generation_config.json").write_text(
        json.dumps({"_from_model_config": True, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.9, "top_p": 0.6})
    )
    assert all(row in build(checkpoint, tmp_path / "bundle") for row in ROWS)
    assert "[transformers]" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["model.norm.bias", "step"])
def test_what_is_left_out_for_a_reason_is_no_objection(name, tmp_path):
    """A bias of zeros, and what is outside the model: the bundle is right to do without."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny())
    weights = load_file(checkpoint / "model.safetensors")
    save_file({**weights, name: torch.zeros(32)}, checkpoint / "model.safetensors")
    config = json.loads((checkpoint / "config.json").read_text())
    odd = {"return_dict": False, "torch_dtype": "none", "hidden_act": None, "text_config": {"hidden_size": 32}}
    (checkpoint / "config.json").write_text("\ufeff" + json.dumps({**config, **odd}))
    second_opinion.of_transformers(checkpoint, second_opinion.request(tiny()))


def test_what_transformers_cannot_open_is_said(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny())
    (checkpoint / "generation_config.json").write_text(json.dumps({"num_beams": 1, "num_return_sequences": 3}))
    with pytest.raises(ParityError, match=r"cannot open this checkpoint: ValueError: .*num_return_sequences"):
        build(checkpoint, tmp_path / "bundle")


def test_shards_with_a_stale_copy_are_read_as_the_index_says(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny())
    asked = second_opinion.request(tiny())
    whole = second_opinion.of_transformers(checkpoint, asked)
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    first = {name: of for name, of in weights.items() if name < "model.layers.2"}
    second = {name: of for name, of in weights.items() if name not in first}
    save_file(first, checkpoint / "a.safetensors")
    save_file({**second, "lm_head.weight": torch.zeros(64, 32)}, checkpoint / "b.safetensors")
    files = {name: "a.safetensors" if name in first else "b.safetensors" for name in weights}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    sharded = second_opinion.of_transformers(checkpoint, asked)
    assert (whole.logits == sharded.logits).all() and (whole.features == sharded.features).all()


def test_without_transformers_the_build_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(second_opinion, "available", lambda: False)
    printed = build(write_checkpoint(tmp_path / "checkpoint", tiny()), tmp_path / "bundle")
    assert "not compared with transformers' own models: transformers is not installed" in printed
    assert second_opinion.INSTALL in printed and ROWS[0] not in printed
