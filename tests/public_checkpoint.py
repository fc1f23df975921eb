"""The public checkpoint (senfu/llava-v1.5-7b-flexattn) at a small size: its files, its keys, its names of tensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from engines.bundle.geometry import Geometry, Vision
from engines.bundle.tensors import TOWER_PREFIX, expected_tensors
from tests.export.checkpoint.sentences import train
from tests.geometries import official

VOCAB = 400  # pieces of the SentencePiece model
SMALL = official(
    hidden=64, intermediate=176, layers=12, heads=4, kv_heads=4, head_dim=16, vocab=VOCAB,
    vision=Vision(32, 64, 3, 4, 14, 1e-5, "quick_gelu"),
)  # fmt: skip
SHARDS = 4
FILES = {
    *("config.json", "generation_config.json", "model.safetensors.index.json", "special_tokens_map.json"),
    *("tokenizer.model", "tokenizer_config.json", "zero_to_fp32.py"),
    *(f"model-{n:05}-of-{SHARDS:05}.safetensors" for n in range(1, SHARDS + 1)),
}


def tensors(g: Geometry) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor: the last block of the tower and its norm, and hi-res projections in all layers,
    which no bundle needs, too."""
    shapes = dict(expected_tensors(g))
    last, spare = f"encoder.layers.{g.vision.layers - 1}.", f"encoder.layers.{g.vision.layers}."
    shapes |= {name.replace(last, spare): shape for name, shape in shapes.items() if last in name}
    norm = TOWER_PREFIX + "vision_model.post_layernorm."
    shapes |= {norm + "weight": (g.vision.hidden,), norm + "bias": (g.vision.hidden,)}
    width = (g.kv_heads * g.head_dim, g.hidden)
    names = (f"model.layers.{n}.self_attn.{kind}_proj_hd.weight" for n in range(g.layers) for kind in "kv")
    return shapes | dict.fromkeys(names, width)


def config(g: Geometry, tower: str) -> dict[str, object]:
    """Its config.json: LLaVA-1.5's, as the official training code saved it, and `extra`."""
    return {
        "_name_or_path": "checkpoints/llava-v1.5-7b", "architectures": ["LlavaLlamaForCausalLM"],
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "extra": {
            "highres_size": str(g.highres), "lowres_size": str(g.lowres), "threshold": str(g.threshold), "warmup": "10",
            "zoom_ratio": str(g.zoom),
        },
        "freeze_mm_mlp_adapter": False, "freeze_mm_vision_resampler": False, "hidden_act": "silu",
        "hidden_size": g.hidden, "image_aspect_ratio": "pad", "image_grid_pinpoints": None, "initializer_range": 0.02,
        "intermediate_size": g.intermediate, "max_length": 4096, "max_position_embeddings": 4096,
        "mm_hidden_size": g.vision.hidden, "mm_patch_merge_type": "flat", "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None, "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
        "mm_vision_tower": tower, "model_type": "llava", "num_attention_heads": g.heads, "num_hidden_layers": g.layers,
        "num_key_value_heads": g.kv_heads, "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": g.rms_eps,
        "rope_scaling": None, "rope_theta": g.rope_theta, "tie_word_embeddings": False,
        "tokenizer_model_max_length": 2048, "tokenizer_padding_side": "right", "torch_dtype": "float16",
        "transformers_version": "4.37.2", "tune_mm_mlp_adapter": False, "tune_mm_vision_resampler": False,
        "unfreeze_mm_vision_tower": False, "use_cache": True, "use_mm_proj": True, "vocab_size": g.vocab,
    }  # fmt: skip


def vision_config(g: Geometry) -> dict[str, object]:
    """Of a tower that is not the published one."""
    return {
        "model_type": "clip_vision_model", "hidden_size": g.vision.hidden, "intermediate_size": g.vision.intermediate,
        "num_hidden_layers": g.vision.layers + 1, "num_attention_heads": g.vision.heads, "image_size": g.lowres,
        "patch_size": g.vision.patch, "projection_dim": 768,
    }  # fmt: skip


def write_public_checkpoint(folder: Path, g: Geometry = SMALL) -> Path:
    """Write all of FILES, with random weights in float16; returns `folder`. The tower is described by `vision_config`,
    as its numbers are not those of the published one, which is all that differs from the keys of the original."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config(g, "openai/clip-vit-tiny") | {"vision_config": vision_config(g)})
    write_json(
        folder / "generation_config.json",
        {
            "_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "max_length": 4096, "pad_token_id": 0,
            "transformers_version": "4.37.2",
        },
    )  # fmt: skip

    def token(text: str) -> dict[str, object]:
        return {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}

    special = {"bos_token": token("<s>"), "eos_token": token("</s>"), "unk_token": token("<unk>")}
    write_json(folder / "special_tokens_map.json", special | {"pad_token": "<unk>"})
    decoder = {str(n): token(text) | {"special": True} for n, text in enumerate(("<unk>", "<s>", "</s>"))}
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": decoder, "bos_token": "<s>",
            "clean_up_tokenization_spaces": False, "eos_token": "</s>", "legacy": False, "model_max_length": 2048,
            "pad_token": "<unk>", "padding_side": "right", "sp_model_kwargs": {},
            "spaces_between_special_tokens": False, "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>",
            "use_default_system_prompt": False,
        },
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(train(vocab_size=VOCAB))
    (folder / "zero_to_fp32.py").write_text("#!/usr/bin/env python\nraise SystemExit('of DeepSpeed; never run')\n")
    _write_shards(folder, g)
    return folder


def _write_shards(folder: Path, g: Geometry) -> None:
    generator, shapes = torch.Generator().manual_seed(0), tensors(g)
    names = sorted(shapes)
    places = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        mine = names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]
        held = {name: torch.randn(shapes[name], generator=generator).div(8).half() for name in mine}
        save_file(held, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(mine, file)
    total = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def write_json(path: Path, value: object) -> None:
    """A settings file, indented as transformers writes it."""
    path.write_text(json.dumps(value, indent=2) + "\n")
