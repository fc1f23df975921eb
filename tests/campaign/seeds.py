"""What the campaign damages: a checkpoint in the layout of the public one, and a bundle of it, both small."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from export.build import BuildOptions, build
from tests.checkpoints import write_checkpoint
from tests.geometries import tiny

GEOMETRY = tiny(vocab=300)
INDEX = "model.safetensors.index.json"


def sharded_checkpoint(folder: Path) -> Path:
    """Two shards with an index, every settings file a checkpoint comes with, a vision tower in a folder of its own."""
    write_checkpoint(folder, GEOMETRY, tokenizer=True)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {name: f"model-0000{1 + (name > 'model.layers.2')}-of-00002.safetensors" for name in sorted(weights)}
    for file in set(shards.values()):
        save_file({name: weights[name] for name in weights if shards[name] == file}, folder / file)
    size = sum(weight.nbytes for weight in weights.values())
    settings = {
        INDEX: {"metadata": {"total_size": size}, "weight_map": shards},
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "_from_model_config": True},
        "tokenizer_config.json": {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
        },
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    }
    for name, value in settings.items():
        (folder / name).write_text(json.dumps(value))
    return folder


def torch_checkpoint(folder: Path) -> Path:
    """The same in one pytorch_model.bin."""
    write_checkpoint(folder, GEOMETRY, tokenizer=True)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def small_bundle(folder: Path, checkpoint: Path) -> Path:
    """A bundle of the checkpoint, in float32."""
    build(BuildOptions(model=checkpoint, precision="fp32", out=folder, check="none"))
    return folder
