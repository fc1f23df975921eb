"""Geometry -> `config.json` in the official layout: what export/checkpoint/config.py reads, the other way round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engines.bundle.geometry import Geometry
from engines.bundle.manifest import PROMPT_TEMPLATE
from export.checkpoint.tower import PUBLISHED, Pixels


def write_config(
    folder: Path,
    g: Geometry,
    *,
    tower: str = "clip",
    inside: bool = False,
    spare_blocks: int = 1,
    prompt_template: str = PROMPT_TEMPLATE,
    turn_template: str | None = None,
    system_prompt: str | None = None,
    dtype: str = "float16",
    **entries: object,
) -> None:
    """Write config.json into `folder`, which is made if need be, and with it the config of the vision tower.

    What a build chooses (lazy_pages, int8_pages, int8_cache) is in neither. tower: a folder to make inside; or the name
    of a published one, whose numbers are known, and must be g's. inside: no folder, the tower's config becomes
    `vision_config`, as where its weights are the checkpoint's own. spare_blocks: blocks of the tower after the selected
    one, which nothing needs: the official -2 leaves one. turn_template, system_prompt: None for those that belong to
    prompt_template (config.py). dtype: of the weights. entries: further keys of config.json, or others in place of g's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(g, tower, spare_blocks, dtype)
    texts = {"prompt_template": prompt_template, "turn_template": turn_template, "system_prompt": system_prompt}
    defaults = (None, PROMPT_TEMPLATE)
    config["extra"] |= {key: text for key, text in texts.items() if text not in defaults}
    config |= {"vision_config": _tower(g, spare_blocks)} if inside else {}
    config |= entries
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if inside or Path(tower).name in PUBLISHED:
        return
    (folder / tower).mkdir(parents=True, exist_ok=True)
    (folder / tower / "config.json").write_text(json.dumps(_tower(g, spare_blocks), indent=1) + "\n")
    pixels = {"image_mean": g.image_mean, "image_std": g.image_std}
    if pixels != Pixels().model_dump():
        (folder / tower / "preprocessor_config.json").write_text(json.dumps(pixels, indent=1) + "\n")


def _config(g: Geometry, tower: str, spare_blocks: int, dtype: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "hidden_size": g.hidden,
        "intermediate_size": g.intermediate,
        "num_hidden_layers": g.layers,
        "num_attention_heads": g.heads,
        "num_key_value_heads": g.kv_heads,
        "vocab_size": g.vocab,
        "hidden_act": "silu",
        "rms_norm_eps": g.rms_eps,
        "rope_theta": g.rope_theta,
        "max_position_embeddings": g.context,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": g.vision.hidden,
        "mm_projector_type": "linear" if g.projector_depth == 1 else f"mlp{g.projector_depth}x_gelu",
        "mm_vision_tower": tower,
        "mm_vision_select_layer": -1 - spare_blocks,
        "mm_vision_select_feature": "patch",
        "torch_dtype": dtype,
    }
    config |= {"attention_bias": True} if g.attention_bias else {}
    config |= {"tie_word_embeddings": True} if g.tied_embeddings else {}
    extra = {
        "highres_size": str(g.highres),
        "lowres_size": str(g.lowres),
        "zoom_ratio": str(g.zoom),
        "cells": str(g.cells),
        "start_layer": str(g.start_layer),
        "threshold": str(g.threshold),
    }
    return {**config, "extra": extra}


def _tower(g: Geometry, spare_blocks: int) -> dict[str, object]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": g.vision.hidden,
        "intermediate_size": g.vision.intermediate,
        "num_hidden_layers": g.vision.layers + spare_blocks,
        "num_attention_heads": g.vision.heads,
        "image_size": g.lowres,
        "patch_size": g.vision.patch,
        "hidden_act": g.vision.activation,
        "layer_norm_eps": g.vision.eps,
    }
