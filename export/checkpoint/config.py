"""`config.json` of a LLaVA-FlexAttention checkpoint -> the model's geometry.

The FlexAttention settings are under the key `extra`: an object with string (or integer) values, or the string of the
official training flag, `"zoom_ratio:3#threshold:48"`. Official keys: `zoom_ratio` (required), `highres_size` (default
tower size * zoom), `lowres_size` (default 336), `threshold` (default 64), `warmup` (training only, ignored).

Keys of this project, also under `extra`, for models that are not shaped like the official ones:
  start_layer      first layer that produces a selection (default 8, hard-coded officially)
  cells            side of the selection grid (default 9, hard-coded officially)
  prompt_template  text with one `<image>` and one `{prompt}` (default: the one of the official evaluation scripts)
  turn_template    in a conversation, the text from the end of a question's prompt to the end of the next one's, with
                   one `{answer}` and then one `{prompt}` (default: the official one where prompt_template is; where it
                   is another, none, and no conversations)
  system_prompt    the part of prompt_template that a system message replaces (default: as of turn_template)

What becomes of every other key: config_keys.py. `text_config`, which transformers' own Llava has, may say the same.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from engines.bundle.consistency import HIRES_SIDE, SIZES, contradictions_of
from engines.bundle.geometry import Geometry, Vision
from engines.bundle.manifest import PROMPT_TEMPLATE, is_system_prompt, is_template, is_turn_template
from engines.checks import require_integer, shown
from engines.errors import ConfigError
from export.checkpoint.config_keys import DECODER, EXTRA, rope_theta
from export.checkpoint.packed_settings import Packing, read_packing
from export.checkpoint.settings import (
    Context,
    Epsilon,
    Heads,
    HeadWidth,
    Inner,
    Layers,
    Vocabulary,
    Width,
    parse,
    read_object,
)
from export.checkpoint.special_tokens import TokenIds, as_ids, read_generation, require_in_vocabulary
from export.checkpoint.tower import Tower, read_tower

_DIGITS = 9  # of a number under `extra`
_TEMPLATE = 10_000  # characters of a prompt's template
_TOWER_NAME = 1_000  # characters of mm_vision_tower: a path
_UNKNOWN = 100  # keys nobody knows


@dataclass(frozen=True)
class ModelConfig:
    """What a checkpoint folder says about its model, weights and vocabulary aside."""

    geometry: Geometry
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # generation ends at any of these
    prompt_template: str  # one `<image>`, one `{prompt}`
    tower_folder: Path | None  # where the vision tower's own files are, if anywhere
    packing: Packing | None = None  # how its linear layers are quantised, if they are
    tower_blocks: int | None = None  # of the vision tower, those after the selected one too; None: not known
    unknown: tuple[str, ...] = ()  # keys of its settings that this project does not know, and so does not obey
    notes: tuple[str, ...] = ()  # what else is not obeyed, for people
    turn_template: str | None = None  # as of engines.bundle.manifest.Prompt, like system_prompt; None: does not say
    system_prompt: str | None = None


class ConfigJson(BaseModel):
    """The fields of `config.json` that matter; defaults are those of the official LlamaConfig and LLaVA code."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    hidden_size: Width
    intermediate_size: Inner
    num_hidden_layers: Layers
    num_attention_heads: Heads
    num_key_value_heads: Heads | None = None
    head_dim: HeadWidth | None = None
    vocab_size: Vocabulary
    rms_norm_eps: Epsilon = 1e-6
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: Context = 2048
    tokenizer_model_max_length: Annotated[int, Field(gt=0)] | None = None  # transformers writes 10^30 for "no limit"
    bos_token_id: int | None = 1
    eos_token_id: TokenIds = 2
    mm_vision_tower: Annotated[str, Field(min_length=1, max_length=_TOWER_NAME, pattern=r"^[^\x00]*$")]
    mm_vision_select_layer: int
    mm_projector_type: str = "linear"
    mm_hidden_size: Width | None = None
    vision_feature_layer: int | None = None  # transformers' own name of mm_vision_select_layer
    sliding_window: Annotated[int, Field(gt=0)] | None = None
    use_sliding_window: bool = True  # where there is a window
    layer_types: list[str] | None = None


# What a text_config may repeat.
_REPEATED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "rms_norm_eps", "attention_bias", "tie_word_embeddings", "max_position_embeddings"),
)


def read_config(folder: Path) -> ModelConfig:
    """Read and validate `config.json` of the checkpoint folder `folder`, the config of its vision tower, and
    generation_config.json.

    Raises ConfigError, naming the key, when a value is missing, malformed, contradicts another, or asks for something
    this project does not support.
    """
    path = Path(folder) / "config.json"
    raw = read_object(path)
    extra = parse_extra(raw.get("extra"), path)  # first: most wrong folders are models of another kind
    # null means the default, as in transformers; only the token ids have a meaning for it.
    given = {key: value for key, value in raw.items() if value is not None or key.endswith("token_id")}
    DECODER.check(given, path)
    if "text_config" in given and "hidden_size" not in given:
        raise ConfigError(
            f"{path}: hidden_size is missing, and there is a text_config: the layout of transformers' own Llava",
            expected="the official layout: the decoder's settings stand in config.json itself",
            fix="use the checkpoint as the official training code saved it",
        )
    config = parse(ConfigJson, given, path)
    theta = rope_theta(given, path)
    _check_supported(config, path)
    tower = read_tower(Path(folder), config.mm_vision_tower, given.get("vision_config"))
    geometry = _geometry(config, theta, extra, tower, path)
    _check_geometry(geometry, config, extra, tower, path)
    _check_window(config, geometry, path)
    repeated = _check_text_config(given, config, theta, path)
    generation = read_generation(Path(folder), given)
    bos, eos = config.bos_token_id, as_ids(config.eos_token_id)
    require_in_vocabulary(() if bos is None else (bos,), config.vocab_size, f"{path}: bos_token_id")
    require_in_vocabulary(eos, config.vocab_size, f"{path}: eos_token_id")
    if generation.eos_ids is not None:
        eos = generation.eos_ids
        require_in_vocabulary(eos, config.vocab_size, f"{path.parent / 'generation_config.json'}: eos_token_id")
    template = _prompt_template(extra, path)
    return ModelConfig(
        geometry=geometry,
        bos_token_id=bos,
        eos_token_ids=eos,
        prompt_template=template,
        tower_folder=tower.folder,
        packing=read_packing(Path(folder), raw),
        tower_blocks=tower.config.num_hidden_layers,
        unknown=_bounded([*DECODER.unknown(given), *repeated, *tower.unknown, *generation.unknown], path),
        notes=generation.notes,
        turn_template=_turn_template(extra, path),
        system_prompt=_system_prompt(extra, template, path),
    )


def _bounded(unknown: list[str], path: Path) -> tuple[str, ...]:
    """The unknown keys, as messages and a manifest can hold them. ConfigError for more than any model has."""
    if len(unknown) > _UNKNOWN:
        raise ConfigError(
            f"{path}: {len(unknown)} keys are unknown, {shown(unknown[0])} among them",
            expected=f"the config of a LLaVA-FlexAttention model, with at most {_UNKNOWN} that are",
        )
    return tuple(f"{key:.80}" for key in unknown)


def parse_extra(raw: Any, path: Path) -> dict[str, Any]:
    """The `extra` settings as a dict, from either of their two forms; values are as found (mostly strings).

    Raises ConfigError for a malformed value, and when `zoom_ratio`, which marks FlexAttention, is absent.
    """
    if isinstance(raw, str):
        pairs = [item.partition(":") for item in raw.split("#") if item]
        for key, colon, _ in pairs:
            if not colon:
                raise ConfigError(f"{path}: extra holds {shown(key)}", expected="key:value pairs joined by #")
        twice = [key for key, count in Counter(key for key, _, _ in pairs).items() if count > 1]
        if twice:
            raise ConfigError(f"{path}: extra holds {shown(twice[0])} twice", expected="every key once")
        raw = {key: value for key, _, value in pairs}
    if raw is not None and not isinstance(raw, dict):
        raise ConfigError(f"{path}: extra is {shown(raw)}", expected="an object, or key:value pairs joined by #")
    if not raw or "zoom_ratio" not in raw:
        raise ConfigError(
            f"{path}: not a FlexAttention checkpoint: extra.zoom_ratio is missing",
            expected='"extra": {"zoom_ratio": "3", ...}',
            fix="use a checkpoint trained with FlexAttention; plain LLaVA has no hi-res projections",
        )
    named = {f"extra.{key}": value for key, value in raw.items()}
    EXTRA.check(named, path)
    unknown = EXTRA.unknown(named)
    if unknown:
        raise ConfigError(
            f"{path}: {', '.join(f'{key:.60}' for key in unknown[:5])}: unknown, also to the official code",
            expected=f"keys of {', '.join(sorted(key.removeprefix('extra.') for key in EXTRA.used))}",
            fix="correct the name, or remove the key if the code that trained this checkpoint did not read it either",
        )
    return dict(raw)


def _integer(extra: Mapping[str, Any], key: str, default: int, low: int | None, path: Path) -> int:
    value = extra.get(key, default)
    if isinstance(value, str) and re.fullmatch(rf"\s*[+-]?[0-9]{{1,{_DIGITS}}}\s*", value):
        value = int(value)
    high = 10**_DIGITS - 1
    low = -high if low is None else low
    return require_integer(value, f"{path}: extra.{key} is {shown(value)}", low, high, error=ConfigError)


def _prompt_template(extra: Mapping[str, Any], path: Path) -> str:
    text = extra.get("prompt_template", PROMPT_TEMPLATE)
    if not isinstance(text, str) or len(text) > _TEMPLATE or not is_template(text):
        raise ConfigError(
            f"{path}: extra.prompt_template is {shown(text)}",
            expected=f"text with exactly one <image> and one {{prompt}}, of at most {_TEMPLATE} characters",
        )
    return text


def _turn_template(extra: Mapping[str, Any], path: Path) -> str | None:
    text = extra.get("turn_template")
    if text is None:
        return None
    if not isinstance(text, str) or len(text) > _TEMPLATE or not is_turn_template(text):
        raise ConfigError(
            f"{path}: extra.turn_template is {shown(text)}",
            expected="text with exactly one {answer}, then exactly one {prompt}, and no <image>, of at most "
            f"{_TEMPLATE} characters",
            fix="write the text between two questions so, or remove the key",
        )
    return text


def _system_prompt(extra: Mapping[str, Any], template: str, path: Path) -> str | None:
    text = extra.get("system_prompt")
    if text is None:
        return None
    if not isinstance(text, str) or not is_system_prompt(text, template):
        raise ConfigError(
            f"{path}: extra.system_prompt is {shown(text)}",
            expected=f"a part of the prompt's template, there once, before <image> and {{prompt}}: {shown(template)}",
            fix="copy that part of the template, or remove the key",
        )
    return text


def _check_supported(config: ConfigJson, path: Path) -> None:
    """Refuse what is not in the table of keys because it depends on more than its own value."""
    depth = re.fullmatch(r"mlp([1-9][0-9]?)x_gelu", config.mm_projector_type)
    if config.mm_projector_type != "linear" and not (depth and 2 <= int(depth[1]) <= SIZES["projector_depth"][1]):
        raise ConfigError(
            f"{path}: mm_projector_type {shown(config.mm_projector_type)} is not supported",
            expected=f"linear, or mlpNx_gelu with N of at least 2 and at most {SIZES['projector_depth'][1]}",
        )
    if config.vision_feature_layer not in (None, config.mm_vision_select_layer):
        raise ConfigError(
            f"{path}: mm_vision_select_layer is {shown(config.mm_vision_select_layer)}, vision_feature_layer "
            f"{shown(config.vision_feature_layer)}",
            expected="the same in both",
        )


def _check_window(config: ConfigJson, g: Geometry, path: Path) -> None:
    """ConfigError for a window, or layers of a kind, in which attention does not see the whole context."""
    window, enough = config.sliding_window, "use a checkpoint whose attention sees all tokens"
    sees_all = window is None or not config.use_sliding_window or window >= g.context
    if window is not None and window > g.image_tokens:
        enough = f"where a context of {window} tokens is enough, make max_position_embeddings {window}"
    if not sees_all and (config.layer_types is None or "sliding_attention" in config.layer_types):
        raise ConfigError(
            f"{path}: sliding_window {window} is not supported",
            expected=f"null, or at least the context of {g.context} tokens: attention sees all of it",
            fix=enough,
        )
    kinds = {"full_attention"} | ({"sliding_attention"} if window is not None and sees_all else set())
    others = [kind for kind in config.layer_types or () if kind not in kinds]
    if others:
        raise ConfigError(
            f"{path}: layer_types has {shown(others[0])}", expected="full_attention alone: every layer sees all tokens"
        )


def _check_text_config(given: Mapping[str, Any], config: ConfigJson, theta: float, path: Path) -> list[str]:
    """ConfigError unless `text_config`, if there is one, says what config.json says; its unknown keys."""
    text = given.get("text_config")
    if text is None:
        return []
    where = f"{path}: text_config"
    if not isinstance(text, dict):
        raise ConfigError(f"{where} is {shown(text)}", expected="an object")
    text = {key: value for key, value in text.items() if value is not None}
    DECODER.check(text, where)
    values = {key: getattr(config, key) for key in _REPEATED} | {"rope_theta": theta}
    values["num_key_value_heads"] = config.num_key_value_heads or config.num_attention_heads
    values["head_dim"] = config.head_dim or config.hidden_size // config.num_attention_heads
    rotary = text.keys() & {"rope_theta", "rope_scaling", "rope_parameters"}
    said = text | ({"rope_theta": rope_theta(text, where)} if rotary else {})
    for key, value in values.items():
        if key in said and said[key] != value:
            raise ConfigError(
                f"{where}: {key} is {shown(said[key])}; config.json itself: {shown(value)}",
                expected="the same in both",
                fix="remove text_config: the official code does not read it",
            )
    return [f"text_config.{key}" for key in DECODER.unknown(text)]


def _geometry(config: ConfigJson, theta: float, extra: Mapping[str, Any], tower: Tower, path: Path) -> Geometry:
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
        rope_theta=theta,
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
            f"{path}: mm_vision_select_layer is {shown(select)}",
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
    if g.hires_side > HIRES_SIDE:
        contradiction(
            f"extra.zoom_ratio is {g.zoom}: {g.hires_side} hi-res tokens per side",
            f"at most {HIRES_SIDE}, of {g.grid} image tokens per side",
        )
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
    for problem in contradictions_of(g):  # what remains: no bundle may have it
        raise ConfigError(f"{path}: {problem}")
