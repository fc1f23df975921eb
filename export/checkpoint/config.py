"""`config.json` of a LLaVA-FlexAttention checkpoint -> the model's geometry.

The FlexAttention settings are under the key `extra`: an object with string (or integer) values, or the string of the
official training flag, `"zoom_ratio:3#threshold:48"`. Official keys: `zoom_ratio` (required), `highres_size` (default
tower size * zoom), `lowres_size` (default 336), `threshold` (default 64), `warmup` (training only, ignored).

Keys of this project, also under `extra`, for models that are not shaped like the official ones:
  start_layer      first layer that produces a selection (default 8, hard-coded officially)
  cells            side of the selection grid (default 9, hard-coded officially)
  prompt_template  text with one `<image>` and one `{prompt}` (default: the one of the official evaluation scripts)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from engines.bundle.geometry import Geometry, Vision
from engines.bundle.manifest import is_template
from engines.checks import require_integer
from engines.errors import ConfigError
from export.checkpoint.packed_settings import Packing, read_packing
from export.checkpoint.settings import parse, read_object
from export.checkpoint.tower import Count, Positive, Tower, read_tower

PROMPT_TEMPLATE = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. USER: <image>\n{prompt} ASSISTANT:"
)


@dataclass(frozen=True)
class ModelConfig:
    """What a checkpoint folder says about its model, weights and vocabulary aside."""

    geometry: Geometry
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # generation ends at any of these
    prompt_template: str  # one `<image>`, one `{prompt}`
    tower_folder: Path | None  # where the vision tower's own files are, if anywhere
    packing: Packing | None = None  # how its linear layers are quantised, if they are


class ConfigJson(BaseModel):
    """The fields of `config.json` that matter; defaults are those of the official LlamaConfig and LLaVA code."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    vocab_size: Count
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive = 10000.0
    rope_scaling: Any = None
    hidden_act: str = "silu"
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: Count = 2048
    tokenizer_model_max_length: Count | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    mm_vision_tower: Annotated[str, Field(min_length=1)]
    mm_vision_select_layer: int
    mm_vision_select_feature: str = "patch"
    mm_projector_type: str = "linear"
    mm_hidden_size: Count | None = None
    mm_use_im_start_end: bool = False
    image_aspect_ratio: str = "pad"  # the official evaluation scripts always pad
    extra: Any = None


def read_config(folder: Path) -> ModelConfig:
    """Read and validate `config.json` of the checkpoint folder `folder`, and the config of its vision tower.

    Raises ConfigError, naming the key, when a value is missing, malformed, contradicts another, or asks for something
    this project does not support.
    """
    path = Path(folder) / "config.json"
    raw = read_object(path)
    extra = parse_extra(raw.get("extra"), path)  # first: most wrong folders are models of another kind
    # null means the default, as in transformers; only the token ids have a meaning for it.
    given = {key: value for key, value in raw.items() if value is not None or key.endswith("token_id")}
    config = parse(ConfigJson, given, path)
    _check_supported(config, extra, path)
    tower = read_tower(Path(folder), config.mm_vision_tower)
    geometry = _geometry(config, extra, tower, path)
    _check_geometry(geometry, config, extra, tower, path)
    eos = config.eos_token_id
    return ModelConfig(
        geometry=geometry,
        bos_token_id=config.bos_token_id,
        eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        prompt_template=_prompt_template(extra, path),
        tower_folder=tower.folder,
        packing=read_packing(Path(folder), raw),
    )


def parse_extra(raw: Any, path: Path) -> dict[str, Any]:
    """The `extra` settings as a dict, from either of their two forms; values are as found (mostly strings).

    Raises ConfigError for a malformed value, and when `zoom_ratio`, which marks FlexAttention, is absent.
    """
    if isinstance(raw, str):
        pairs = [item.partition(":") for item in raw.split("#") if item]
        for key, colon, _ in pairs:
            if not colon:
                raise ConfigError(f"{path}: extra holds {key!r}", expected="key:value pairs joined by #")
        raw = {key: value for key, _, value in pairs}
    if raw is not None and not isinstance(raw, dict):
        raise ConfigError(f"{path}: extra is {raw!r}", expected="an object, or key:value pairs joined by #")
    if not raw or "zoom_ratio" not in raw:
        raise ConfigError(
            f"{path}: not a FlexAttention checkpoint: extra.zoom_ratio is missing",
            expected='"extra": {"zoom_ratio": "3", ...}',
            fix="use a checkpoint trained with FlexAttention; plain LLaVA has no hi-res projections",
        )
    return dict(raw)


def _integer(extra: Mapping[str, Any], key: str, default: int, low: int | None, path: Path) -> int:
    value = extra.get(key, default)
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]+\s*", value):
        value = int(value)
    require_integer(value, f"{path}: extra.{key} is {value!r}", low, error=ConfigError)
    return value


def _prompt_template(extra: Mapping[str, Any], path: Path) -> str:
    text = extra.get("prompt_template", PROMPT_TEMPLATE)
    if not isinstance(text, str) or not is_template(text):
        raise ConfigError(
            f"{path}: extra.prompt_template is {text!r}", expected="text with exactly one <image> and one {prompt}"
        )
    return text


def _check_supported(config: ConfigJson, extra: Mapping[str, Any], path: Path) -> None:
    """Refuse every setting that would change the computation in a way the exporter does not implement."""

    def refuse(key: str, found: Any, supported: str) -> None:
        raise ConfigError(f"{path}: {key} {found!r} is not supported", expected=supported)

    if config.rope_scaling is not None:
        refuse("rope_scaling", config.rope_scaling, "null: the official hi-res rotary tables are unscaled")
    if config.hidden_act != "silu":
        refuse("hidden_act", config.hidden_act, "silu")
    if config.image_aspect_ratio != "pad":
        refuse("image_aspect_ratio", config.image_aspect_ratio, "pad")
    if config.mm_vision_select_feature != "patch":
        refuse("mm_vision_select_feature", config.mm_vision_select_feature, "patch (the class token is dropped)")
    if config.mm_use_im_start_end:
        refuse("mm_use_im_start_end", True, "false: the image stands in the prompt without marker tokens")
    if not re.fullmatch(r"linear|mlp([2-9]|[1-9][0-9]+)x_gelu", config.mm_projector_type):
        refuse("mm_projector_type", config.mm_projector_type, "linear, or mlpNx_gelu with N of at least 2")
    if "special" in extra:
        refuse("extra.special", extra["special"], "no such key: it replaces the selection by a random one")


def _geometry(config: ConfigJson, extra: Mapping[str, Any], tower: Tower, path: Path) -> Geometry:
    heads = config.num_attention_heads
    depth = re.match(r"mlp(\d+)x", config.mm_projector_type)
    limits = [config.max_position_embeddings, config.tokenizer_model_max_length]
    return Geometry(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=config.num_key_value_heads or heads,
        head_dim=config.head_dim or config.hidden_size // heads,
        vocab=config.vocab_size,
        rms_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        attention_bias=config.attention_bias,
        tied_embeddings=config.tie_word_embeddings,
        projector_depth=int(depth[1]) if depth else 1,
        context=min(limit for limit in limits if limit is not None),
        lowres=_integer(extra, "lowres_size", 336, 1, path),
        zoom=_integer(extra, "zoom_ratio", 0, 1, path),
        cells=_integer(extra, "cells", 9, 1, path),
        start_layer=_integer(extra, "start_layer", 8, 0, path),
        # The map is scaled to 0..255 and compared strictly: -1 and less select everything, 255 and more nothing.
        threshold=_integer(extra, "threshold", 64, None, path),
        image_mean=tower.pixels.image_mean,
        image_std=tower.pixels.image_std,
        vision=Vision(
            hidden=tower.config.hidden_size,
            intermediate=tower.config.intermediate_size,
            layers=_blocks_needed(config.mm_vision_select_layer, tower.config.num_hidden_layers, path),
            heads=tower.config.num_attention_heads,
            patch=tower.config.patch_size,
            eps=tower.config.layer_norm_eps,
            activation=tower.config.hidden_act,
        ),
    )


def _blocks_needed(select: int, layers: int, path: Path) -> int:
    """How many tower blocks produce `hidden_states[select]`, a list of `layers` + 1 entries, embeddings first."""
    if not -(layers + 1) <= select <= layers:
        raise ConfigError(
            f"{path}: mm_vision_select_layer is {select}",
            expected=f"an index from {-(layers + 1)} to {layers}: the vision tower has {layers} blocks",
        )
    return select if select >= 0 else layers + 1 + select


def _check_geometry(g: Geometry, config: ConfigJson, extra: Mapping[str, Any], tower: Tower, path: Path) -> None:
    """Refuse numbers that contradict each other. The tower's patch is known to divide its image size."""

    def contradiction(found: str, expected: str) -> None:
        raise ConfigError(f"{path}: {found}", expected=expected)

    if g.hidden != g.heads * g.head_dim:
        contradiction(
            f"hidden_size is {g.hidden}, num_attention_heads {g.heads}, head_dim {g.head_dim}",
            "hidden_size = num_attention_heads * head_dim",
        )
    if g.head_dim % 2:
        contradiction(f"head_dim is {g.head_dim}", "an even number: rotary positions turn pairs")
    if g.heads % g.kv_heads:
        contradiction(f"num_key_value_heads is {g.kv_heads}", f"a divisor of num_attention_heads {g.heads}")
    if config.mm_hidden_size not in (None, g.vision.hidden):
        contradiction(f"mm_hidden_size is {config.mm_hidden_size}", f"the vision tower's hidden_size {g.vision.hidden}")
    if g.lowres != tower.config.image_size:
        contradiction(
            f"extra.lowres_size is {g.lowres}",
            f"the vision tower's image_size {tower.config.image_size}: every tile has the tower's own positions",
        )
    highres = _integer(extra, "highres_size", g.lowres * g.zoom, 1, path)
    if highres != g.highres:
        contradiction(f"extra.highres_size is {highres}", f"lowres_size {g.lowres} * zoom_ratio {g.zoom} = {g.highres}")
    if g.start_layer > g.layers - 2:
        contradiction(
            f"extra.start_layer is {g.start_layer}",
            f"at most {g.layers - 2}: a later one of the {g.layers} layers must read what it selects",
        )
    if g.cells > g.grid:
        contradiction(f"extra.cells is {g.cells}", f"at most {g.grid}, the image tokens per side")
    if g.context <= g.image_tokens:
        contradiction(
            f"max_position_embeddings or tokenizer_model_max_length is {g.context}",
            f"more than the {g.image_tokens} image tokens",
        )
