"""Which vision tower a checkpoint has: a folder, a published name, its own vision_config; and contradictions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engines.bundle.tensors import TOWER_PREFIX, expected_tensors
from engines.errors import ConfigError
from export.build import BuildOptions, build
from export.checkpoint.config import read_config
from export.checkpoint.tower import find_tower, require_blocks_of
from export.checkpoint.write_config import write_config
from tests.checkpoints import write_checkpoint
from tests.geometries import official, tiny

PUBLISHED = "openai/clip-vit-large-patch14-336"


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def numbers(folder: Path, **changes: object) -> dict:
    return json.loads((folder / "clip" / "config.json").read_text()) | changes


def test_vision_config_describes_the_tower(tmp_path):
    write_config(tmp_path / "a", tiny(), tower="someone/vit", inside=True)
    found = read_config(tmp_path / "a")
    assert found.geometry == tiny() and found.tower_folder is None and found.tower_blocks == 3 and not found.unknown


def test_its_keys_have_the_same_table(tmp_path):
    write_config(tmp_path, tiny(), tower="someone/vit", inside=True)
    vision = json.loads((tmp_path / "config.json").read_text())["vision_config"]
    edit(tmp_path / "config.json", vision_config=vision | {"new_key": 1, "projection_dim": 5, "attention_dropout": 0.1})
    assert read_config(tmp_path).unknown == ("vision_config.new_key",)
    edit(tmp_path / "config.json", vision_config=vision | {"model_type": "siglip_vision_model"})
    with pytest.raises(ConfigError, match="vision_config: model_type 'siglip_vision_model'"):
        read_config(tmp_path)
    edit(tmp_path / "config.json", vision_config=[1])
    with pytest.raises(ConfigError, match="vision_config: the whole object"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("num_attention_heads", 4), ("hidden_act", "gelu"), ("num_hidden_layers", 5), ("patch_size", 28)]
)
def test_vision_config_against_the_folder(tmp_path, key, value):
    """What no shape of a weight tells, too: heads, activation, blocks."""
    write_config(tmp_path, tiny())
    edit(tmp_path / "config.json", vision_config=numbers(tmp_path))
    assert read_config(tmp_path).geometry == tiny()
    edit(tmp_path / "config.json", vision_config=numbers(tmp_path, **{key: value}))
    with pytest.raises(ConfigError, match=f"vision_config: {key} is {value!r}") as caught:
        read_config(tmp_path)
    assert f"clip/config.json: {key} is {numbers(tmp_path)[key]!r}" in caught.value.found
    edit(tmp_path / "config.json", vision_config=None)  # the advice
    assert read_config(tmp_path).geometry == tiny()


def test_vision_config_against_a_published_tower(tmp_path):
    write_config(tmp_path, official(), tower=PUBLISHED)
    vision = {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
    }  # fmt: skip
    edit(
        tmp_path / "config.json", vision_config=vision
    )  # as transformers writes it: without CLIPVisionConfig's defaults
    assert read_config(tmp_path).geometry == official()
    edit(tmp_path / "config.json", vision_config=vision | {"hidden_size": 1152})
    with pytest.raises(
        ConfigError, match="hidden_size is 1152; the published clip-vit-large-patch14-336: hidden_size is 1024"
    ):
        read_config(tmp_path)  # fmt: skip


def test_the_config_of_a_whole_clip(tmp_path, weights):
    """As OpenAI's: every key of an old PretrainedConfig, and the older spelling beside the newer."""
    write_config(tmp_path, tiny())
    vision = numbers(tmp_path)
    old = json.loads((weights / "config.json").read_text())
    common = {key: old[key] for key in old if not key.startswith(("mm_", "rope", "token", "use_mm", "image", "extra"))}
    common = {key: value for key, value in common.items() if key not in ("rms_norm_eps", "max_position_embeddings")}
    common |= {"model_type": "clip_vision_model", "architectures": None, "hidden_act": "quick_gelu", "bos_token_id": 0}
    common = {
        key: value
        for key, value in common.items()
        if not key.startswith(("num_key", "tie_word", "attention_b", "pretrain"))
    }
    whole = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 768, "torch_dtype": "float32"}
    whole |= {"text_config": {"hidden_size": 8}, "logit_scale_init_value": 2.6592, "initializer_factor": 1.0}
    path = tmp_path / "clip" / "config.json"
    path.write_text(json.dumps(whole | {"vision_config": common | vision, "vision_config_dict": {"hidden_size": 16}}))
    found = read_config(tmp_path)
    assert found.geometry == tiny() and found.unknown == ()
    edit(path, vision_config_dict={"hidden_size": 32})
    with pytest.raises(ConfigError, match="hidden_size is 16 in vision_config and 32 in vision_config_dict"):
        read_config(tmp_path)


def test_more_blocks_than_the_config_has(tmp_path):
    """Counted from the end, the selected layer would be another."""
    tower = {name: shape for name, shape in expected_tensors(tiny()).items() if name.startswith(TOWER_PREFIX)}
    require_blocks_of(2, tower, tmp_path)
    require_blocks_of(3, tower, tmp_path)  # the last is not needed, and may be missing
    with pytest.raises(ConfigError, match="is 1, its weights have 2 blocks"):
        require_blocks_of(1, tower, tmp_path)
    folder = write_checkpoint(tmp_path / "model", tiny())
    edit(folder / "clip" / "config.json", num_hidden_layers=1)
    edit(folder / "config.json", mm_vision_select_layer=-1)
    with pytest.raises(ConfigError, match="is 1, its weights have 2 blocks"):
        build(BuildOptions(folder, tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("name", ["..", "/", ".", "../..", "a/..", "../../etc", "x" * 900, "x" * 300 + "/y"])
def test_names_that_are_none(tmp_path, name):
    """Neither what lies around the checkpoint nor an error of the file system."""
    folder = tmp_path / "models" / "model"
    write_config(folder, tiny())
    for place in (folder.parent, tmp_path):
        (place / "config.json").write_text("{}")
    edit(folder / "config.json", mm_vision_tower=name)
    assert find_tower(folder, name) is None
    with pytest.raises(ConfigError, match="mm_vision_tower") as caught:
        read_config(folder)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, ""])
def test_names_that_no_file_has(tmp_path, name):
    write_config(tmp_path, tiny())
    edit(tmp_path / "config.json", mm_vision_tower=name)
    with pytest.raises(ConfigError, match="mm_vision_tower is") as caught:
        read_config(tmp_path)
    assert len(str(caught.value)) < 500


def test_a_path_of_the_training_machine(tmp_path):
    write_config(tmp_path, tiny())
    for name in ("../checkpoints/clip", "/mnt/models/clip", "../../clip"):
        assert find_tower(tmp_path, name) == tmp_path / "clip"


def test_what_vision_config_leaves_out_is_a_default(tmp_path):
    """Of CLIPVisionConfig, as for transformers."""
    write_config(tmp_path, tiny())
    vision = numbers(tmp_path)
    del vision["patch_size"]
    edit(tmp_path / "config.json", vision_config=vision)
    with pytest.raises(ConfigError, match=r"patch_size is 32, for it is absent; .*patch_size is 14"):
        read_config(tmp_path)
    edit(tmp_path / "config.json", vision_config={})
    assert read_config(tmp_path).geometry == tiny()
