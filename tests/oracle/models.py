"""A checkpoint of ours in the classes of `transformers`, which share no line with this project.

They are imported when first needed, as this takes seconds, and by module: transformers itself offers some names only
where torchvision is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from engines.bundle.geometry import Geometry

if TYPE_CHECKING:
    from transformers.models.clip.modeling_clip import CLIPVisionModel
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

TOWER, PROJECTOR = "model.vision_tower.vision_tower.vision_model.", "model.mm_projector."
UNUSED = {"post_layernorm.weight", "post_layernorm.bias"}  # of CLIP, beside its last block


def weights_of(checkpoint: Path, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of a checkpoint whose names begin with `prefix`, in float32, named without it."""
    tensors = load_file(checkpoint / "model.safetensors")
    return {name.removeprefix(prefix): tensor.float() for name, tensor in tensors.items() if name.startswith(prefix)}


def clip_of(checkpoint: Path, g: Geometry) -> CLIPVisionModel:
    """The vision tower with one block more than the checkpoint has: the official code selects layer -2 of it."""
    pytest.importorskip("transformers")
    from transformers.models.clip.configuration_clip import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPVisionModel

    v = g.vision
    config = CLIPVisionConfig(
        hidden_size=v.hidden, intermediate_size=v.intermediate, num_hidden_layers=v.layers + 1,
        num_attention_heads=v.heads, image_size=g.lowres, patch_size=v.patch, hidden_act=v.activation,
        layer_norm_eps=v.eps,
    )  # fmt: skip
    model = CLIPVisionModel(config).eval()
    missing, unexpected = model.load_state_dict(weights_of(checkpoint, TOWER), strict=False)
    assert not unexpected
    assert all(name in UNUSED or name.startswith(f"encoder.layers.{v.layers}.") for name in missing), missing
    return model


def projector_of(checkpoint: Path, g: Geometry) -> nn.Module:
    """LLaVA's `linear` or `mlpNx_gelu` projector, as its builder puts it together."""
    widths = [g.vision.hidden, *[g.hidden] * g.projector_depth]
    layers: list[nn.Module] = [nn.Linear(*widths[:2])]
    for depth in range(1, g.projector_depth):
        layers += [nn.GELU(), nn.Linear(*widths[depth : depth + 2])]
    module = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
    module.load_state_dict(weights_of(checkpoint, PROJECTOR))
    return module.eval()


def llama_of(checkpoint: Path, g: Geometry) -> LlamaForCausalLM:
    """The decoder without what FlexAttention adds to it."""
    pytest.importorskip("transformers")
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=g.hidden, intermediate_size=g.intermediate, num_hidden_layers=g.layers,
        num_attention_heads=g.heads, num_key_value_heads=g.kv_heads, head_dim=g.head_dim, vocab_size=g.vocab,
        rms_norm_eps=g.rms_eps, attention_bias=g.attention_bias, tie_word_embeddings=g.tied_embeddings,
        max_position_embeddings=g.context, rope_parameters={"rope_type": "default", "rope_theta": g.rope_theta},
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ours = ("model.vision_tower.", "model.mm_projector.")
    tensors = {
        name: tensor
        for name, tensor in weights_of(checkpoint).items()
        if not name.startswith(ours) and "_proj_hd." not in name
    }
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if g.tied_embeddings else []), (missing, unexpected)
    return model


@torch.no_grad()
def clip_features(checkpoint: Path, g: Geometry, tiles: Tensor) -> Tensor:
    """tiles [N, 3, lowres, lowres] -> projected patch features of layer -2 [N, grid * grid, hidden], in float64: in
    float32 these models are as far from that as ours, and a comparison would count both errors."""
    states = clip_of(checkpoint, g).double()(tiles.double(), output_hidden_states=True).hidden_states
    return projector_of(checkpoint, g).double()(states[-2][:, 1:])
