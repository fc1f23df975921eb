"""The numbers of the default model, and its checkpoint in the official layout."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from engines.bundle.geometry import Geometry, Vision
from engines.bundle.tensors import TOWER_PREFIX, expected_tensors
from export.checkpoint.tower import Pixels
from export.checkpoint.write_config import write_config
from export.default_model.questions import TEMPLATE, TURN, build_tokenizer
from flexattention_deploy import require_extra

require_extra("train")  # drawing scenes and asking about them does without

CLIP_MEAN, CLIP_STD = Pixels().image_mean, Pixels().image_std
VOCABULARY = build_tokenizer().get_vocab_size()
GEOMETRY = Geometry(
    hidden=128, intermediate=352, layers=8, heads=4, kv_heads=4, head_dim=32, vocab=VOCABULARY, rms_eps=1e-5,
    rope_theta=10000.0, attention_bias=False, tied_embeddings=False, projector_depth=2, context=512, lowres=168,
    zoom=3, cells=9, start_layer=2, threshold=64, image_mean=CLIP_MEAN, image_std=CLIP_STD,
    vision=Vision(hidden=128, intermediate=512, layers=4, heads=4, patch=14, eps=1e-5, activation="quick_gelu"),
)  # fmt: skip


def write_checkpoint(folder: Path, tensors: dict[str, Tensor]) -> None:
    """config.json, model.safetensors (float16), tokenizer.json and the tower's config. `tensors` by official name."""
    from safetensors.torch import save_file

    write_config(folder, GEOMETRY, spare_blocks=0, prompt_template=TEMPLATE, turn_template=TURN)
    kept = {name: tensors[name].detach().to(torch.float16).contiguous() for name in expected_tensors(GEOMETRY)}
    save_file(kept, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(build_tokenizer().to_str(pretty=True) + "\n", encoding="utf-8")


def official_names(tower: dict[str, Tensor], student: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of train_vision.Tower and train_decoder.Student under their official names."""
    named = {}
    for name, tensor in tower.items():
        if name.startswith("encoder."):
            named[name.removeprefix("encoder.")] = tensor
    for name, tensor in student.items():
        if name.startswith("projector."):
            named["model.mm_" + name] = tensor
        elif name.startswith(("decoder.", "pages.")):
            named[name.split(".", 1)[1]] = tensor
    assert any(name.startswith(TOWER_PREFIX) for name in named)
    return named
