"""`config.json` -> Geometry: official values, defaults, extensions, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engines.bundle.manifest import PROMPT_TEMPLATE
from engines.errors import ConfigError
from export.checkpoint.config import read_config
from export.checkpoint.tower import find_tower
from export.checkpoint.write_config import write_config
from tests.geometries import official, tiny

EXTRA = {"zoom_ratio": "3", "lowres_size": "336", "highres_size": "1008", "threshold": "48", "warmup": "10"}
DECODER = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "mm_vision_tower": "clip",
    "mm_vision_select_layer": -2,
    "mm_projector_type": "mlp2x_gelu",
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 336,
    "patch_size": 14,
}
ABSENT = object()


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def edited(base: dict, changes: dict) -> dict:
    return {key: value for key, value in {**base, **changes}.items() if value is not ABSENT}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


def make(folder: Path, extra: object = None, tower: dict | None = None, **decoder: object) -> Path:
    """Write a checkpoint's settings: valid ones with changes; a dict `extra` is merged, another value stands alone."""
    settings = edited(EXTRA, extra or {}) if extra is None or isinstance(extra, dict) else extra
    write(folder / "config.json", edited({**DECODER, "extra": settings}, decoder))
    write(folder / "clip" / "config.json", edited(TOWER, tower or {}))
    return folder


def test_official_layout(weights: Path) -> None:
    config = read_config(weights)
    g = config.geometry
    assert (g.hidden, g.intermediate, g.layers, g.vocab) == (64, 176, 12, 512)
    assert (g.heads, g.kv_heads, g.head_dim) == (4, 4, 16)
    assert (g.rms_eps, g.rope_theta, g.context, g.projector_depth) == (1e-5, 10000.0, 2048, 2)
    assert (g.lowres, g.zoom, g.cells, g.start_layer, g.threshold) == (336, 3, 9, 8, 48)
    assert (g.attention_bias, g.tied_embeddings) == (False, False)
    assert g.image_mean == (0.48145466, 0.4578275, 0.40821073)
    assert g.image_std == (0.26862954, 0.26130258, 0.27577711)
    v = g.vision
    assert (v.hidden, v.intermediate, v.layers, v.heads, v.patch) == (32, 64, 3, 4, 14)
    assert (v.eps, v.activation) == (1e-5, "quick_gelu")
    assert (config.bos_token_id, config.eos_token_ids) == (1, ())
    assert config.prompt_template == PROMPT_TEMPLATE
    assert config.tower_folder == weights / "clip"


def test_defaults(folder: Path) -> None:
    make(folder, dict.fromkeys(("lowres_size", "highres_size", "threshold", "warmup"), ABSENT))
    config = read_config(folder)
    g = config.geometry
    assert (g.lowres, g.highres, g.threshold, g.kv_heads, g.head_dim) == (336, 1008, 64, 4, 16)
    assert (g.rms_eps, g.rope_theta, g.context, g.cells, g.start_layer) == (1e-6, 10000.0, 2048, 9, 8)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))


def test_extra_as_training_flag(folder: Path) -> None:
    make(folder, "zoom_ratio:3#warmup:10#lowres_size:336#highres_size:1008#threshold:48")
    assert read_config(folder).geometry.threshold == 48


@pytest.mark.parametrize("threshold", ["-7", "256", 1000])
def test_any_threshold(folder: Path, threshold: object) -> None:
    make(folder, {"threshold": threshold})
    assert read_config(folder).geometry.threshold == int(threshold)


def test_null_is_the_default(folder: Path) -> None:
    make(folder)
    plain = read_config(folder)
    make(folder, attention_bias=None, mm_use_im_start_end=None, image_aspect_ratio=None, head_dim=None, hidden_act=None)
    assert read_config(folder) == plain


def test_own_extra_keys(folder: Path) -> None:
    template = "<image> {prompt}"
    make(folder, {"start_layer": 0, "cells": "24", "prompt_template": template, "threshold": -1})
    config = read_config(folder)
    assert (config.geometry.start_layer, config.geometry.cells, config.geometry.threshold) == (0, 24, -1)
    assert config.prompt_template == template


def test_conversations(folder: Path) -> None:
    """A template of one's own has the turns and the system text that its checkpoint names."""
    own = {"prompt_template": "Look. <image>Q: {prompt} A:", "turn_template": " {answer}\nQ: {prompt} A:"}
    config = read_config(make(folder, {**own, "system_prompt": "Look."}))
    assert (config.turn_template, config.system_prompt) == (own["turn_template"], "Look.")
    config = read_config(make(folder, own))
    assert (config.turn_template, config.system_prompt) == (own["turn_template"], None)


@pytest.mark.parametrize(("eos", "ids"), [(None, ()), (2, (2,)), ([2, 7], (2, 7))])
def test_eos(folder: Path, eos: object, ids: tuple[int, ...]) -> None:
    assert read_config(make(folder, eos_token_id=eos)).eos_token_ids == ids


@pytest.mark.parametrize(("select", "blocks"), [(-1, 4), (-2, 3), (-5, 0), (0, 0), (4, 4), (2, 2)])
def test_selected_vision_layer(folder: Path, select: int, blocks: int) -> None:
    assert read_config(make(folder, mm_vision_select_layer=select)).geometry.vision.layers == blocks


def test_decoder_variants(folder: Path) -> None:
    make(
        folder,
        num_key_value_heads=2,
        head_dim=16,
        attention_bias=True,
        tie_word_embeddings=True,
        mm_projector_type="linear",
        max_position_embeddings=4096,
        tokenizer_model_max_length=1024,
    )
    g = read_config(folder).geometry
    assert (g.kv_heads, g.attention_bias, g.tied_embeddings, g.projector_depth, g.context) == (2, True, True, 1, 1024)


def test_small_tower(folder: Path) -> None:
    make(folder, {"lowres_size": "224", "highres_size": ABSENT}, tower={"image_size": 224, "hidden_act": "gelu"})
    g = read_config(folder).geometry
    assert (g.lowres, g.highres, g.grid, g.vision.activation) == (224, 672, 16, "gelu")


def test_tower_inside_a_whole_clip(folder: Path) -> None:
    make(folder)
    write(folder / "clip" / "config.json", {"hidden_size": 1, "vision_config": TOWER})
    write(folder / "clip" / "preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1]})
    g = read_config(folder).geometry
    assert (g.vision.hidden, g.image_mean, g.image_std) == (32, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("place", ["model/openai/vit", "model/vit", "openai/vit", "vit"])
def test_tower_search(folder: Path, place: str) -> None:
    tower = folder.parent / place
    write(tower / "config.json", TOWER)
    make(folder)
    assert find_tower(folder, "openai/vit") == tower


def test_tower_by_absolute_path(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "vit" / "config.json", TOWER)
    assert find_tower(folder, str(tmp_path / "elsewhere" / "vit")) == tmp_path / "elsewhere" / "vit"
    assert find_tower(make(folder), str(tmp_path / "training-machine" / "clip")) == folder / "clip"


def test_tower_in_the_hub_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    repository = cache / "models--someone--vit"
    write(repository / "snapshots" / "abc" / "config.json", TOWER)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    make(folder, mm_vision_tower="someone/vit")
    assert read_config(folder).tower_folder == repository / "snapshots" / "abc"


@pytest.mark.parametrize(("name", "size"), [("clip-vit-large-patch14-336", 336), ("clip-vit-large-patch14", 224)])
def test_published_tower(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "empty"))
    make(folder, {"lowres_size": str(size), "highres_size": ABSENT}, mm_vision_tower=f"openai/{name}")
    config = read_config(folder)
    v = config.geometry.vision
    assert (v.hidden, v.intermediate, v.layers, v.heads, v.patch, v.eps) == (1024, 4096, 23, 16, 14, 1e-5)
    assert v.activation == "quick_gelu"
    assert config.tower_folder is None


EXTRA_ERRORS = [
    ({"zoom_ratio": ABSENT}, "not a FlexAttention checkpoint"),
    ("threshold:48", "not a FlexAttention checkpoint"),
    ("zoom_ratio", "key:value"),
    (7, "extra is 7"),
    ("zoom_ratio:3#zoom_ratio:4", "twice"),
    ({"zoom_ratio": "three"}, "extra.zoom_ratio is 'three'"),
    ({"zoom_ratio": "0"}, "extra.zoom_ratio is 0"),
    ({"zoom_ratio": True}, "extra.zoom_ratio is True"),
    ({"threshold": "4.5"}, "extra.threshold is '4.5'"),
    ({"highres_size": "1000"}, "extra.highres_size is 1000"),
    ({"lowres_size": "224", "highres_size": ABSENT}, "image_size 336"),
    ({"start_layer": "11"}, "at most 10"),
    ({"start_layer": "-1"}, "extra.start_layer is -1"),
    ({"cells": "25"}, "at most 24"),
    ({"prompt_template": "{prompt}"}, "exactly one <image>"),
    ({"turn_template": "{prompt} {answer}"}, "exactly one {answer}, then exactly one {prompt}"),
    ({"turn_template": "{answer}"}, "exactly one {prompt}"),
    ({"turn_template": "{answer}{answer}{prompt}"}, "exactly one {answer}"),
    ({"turn_template": "{answer}<image>{prompt}"}, "no <image>"),
    ({"turn_template": 3}, "extra.turn_template is 3"),
    ({"turn_template": "x" * 10_000 + "{answer}{prompt}"}, "at most 10000"),
    ({"system_prompt": "Be brief."}, "there once, before <image>"),  # the official one has no such part
    ({"system_prompt": ""}, "extra.system_prompt is ''"),
    ({"system_prompt": ["A chat"]}, r"extra.system_prompt is \['A chat'\]"),
    ({"system_prompt": "a"}, "there once"),
    ({"system_prompt": "USER: <image>"}, "before <image>"),
    ({"system_prompt": "b", "prompt_template": "<image>b{prompt}"}, "before <image> and {prompt}"),
    ({"system_prompt": "{", "prompt_template": "{prompt}<image>"}, "before <image> and {prompt}"),
    ({"special": "random"}, "extra.special"),
]


@pytest.mark.parametrize(("extra", "message"), EXTRA_ERRORS)
def test_bad_extra(folder: Path, extra: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(make(folder, extra))


DECODER_ERRORS = [
    ({"extra": ABSENT}, "not a FlexAttention checkpoint"),
    ({"hidden_size": ABSENT}, "hidden_size is missing"),
    ({"hidden_size": "64"}, "hidden_size is '64'"),
    ({"hidden_size": 63}, "hidden_size = num_attention_heads"),
    ({"head_dim": 32}, "head_dim 32"),
    ({"num_attention_heads": 64}, "even number"),
    ({"num_key_value_heads": 3}, "divisor of num_attention_heads 4"),
    ({"num_hidden_layers": 9}, "extra.start_layer is 8"),
    ({"mm_hidden_size": 31}, "mm_hidden_size is 31"),
    ({"max_position_embeddings": 576}, "576 image tokens"),
    ({"mm_vision_select_layer": 5}, "from -5 to 4"),
    ({"mm_vision_select_layer": -6}, "from -5 to 4"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ({"hidden_act": "gelu"}, "silu"),
    ({"image_aspect_ratio": "anyres"}, "'anyres' is not supported"),
    ({"mm_vision_select_feature": "cls_patch"}, "class token"),
    ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
    ({"mm_projector_type": "identity"}, "linear, or mlpNx_gelu"),
    ({"mm_projector_type": "mlp1x_gelu"}, "N of at least 2"),
    ({"mm_vision_tower": "/nowhere/such-tower"}, "such-tower"),
]


@pytest.mark.parametrize(("changes", "message"), DECODER_ERRORS)
def test_bad_decoder(folder: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(make(folder, **changes))
    assert "config.json" in str(caught.value)


TOWER_ERRORS = [
    ({"hidden_act": "relu"}, "quick_gelu or gelu"),
    ({"num_channels": 1}, "RGB"),
    ({"num_attention_heads": 5}, "divisor of hidden_size 32"),
    ({"patch_size": 13}, "divisor of image_size 336"),
    ({"hidden_size": 0}, "hidden_size is 0"),
    ({"vision_config": [1]}, "whole object"),
]


@pytest.mark.parametrize(("changes", "message"), TOWER_ERRORS)
def test_bad_tower(folder: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(make(folder, tower=changes))


def test_unreadable_files(folder: Path) -> None:
    with pytest.raises(ConfigError, match="is missing"):
        read_config(folder)
    make(folder)
    (folder / "clip" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is no JSON"):
        read_config(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="a JSON object"):
        read_config(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is no JSON"):
        read_config(folder)


@pytest.mark.parametrize(
    ("g", "options"),
    [
        (tiny(), {}),
        (tiny(kv_heads=2, projector_depth=1, attention_bias=True, tied_embeddings=True), {"spare_blocks": 0}),
        (tiny(image_mean=(0.5, 0.25, 0.75), image_std=(1.0, 0.5, 0.25)), {"prompt_template": "<image> {prompt}"}),
        (tiny(), {"prompt_template": "S <image>{prompt}", "turn_template": "{answer}|{prompt}", "system_prompt": "S"}),
        (official(threshold=-1), {"tower": "openai/clip-vit-large-patch14-336"}),
    ],
    ids=["tiny", "variants", "other pixels", "turns", "published tower"],
)
def test_what_is_written_reads_back(folder: Path, monkeypatch: pytest.MonkeyPatch, g, options) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "empty"))
    write_config(folder, g, **options, eos_token_id=7)
    config = read_config(folder)
    assert config.geometry == g and config.eos_token_ids == (7,)
    assert config.prompt_template == options.get("prompt_template", PROMPT_TEMPLATE)
    assert config.turn_template == options.get("turn_template")
    assert config.system_prompt == options.get("system_prompt")
    assert config.tower_folder == (None if "tower" in options else folder / "clip")
