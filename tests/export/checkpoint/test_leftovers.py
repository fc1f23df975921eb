"""What a bundle leaves out: each tensor proven not to matter, or the build stops and names it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.bundle.tensors import TOWER_PREFIX, expected_tensors
from engines.errors import CheckpointError
from export.checkpoint.config import ModelConfig, read_config
from export.checkpoint.folder import Checkpoint
from export.checkpoint.leftovers import dropped_tensors, require_depth
from export.checkpoint.packed import open_checkpoint
from tests.checkpoints import write_checkpoint
from tests.conftest import once
from tests.geometries import official, tiny

G = tiny()
LAYER = "model.layers.2."
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
POSITIONS = TOWER_PREFIX + "vision_model.embeddings.position_ids"
FREQUENCIES = f"{LAYER}self_attn.rotary_emb.inv_freq"


@pytest.fixture
def source(shared) -> Path:
    return once(shared / "leftovers-source", lambda folder: write_checkpoint(folder, G))


@pytest.fixture
def opened(source, tmp_path):
    """opened(tensors, removed=(), **geometry) -> the checkpoint with these tensors more and those less, as a build
    opens it, and what it drops."""

    def get(more: dict[str, torch.Tensor], removed: tuple[str, ...] = (), **changes: object) -> dict[str, str]:
        tensors = {
            name: value for name, value in load_file(source / "model.safetensors").items() if name not in removed
        }
        save_file({**tensors, **more}, tmp_path / "model.safetensors")
        config = read_config(source)
        config = replace(config, geometry=replace(config.geometry, **changes), tower_folder=None)
        return dropped_tensors(open_checkpoint(tmp_path, config), config.geometry)

    return get


def frequencies(theta: float = G.rope_theta) -> torch.Tensor:
    """As transformers computes them."""
    return 1.0 / (theta ** (torch.arange(0, G.head_dim, 2).float() / G.head_dim))


def test_an_ordinary_checkpoint_drops_nothing(opened):
    assert opened({}) == {}


def test_the_public_checkpoint_is_taken(source, tmp_path):
    """Its files and names: all layers have hi-res projections, the tower is inside, with every block."""
    blocks = G.vision.layers + 1
    whole = {**load_file(source / "model.safetensors")}
    for name in [name for name in whole if ".encoder.layers.0." in name]:
        whole[name.replace(".layers.0.", f".layers.{blocks - 1}.")] = whole[name].clone()
    for layer in range(G.layers):
        for part in ("k_proj_hd", "v_proj_hd"):
            whole.setdefault(f"model.layers.{layer}.self_attn.{part}.weight", torch.ones(32, 32))
    for part in ("weight", "bias"):
        whole[f"{TOWER_PREFIX}vision_model.post_layernorm.{part}"] = torch.ones(16)
    files = {name: f"model-0000{index % 4 + 1}-of-00004.safetensors" for index, name in enumerate(sorted(whole))}
    for file in set(files.values()):
        save_file({name: whole[name] for name in files if files[name] == file}, tmp_path / file, {"format": "pt"})
    index = {"metadata": {"total_size": 16269418496}, "weight_map": files}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("generation_config.json", "special_tokens_map.json", "tokenizer.model", "zero_to_fp32.py"):
        (tmp_path / name).write_text("{}")
    config = replace(read_config(source), tower_folder=None)
    dropped = dropped_tensors(open_checkpoint(tmp_path, config), config.geometry)
    assert len(dropped) == 2 * (G.start_layer + 1) + 16 + 2 == len(whole) - len(expected_tensors(G))
    assert {reason.split(" ")[0] for reason in dropped.values()} == {"hi-res", "vision", "norm"}


USED = [
    *(f"{LAYER}self_attn.{part}_proj.bias" for part in "qkvo"),
    *(f"{LAYER}mlp.{part}_proj.bias" for part in ("gate", "up", "down")),
    f"{LAYER}self_attn.k_proj_hd.bias",
    f"{LAYER}self_attn.q_norm.weight",
    f"{LAYER}self_attn.q_proj.weight_scale",
    f"{LAYER}post_feedforward_layernorm.weight",
    f"{LAYER}self_attn.rotary_emb.cos_cached",
    "model.layers.02.self_attn.q_proj.weight",
    "model.norm.bias",
    "model.image_newline",
    "model.embed_positions.weight",
    "model.mm_projector.1.weight",
    "model.vision_resampler.x",
    "lm_head.bias",
    f"{TOWER_PREFIX}vision_model.embeddings.patch_embedding.bias",
    f"{TOWER_PREFIX}vision_model.encoder.layers.0.self_attn.q_norm.weight",
    f"{TOWER_PREFIX}vision_model.head.weight",
    "model.vision_tower.vision_tower_2.x",
]


@pytest.mark.parametrize("name", USED)
def test_what_the_model_would_use_stops_the_build(opened, name):
    with pytest.raises(CheckpointError, match="1 tensors have no place in the bundle") as caught:
        opened({name: torch.ones(32)})
    assert name in caught.value.found


def test_all_of_it_is_counted_by_its_meaning(opened):
    biases = {
        f"model.layers.{i}.self_attn.{part}_proj.bias": torch.ones(32) for i in range(G.layers) for part in "qkvo"
    }
    with pytest.raises(CheckpointError) as caught:
        opened({**biases, "model.image_newline": torch.ones(32)})
    for text in (
        "21 tensors",
        "20 x a bias that is not zero",
        "and 10 more",
        "1 x a part that this model does not have",
    ):
        assert text in caught.value.found
    assert '"attention_bias": true' in caught.value.fix
    with pytest.raises(CheckpointError) as caught:
        opened({f"{LAYER}mlp.up_proj.bias": torch.ones(48)})
    assert "attention_bias" not in caught.value.fix  # it changes nothing of an MLP


def test_biases_of_zeros_add_nothing(opened):
    """Some converters and packers write them."""
    names = [f"{LAYER}self_attn.q_proj.bias", f"{LAYER}mlp.up_proj.bias", "lm_head.bias"]
    assert opened({name: torch.zeros(4).half() for name in names}) == dict.fromkeys(
        sorted(names), "bias of zeros: adds nothing"
    )
    with pytest.raises(CheckpointError, match="2 tensors"):
        opened({names[0]: torch.full((4,), float("nan")), names[1]: torch.zeros(2, 2)})  # one is no vector


def test_what_runs_after_the_selected_layer_is_dropped(opened):
    names = {
        f"{TOWER_PREFIX}vision_model.encoder.layers.2.mlp.fc1.bias": "vision block after the selected layer",
        f"{TOWER_PREFIX}vision_model.post_layernorm.weight": "norm after the last vision block",
        "model.layers.1.self_attn.k_proj_hd.weight": "hi-res projection of a layer that reads no pages",
        "model.layers.0.self_attn.v_proj_hd.bias": "hi-res projection of a layer that reads no pages",
        "optimizer.state.x": "outside the model",
        "text_model.x": "outside the model",
    }
    dropped = opened({name: torch.ones(2) for name in names})
    assert set(dropped) == set(names) and all(dropped[name].startswith(reason) for name, reason in names.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [FREQUENCIES, "model.rotary_emb.inv_freq"])
def test_rotary_tables_are_compared(opened, dtype, name):
    assert opened({name: frequencies().to(dtype)}) == {name: "constant table, equal to what is computed instead"}
    for other in (frequencies(2 * G.rope_theta), frequencies() / 2, frequencies()[:-1].clone(), frequencies()[None]):
        with pytest.raises(CheckpointError, match=r"differs from what config.json implies \(rope_theta 10000\)"):
            opened({name: other.to(dtype)})


def test_a_rotary_table_of_another_length_is_not_read(opened):
    with pytest.raises(CheckpointError, match="rope_theta"):
        opened({FREQUENCIES: torch.ones(1 << 20)})


def test_positions_are_compared(opened):
    right = torch.arange(G.image_tokens + 1)
    assert set(opened({POSITIONS: right[None]})) == {POSITIONS}
    for wrong in (right.flip(0).contiguous(), right[:-1].clone(), right.to(torch.bfloat16) + 1, torch.zeros(1 << 20)):
        with pytest.raises(CheckpointError, match="a table that differs"):
            opened({POSITIONS: wrong})


def test_a_tied_head_is_compared(opened, source):
    embedding = load_file(source / "model.safetensors")[EMBEDDING]
    said = {HEAD: f"equal to {EMBEDDING}, with which it is shared"}
    assert opened({HEAD: embedding}, tied_embeddings=True) == said
    assert opened({HEAD: embedding.double()}, tied_embeddings=True) == said
    assert opened({}, (HEAD,), tied_embeddings=True) == {}
    last = embedding.clone()
    last[-1, -1] += 1
    for other in (last, embedding[:-1].clone(), embedding.half()):
        with pytest.raises(CheckpointError, match=r"an output layer that differs from model\.embed_tokens") as caught:
            opened({HEAD: other}, tied_embeddings=True)
        assert '"tie_word_embeddings": false' in caught.value.fix


def test_large_heads_are_compared_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("export.checkpoint.leftovers._PIECE", 70)  # two rows of 32
    config = ModelConfig(tiny(tied_embeddings=True), 1, (2,), "<image>{prompt}", None)
    tensors = {name: torch.rand(shape) for name, shape in expected_tensors(config.geometry).items()}
    for row in (None, 0, 31, 62, 63):
        head = tensors[EMBEDDING].clone()
        if row is not None:
            head[row, 31] += 1
        save_file({**tensors, HEAD: head}, tmp_path / "model.safetensors")
        if row is None:
            open_checkpoint(tmp_path, config)
        else:
            with pytest.raises(CheckpointError, match="output layer that differs"):
                open_checkpoint(tmp_path, config)


def test_a_head_that_is_missing_is_told_for_what_it_is(opened):
    with pytest.raises(CheckpointError, match=r"lm_head.weight: missing[\s\S]*tie_word_embeddings"):
        opened({}, (HEAD,))


@pytest.mark.parametrize("layers", [3, 4, 6, 10**12])
def test_layers_that_config_and_weights_disagree_on(opened, layers):
    with pytest.raises(CheckpointError, match=r"the weights end with model.layers.4[\s\S]*by config.json"):
        opened({}, layers=layers)


@pytest.mark.parametrize("changes", [{"projector_depth": 10**12}, {"vision": replace(G.vision, layers=10**12)}])
def test_absurd_depths_are_refused_at_once(opened, changes):
    with pytest.raises(CheckpointError, match=r"by config\.json"):
        opened({}, **changes)


def test_weights_without_layers(tmp_path):
    save_file({"transformer.h.0.w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"the weights have no model.layers.0"):
        require_depth(Checkpoint.open(tmp_path), official())


def test_placeholders_of_zero_are_named(opened):
    with pytest.raises(CheckpointError, match=r"1 tensors are empty[\s\S]*zero_to_fp32"):
        opened({"model.norm.weight": torch.empty(0)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_two_towers(source, tmp_path, dtype):
    """One inside, one in the folder that config.json names: official code loads the second."""
    clip = tmp_path / "clip"
    clip.mkdir()
    tensors = load_file(source / "model.safetensors")
    tower = {name.removeprefix(TOWER_PREFIX): value for name, value in tensors.items() if name.startswith(TOWER_PREFIX)}
    save_file({**tensors, **{TOWER_PREFIX + n: v.to(dtype) for n, v in tower.items()}}, tmp_path / "model.safetensors")
    save_file(tower, clip / "model.safetensors")
    config = replace(read_config(source), tower_folder=clip)
    why = "file not read: the checkpoint has a vision tower of its own"
    assert dropped_tensors(open_checkpoint(tmp_path, config), G) == {"clip/model.safetensors": why}
    tower["vision_model.encoder.layers.1.mlp.fc2.bias"] += 1
    save_file(tower, clip / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"two vision towers that differ, first in .*layers.1.mlp.fc2.bias"):
        open_checkpoint(tmp_path, config)
