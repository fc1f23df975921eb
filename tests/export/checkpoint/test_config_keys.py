"""Every key of a settings file is used, irrelevant, neutral or refused; none that transformers writes is unknown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from engines.errors import ConfigError
from export.checkpoint import config_keys
from export.checkpoint.config import ConfigJson, read_config
from export.checkpoint.config_keys import CLIP, DECODER, EXTRA, GENERATION, PREPROCESSOR, TOKENIZER, TOWER, Keys
from export.checkpoint.tower import Pixels, TowerConfig
from export.checkpoint.write_config import write_config
from tests.geometries import tiny

TABLES = {name: table for name, table in vars(config_keys).items() if isinstance(table, Keys)}


def changed(folder: Path, name: str = "config.json", **changes: object) -> Path:
    """The folder, with keys of one of its settings files changed."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(settings | changes))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_config(tmp_path / "model", tiny())
    return tmp_path / "model"


@pytest.mark.parametrize("name", TABLES)
def test_a_key_is_in_one_part_of_its_table(name):
    table = TABLES[name]
    parts = [set(table.used), set(table.irrelevant), set(table.neutral)]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert all(table.irrelevant.values()) and all(each.expected for each in table.neutral.values())


def test_what_is_read_is_called_used():
    assert set(ConfigJson.model_fields) <= DECODER.used
    assert set(TowerConfig.model_fields) == TOWER.used
    assert set(Pixels.model_fields) == PREPROCESSOR.used


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, dict]:
    """Every settings file that transformers writes for the models in question."""
    pytest.importorskip("transformers")
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.generation.configuration_utils import GenerationConfig
    from transformers.models.clip.configuration_clip import CLIPConfig, CLIPVisionConfig
    from transformers.models.clip.image_processing_clip import CLIPImageProcessor
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llava.configuration_llava import LlavaConfig

    made = tmp_path_factory.mktemp("saved")
    files = {}
    kinds = (PreTrainedConfig, LlamaConfig, LlavaConfig, CLIPConfig, CLIPVisionConfig, CLIPImageProcessor)
    for kind in (*kinds, GenerationConfig):
        kind().save_pretrained(made / kind.__name__)
        (written,) = (made / kind.__name__).glob("*.json")
        # What is written leaves out some defaults, which older versions wrote.
        files[kind.__name__] = {**kind().to_dict(), **json.loads(written.read_text())}
    return files


@pytest.mark.parametrize(
    ("kind", "table"),
    [
        ("PreTrainedConfig", DECODER),
        ("LlamaConfig", DECODER),
        ("LlavaConfig", DECODER),
        ("CLIPVisionConfig", TOWER),
        ("CLIPConfig", CLIP),
        ("CLIPImageProcessor", PREPROCESSOR),
        ("GenerationConfig", GENERATION),
    ],
)
def test_no_key_of_transformers_is_unknown(saved, kind, table):
    """Null or not: any of them may have a value in somebody's file."""
    keys = set(saved[kind])
    assert len(keys) > 8 and table.unknown(dict.fromkeys(keys, 1)) == []
    nested = {"text_config": DECODER, "vision_config": TOWER}
    for name in keys & {*nested} if kind == "LlavaConfig" else ():
        assert nested[name].unknown(dict.fromkeys(saved[kind][name], 1)) == []


@pytest.mark.parametrize(
    ("kind", "table"), [("LlamaConfig", DECODER), ("CLIPVisionConfig", TOWER), ("CLIPImageProcessor", PREPROCESSOR)]
)
def test_what_transformers_writes_by_default_is_neutral(saved, kind, table):
    assert table.refused(saved[kind]) == []


def test_a_llama_config_of_transformers_5(folder, saved):
    """With LLaVA's and FlexAttention's keys beside it, which transformers keeps."""
    from transformers.models.llama.configuration_llama import LlamaConfig

    given = json.loads((folder / "config.json").read_text())
    LlamaConfig(**given).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    assert "rope_theta" not in written and written["rope_parameters"]["rope_theta"] == 10000.0
    found = read_config(folder)
    assert found.geometry == tiny() and found.unknown == () and found.notes == ()
    changed(folder, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    assert read_config(folder).geometry.rope_theta == 500000.0


def test_the_official_configs(weights):
    """As the official code saved it, with transformers 4.37: all of PretrainedConfig."""
    found = read_config(weights)
    assert found.unknown == () and found.notes == ()


def test_unknown_keys_are_listed(folder):
    changed(folder, mm_new_feature=True, other=1, nothing=None)
    changed(folder / "clip", num_new=3)
    changed(folder / "clip", "preprocessor_config.json", do_new=True)
    changed(folder, "generation_config.json", new_knob=1)
    assert read_config(folder).unknown == (
        *("mm_new_feature", "other", "clip/config.json: num_new", "clip/preprocessor_config.json: do_new"),
        "generation_config.json: new_knob",
    )


def test_more_unknown_keys_than_any_model_has(folder):
    with pytest.raises(ConfigError, match="1000 keys are unknown"):
        read_config(changed(folder, **{f"key{n}": n for n in range(1000)}))


REFUSED = [
    {"mlp_bias": True},
    {"qkv_bias": True},
    {"partial_rotary_factor": 0.5},
    {"qk_norm": True},
    {"final_logit_softcapping": 30.0},
    {"logit_scale": 0.0625},
    {"residual_multiplier": 0.22},
    {"attention_multiplier": 0.0078125},
    {"embedding_multiplier": 12},
    {"num_local_experts": 8},
    {"kv_lora_rank": 512},
    {"attention_chunk_size": 64},
    {"alibi": True},
    {"no_rope_layers": [1, 1, 1, 0, 1]},
    {"hidden_act": "gelu"},
    {"is_encoder_decoder": True},
    {"pruned_heads": {"1": [0]}},
    {"auto_map": {"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"}},
    {"model_type": "llava_mistral"},
    {"model_type": "qwen2"},
    {"architectures": ["LlavaQwenForCausalLM"]},
    {"image_aspect_ratio": "anyres"},
    {"mm_patch_merge_type": "spatial_unpad"},
    {"mm_resampler_type": "perceiver"},
    {"use_mm_proj": False},
    {"s2": True},
    {"projector_hidden_act": "relu"},
    {"multimodal_projector_bias": False},
    {"vision_feature_layer": -1},
    {"vision_feature_select_strategy": "full"},
    {"layer_types": ["full_attention", "linear_attention"]},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    {"text_config": {"mlp_bias": True}},
    {"text_config": {"rms_norm_eps": 1e-6}},
    {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}},
    {"text_config": 7},
]


@pytest.mark.parametrize("changes", REFUSED, ids=str)
def test_what_changes_the_computation_is_refused_by_name(folder, changes):
    read_config(folder)
    (key,) = changes
    with pytest.raises(ConfigError, match=key) as caught:
        read_config(changed(folder, **changes))
    assert caught.value.expected


HARMLESS = [
    {"mlp_bias": False, "qk_norm": None, "num_experts": 0, "logit_scale": 1, "partial_rotary_factor": 1.0},
    {"attention_dropout": 0.1, "use_cache": False, "pretraining_tp": 2, "dtype": "bfloat16", "torch_dtype": "float32"},
    {"image_grid_pinpoints": [[336, 672]], "unfreeze_mm_vision_tower": True, "mm_use_im_patch_token": True},
    {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 3},
    {"sliding_window": 160},  # the context
    {"sliding_window": 8, "use_sliding_window": False},
    {"sliding_window": 8, "layer_types": ["full_attention"] * 5},
    {"sliding_window": 4096, "layer_types": ["full_attention", "sliding_attention"]},
    {"text_config": {"hidden_size": 32, "rope_theta": 10000.0, "mlp_bias": False, "head_dim": 8}},
    {"text_config": {}, "vision_config": None},
    {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "image_token_index": 32000},
    {"model_type": "llava", "auto_map": None, "architectures": ["LlamaForCausalLM"]},
    {"quantization_config": None, "compression_config": {}},
]


@pytest.mark.parametrize("changes", HARMLESS, ids=lambda changes: ",".join(changes))
def test_what_does_not_is_taken(folder, changes):
    plain = read_config(folder)
    assert read_config(changed(folder, **changes)) == plain


def test_a_sliding_window_and_the_advice(folder):
    with pytest.raises(ConfigError, match="sliding_window 100 is not supported") as caught:
        read_config(changed(folder, sliding_window=100))
    assert "make max_position_embeddings 100" in caught.value.fix
    assert read_config(changed(folder, max_position_embeddings=100)).geometry.context == 100
    with pytest.raises(ConfigError, match="sliding_window 64 ") as caught:  # 64 image tokens: no context at all
        read_config(changed(folder, sliding_window=64))
    assert "max_position_embeddings" not in caught.value.fix


LINEAR = {"type": "linear", "factor": 4.0}
ROPES = [
    ({"rope_theta": 5e5}, 5e5),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
    ({"rope_parameters": {"rope_theta": 5e5}}, 5e5),
    ({"rope_parameters": {"rope_theta": 500000, "partial_rotary_factor": 1.0, "factor": 1.0}}, 5e5),
    ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
    ({"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
    ({"rope_theta": 5e5, "rope_scaling": None, "rope_parameters": {"type": "default"}}, 5e5),
    ({"rope_theta": None, "rope_scaling": {}, "rope_parameters": None}, 1e4),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 10000.0 and rope_para"),
    ({"rope_scaling": {"rope_theta": 1e4}, "rope_parameters": {"rope_theta": 5e5}}, "rope_scaling.rope_theta"),
    *(
        ({key: {name: kind, "factor": 4.0, "rope_theta": 1e4}}, f"{key} with {name} '{kind}'")
        for key in ("rope_scaling", "rope_parameters")
        for name in ("type", "rope_type")
        for kind in ("linear", "dynamic", "yarn", "llama3", "longrope", "su", "proportional")
    ),
    ({"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "scaling with type"),
    ({"rope_parameters": {"rope_type": "default", "type": "linear"}}, "rope_parameters with type 'linear'"),
    ({"rope_parameters": {"rope_type": "default", "factor": 4.0}}, "rope_parameters with factor 4.0"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "with partial_rotary_factor 0.5"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "with full_attention"),
    ({"rope_parameters": "default"}, "rope_parameters: the whole object is 'default'"),
    ({"rope_scaling": 2.0}, "rope_scaling: the whole object is 2.0"),
    ({"rope_scaling": [LINEAR]}, "rope_scaling: the whole object"),
    ({"rope_parameters": {"rope_theta": "5e5"}}, "rope_theta is '5e5'"),
    ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "result"), ROPES, ids=str)
def test_every_spelling_of_rotary_positions(folder, changes, result):
    settings = json.loads((folder / "config.json").read_text())
    del settings["rope_theta"]
    (folder / "config.json").write_text(json.dumps(settings))
    if isinstance(result, str):
        with pytest.raises(ConfigError, match=result):
            read_config(changed(folder, **changes))
    else:
        assert read_config(changed(folder, **changes)).geometry.rope_theta == result


@pytest.mark.parametrize("key", ["treshold", "start_layers", "attention", "hd_layers"])
def test_an_unknown_key_of_extra_is_refused(folder, key):
    extra = json.loads((folder / "config.json").read_text())["extra"]
    with pytest.raises(ConfigError, match=f"extra.{key}: unknown") as caught:
        read_config(changed(folder, extra=extra | {key: "48"}))
    assert "threshold" in caught.value.expected and "start_layer" in caught.value.expected
    assert not EXTRA.unknown({f"extra.{each}": 1 for each in extra})


def test_the_layout_of_transformers_own_llava(folder, saved):
    settings = saved["LlavaConfig"] | {"extra": {"zoom_ratio": "3"}, "mm_vision_tower": "clip"}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="hidden_size is missing, and there is a text_config") as caught:
        read_config(folder)
    assert "official" in caught.value.fix


TOWERS = [
    {"model_type": "siglip_vision_model"},
    {"architectures": ["SiglipVisionModel"]},
    {"hidden_act": "relu"},
    {"attention_bias": False},
    {"num_channels": 1},
]


PREPROCESSORS = [
    {"do_normalize": False},
    {"do_rescale": False},
    {"do_resize": False},
    {"rescale_factor": 1 / 127.5},
    {"resample": 2},
    {"do_pad": True},
    {"image_std": [0.3, 0.3, 0.0]},
    {"image_mean": [123.7, 116.3, 103.5]},
    {"image_mean": [0.5]},
]


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        *(("clip/config.json", changes) for changes in TOWERS),
        *(("clip/preprocessor_config.json", changes) for changes in PREPROCESSORS),
    ],
    ids=str,
)
def test_towers_of_another_kind_and_pixels_prepared_in_another_way(folder, file, changes):
    (key,) = changes
    changed(folder, file, **changes)
    with pytest.raises(ConfigError, match=rf"{re.escape(file)}.*{key}"):
        read_config(folder)


def test_what_the_official_code_prepares_itself(folder):
    changed(
        folder, "clip/preprocessor_config.json",
        size={"shortest_edge": 224}, crop_size=448, do_center_crop=False, do_convert_rgb=None, resample=3,
        rescale_factor=0.00392156862745098, image_mean=[0.5, 0.5, 0.5], image_processor_type="CLIPImageProcessor",
    )  # fmt: skip
    found = read_config(folder)
    assert found.geometry.image_mean == (0.5, 0.5, 0.5) and found.unknown == ()


def test_no_setting_of_a_saved_tokenizer_is_unknown(tmp_path):
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models
    from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "a": 2}, []))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    assert TOKENIZER.unknown(json.loads((tmp_path / "tokenizer_config.json").read_text())) == []
