"""Random checkpoints of any geometry in the official layout, small enough for tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engines.bundle.geometry import Geometry
from export.checkpoint.folder import expected_tensors

SPECIAL = ["<unk>", "<s>", "</s>"]


def write_checkpoint(
    folder: Path,
    g: Geometry,
    *,
    tokenizer: bool = False,
    seed: int = 0,
    overrides: dict[str, torch.Tensor] | None = None,
    **config: object,
) -> Path:
    """Write config.json, weights (float32), the tower's config and, when asked, a tokenizer; returns `folder`.

    `overrides` replaces tensors by name, `config` entries of config.json. Queries and keys are drawn strong enough for
    attention, and with it the selection, to prefer some cells.
    """
    (folder / "clip").mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        if "norm" in name:
            return 1 + 0.1 * values if name.endswith("weight") else 0.1 * values
        if name.endswith("bias"):
            return 0.1 * values
        if len(shape) == 1 or name.endswith("embed_tokens.weight"):
            return values
        peak = 1.6 if ".q_proj" in name or ".k_proj" in name else 1.0
        return peak * values / torch.Size(shape[1:]).numel() ** 0.5

    tensors = {name: draw(name, shape) for name, shape in expected_tensors(g).items()}
    save_file({**tensors, **(overrides or {})}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_config(g) | config))
    (folder / "clip" / "config.json").write_text(json.dumps(_tower(g)))
    if tokenizer:
        write_tokenizer(folder, g.vocab)
    return folder


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A byte-level BPE that fits `vocab` (at least 259)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["what number is in the red square? a chat between a curious human"] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def _config(g: Geometry) -> dict[str, object]:
    depth = g.projector_depth
    return {
        "hidden_size": g.hidden,
        "intermediate_size": g.intermediate,
        "num_hidden_layers": g.layers,
        "num_attention_heads": g.heads,
        "num_key_value_heads": g.kv_heads,
        "vocab_size": g.vocab,
        "rms_norm_eps": g.rms_eps,
        "rope_theta": g.rope_theta,
        "hidden_act": "silu",
        "attention_bias": g.attention_bias,
        "tie_word_embeddings": g.tied_embeddings,
        "max_position_embeddings": g.context,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "image_aspect_ratio": "pad",
        "mm_vision_tower": "clip",
        "mm_vision_select_layer": -2,
        "mm_projector_type": "linear" if depth == 1 else f"mlp{depth}x_gelu",
        "extra": {
            "zoom_ratio": str(g.zoom),
            "highres_size": str(g.highres),
            "lowres_size": str(g.lowres),
            "threshold": str(g.threshold),
            "start_layer": str(g.start_layer),
            "cells": str(g.cells),
            "prompt_template": "USER: <image>\n{prompt} ASSISTANT:",
        },
    }


def _tower(g: Geometry) -> dict[str, object]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": g.vision.hidden,
        "intermediate_size": g.vision.intermediate,
        "num_hidden_layers": g.vision.layers + 1,  # the last block is not needed, and not in the weights
        "num_attention_heads": g.vision.heads,
        "image_size": g.lowres,
        "patch_size": g.vision.patch,
        "hidden_act": g.vision.activation,
        "layer_norm_eps": g.vision.eps,
    }
