"""Damaged checkpoints. What is accepted is held against transformers, which reads the folder itself."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from engines.bundle.precision import FP32
from engines.errors import ParityError
from export import second_opinion
from export.build import BuildOptions, read_model, read_recipe
from export.check import LIMITS
from export.network.reference import ReferenceModel
from tests.campaign.mutate import damaged_bytes, damaged_json, damaged_text
from tests.campaign.seeds import GEOMETRY
from tests.campaign.trial import Unjudged, Wrong

Damage = Callable[[Path], None]
SETTINGS = (
    *("config.json", "config.json", "config.json", "model.safetensors.index.json", "generation_config.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json", "clip/config.json"),
    "clip/preprocessor_config.json",
)
STRANGE = (  # names of tensors that would change what a model computes, or look as if
    *(
        "model.layers.{}.mlp.gate_proj.bias",
        "model.layers.{}.self_attn.q_proj.bias",
        "model.layers.{}.mlp.down_proj.bias",
    ),
    *("model.layers.{}.self_attn.q_proj.lora_A.weight", "model.layers.{}.self_attn.q_norm.weight", "lm_head.bias"),
    *("model.layers.{}.self_attn.o_proj.bias", "model.layers.{}.post_feedforward_layernorm.weight", "model.norm.bias"),
    *("module.lm_head.weight", "model.layers.7.mlp.up_proj.weight", "model.mm_projector.4.weight", "score.weight"),
    "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_norm.weight",
)


def config_keys(original: dict) -> st.SearchStrategy[dict]:
    """A config with a key that models of other kinds have."""
    keys = {
        "rope_scaling": [{"type": "linear", "factor": 2.0}, {"rope_type": "default"}, None],
        "rope_parameters": [{"rope_type": "default", "rope_theta": 500.0}, {"rope_type": "yarn", "factor": 4.0}],
        "sliding_window": [16, 4096, None],
        "mlp_bias": [True, False],
        "attention_bias": [True],
        "tie_word_embeddings": [True],
        "hidden_act": ["gelu", "relu", "swish", "silu"],
        "partial_rotary_factor": [0.5, 1.0],
        "head_dim": [4, 8, 16],
        "num_key_value_heads": [1, 2, 4],
        "rms_norm_eps": [1e-3, 0.0],
        "rope_theta": [500.0, 1e6],
        "eos_token_id": [[2, 7], 7, None, -1],
        "quantization_config": [{"quant_method": "bitsandbytes", "load_in_4bit": True}],
        "model_type": ["mistral", "qwen2", "llama", "llava"],
        "vision_config": [{"hidden_act": "gelu"}, {"num_attention_heads": 4}],
        "logit_scale": [0.5],
        "final_logit_softcapping": [30.0],
        "residual_multiplier": [0.2],
        "pretraining_tp": [1, 2],
        "mm_vision_select_layer": [-1, -2, 0, 1],
        "mm_projector_type": ["linear", "identity", "mlp2x_gelu", "mlp3x_gelu"],
    }
    chosen = st.sampled_from(sorted(keys)).flatmap(
        lambda key: st.sampled_from(keys[key]).map(lambda value: {key: value})
    )
    return st.lists(chosen, min_size=1, max_size=2).map(
        lambda changes: original | {k: v for c in changes for k, v in c.items()}
    )


def damages(folder: Path) -> st.SearchStrategy[tuple[str, Damage]]:
    """What can be wrong with the sharded checkpoint in `folder`: a description, and what does it to a copy."""
    shards = sorted(path.name for path in folder.glob("*.safetensors"))

    def written(name: str, data: st.SearchStrategy[bytes]) -> st.SearchStrategy[tuple[str, Damage]]:
        return data.map(lambda data: (f"{name} = {data[:2000]!r}", lambda copy: _write(copy / name, data)))

    def settings(name: str) -> st.SearchStrategy[tuple[str, Damage]]:
        path = folder / name
        return written(name, damaged_text(json.loads(path.read_text()) if path.is_file() else {}))

    config = json.loads((folder / "config.json").read_text())
    # transformers is imported here, once, and not by every trial
    second_opinion.of_transformers(folder, second_opinion.request(GEOMETRY))
    return st.one_of(
        st.sampled_from(SETTINGS).flatmap(settings),
        written("config.json", config_keys(config).map(lambda value: json.dumps(value).encode())),
        st.sampled_from(shards).flatmap(lambda name: written(name, _damaged_header((folder / name).read_bytes()))),
        st.sampled_from(shards).flatmap(lambda name: written(name, damaged_bytes((folder / name).read_bytes()))),
        st.builds(
            _tensor,
            st.sampled_from(shards),
            st.sampled_from(STRANGE),
            st.sampled_from(["add", "rename", "drop", "half"]),
            st.integers(0, 60),
        ),
        st.builds(_kind, st.sampled_from([*dict.fromkeys(SETTINGS), *shards]), st.sampled_from(list(KINDS))),
    )


def torch_damages(folder: Path) -> st.SearchStrategy[tuple[str, Damage]]:
    """What can be wrong with the bytes of a pytorch_model.bin."""
    whole, name = (folder / "pytorch_model.bin").read_bytes(), "pytorch_model.bin"
    directory = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"PK\x05\x06")) - 4000
    ends = damaged_bytes(whole[directory:]).map(lambda end: whole[:directory] + end)
    starts = damaged_bytes(whole[:6000]).map(lambda start: start + whole[6000:])
    return st.one_of(ends, starts).map(
        lambda data: (f"{name}: {len(data)} bytes", lambda copy: _write(copy / name, data))
    )


@st.composite
def _damaged_header(draw: st.DrawFn, whole: bytes) -> bytes:
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    if draw(st.booleans()):
        name = draw(st.sampled_from(sorted(header)))  # few places, each as likely as another
        header[name] = draw(damaged_json(header[name]))
        text = json.dumps(header).encode("utf-8", "surrogatepass")
    else:
        text = draw(damaged_text(header))
    size = draw(st.sampled_from([len(text)] * 8 + [0, 2**63, 2**64 - 1, len(text) + 1]))
    return struct.pack("<Q", size) + text + whole[8 + length :]


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


def _tensor(shard: str, strange: str, how: str, which: int) -> tuple[str, Damage]:
    def damage(copy: Path) -> None:
        weights = load_file(copy / shard)
        name, new = sorted(weights)[which % len(weights)], strange.format(which % 5)
        if how == "add":
            weights[new] = torch.ones(8)
        elif how == "rename":
            weights[new] = weights.pop(name)
        elif how == "half":
            weights[name] = weights[name].half()
        else:
            del weights[name]
        save_file(weights, copy / shard)
        if how in ("add", "rename") and which % 2:  # half of the time the index knows
            index = copy / "model.safetensors.index.json"
            value = json.loads(index.read_text())
            value["weight_map"][new] = shard
            index.write_text(json.dumps(value))

    return f"{how} {strange} {which} in {shard}", damage


KINDS: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "pipe": lambda path: os.mkfifo(path),
    "dangling link": lambda path: path.symlink_to("../blobs/gone"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "empty": lambda path: path.touch(),
    "huge": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
}


def _kind(name: str, kind: str) -> tuple[str, Damage]:
    def damage(copy: Path) -> None:
        path = copy / name
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        KINDS[kind](path)

    return f"{name}: {kind}", damage


def run(folder: Path, damage: Damage, scratch: Path) -> str:
    """Read a damaged copy as a build does; Wrong when transformers makes something else of it."""
    copy = scratch / "checkpoint"
    shutil.copytree(folder, copy)
    damage(copy)
    recipe, tokenizer, checkpoint = read_model(read_recipe(BuildOptions(model=copy, out=scratch / "out")))
    g, ends = recipe.geometry, recipe.config.eos_token_ids or (tokenizer.eos_ids if tokenizer else ())
    asked = second_opinion.request(g)
    ours = second_opinion.of_model(ReferenceModel(g, checkpoint), asked)
    try:
        theirs = second_opinion.of_transformers(copy, asked)
        their_ends = second_opinion.end_tokens(copy)
    except ParityError as error:
        raise Wrong(f"accepted, but {error.found}") from error
    except Exception as error:
        raise Unjudged(f"transformers has no opinion: {type(error).__name__}: {error!s:.200}") from error
    for what in ("features", "logits"):
        expected, found = getattr(theirs, what), getattr(ours, what)
        if not np.isfinite(expected).all() and not np.isfinite(found).all():
            raise Unjudged("weights that are no numbers, which the build refuses when it writes them")
        if not np.allclose(
            expected, found, rtol=0, atol=10 * LIMITS[FP32].features * np.abs(expected).max(), equal_nan=True
        ):
            raise Wrong(f"accepted, and transformers' {what} differ by {np.abs(expected - found).max():.2g}")
    if their_ends is not None and set(their_ends) != set(ends):
        raise Wrong(f"accepted with the end tokens {ends}, transformers has {their_ends}")
    return "accepted, and transformers agrees"
