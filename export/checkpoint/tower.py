"""Where the CLIP vision tower of a checkpoint lives, and its numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from engines.bundle.consistency import MEAN, STD
from engines.bundle.tensors import TOWER_PREFIX
from engines.checks import shown
from engines.errors import ConfigError
from export.checkpoint.config_keys import CLIP, PREPROCESSOR, TOWER
from export.checkpoint.settings import Epsilon, Heads, Inner, Layers, Side, Width, parse, present, read_object

Mean = Annotated[float, Field(ge=MEAN[0], le=MEAN[1])]
Deviation = Annotated[float, Field(ge=STD[0], le=STD[1])]
_BLOCK = re.compile(re.escape(TOWER_PREFIX) + r"vision_model\.encoder\.layers\.(\d{1,9})\.")


class TowerConfig(BaseModel):
    """The fields of a CLIP vision config that the export needs; defaults are those of CLIPVisionConfig."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    hidden_size: Width = 768
    intermediate_size: Inner = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: Heads = 12
    num_channels: int = 3
    image_size: Side = 224
    patch_size: Side = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5


class Pixels(BaseModel):
    """Pixel statistics of a `preprocessor_config.json` (RGB, 0..1 scale); defaults are OpenAI CLIP's."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    image_mean: tuple[Mean, Mean, Mean] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[Deviation, Deviation, Deviation] = (0.26862954, 0.26130258, 0.27577711)


def _large(image_size: int) -> TowerConfig:
    return TowerConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=image_size,
        patch_size=14,
    )


# A checkpoint may hold the weights of its tower but only name its config. LLaVA is trained with these two.
PUBLISHED = {"clip-vit-large-patch14-336": _large(336), "clip-vit-large-patch14": _large(224)}


@dataclass(frozen=True)
class Tower:
    """A vision tower: its config, its pixel statistics, its folder if there is one on this machine, and the keys of its
    files that this project does not know."""

    config: TowerConfig
    pixels: Pixels
    folder: Path | None
    unknown: tuple[str, ...] = ()


def read_tower(model: Path, name: str, described: Any = None) -> Tower:
    """Find and read the vision tower `name` (`mm_vision_tower`) of the checkpoint folder `model`, whose config.json has
    `described` as its `vision_config` (None: no such key).

    A folder of that name says what the tower is; without one a name whose last part is in `PUBLISHED`, or else
    `described`, as the weights may still be inside the checkpoint. Raises ConfigError when none of them is there or two
    of them contradict each other, when a config is bad, and when its kind is not supported.
    """
    path = model / "config.json"
    inside = f"{path}: vision_config"
    given, own, unknown = _read(described, inside, "vision_config.") if described not in (None, {}) else ({}, None, [])
    folder, published = find_tower(model, name), PUBLISHED.get(PurePath(name).name)
    if folder is not None:
        where = str(folder / "config.json")
        _, config, more = _read(read_object(folder / "config.json"), where, f"{folder.name}/config.json: ")
        _check(config, where)
        pixels, others = _read_pixels(folder / "preprocessor_config.json")
        unknown = [*unknown, *more, *others]
    elif published is not None:
        where, config, pixels = f"the published {PurePath(name).name}", published, Pixels()
    elif own is not None:
        _check(own, inside)
        return Tower(own, Pixels(), None, tuple(unknown))
    else:
        raise ConfigError(
            f"{path}: mm_vision_tower is {shown(name)}, and there is no such folder",
            expected=f"a CLIP folder with config.json, one of {', '.join(PUBLISHED)}, or vision_config in config.json",
            fix="name the folder of the vision tower there, and put it beside or into the checkpoint"
            if _last(name) is None
            else f"put the folder of the vision tower at {model / f'{_last(name):.80}'}",
        )
    for key in TowerConfig.model_fields if own is not None else ():
        if getattr(own, key) != getattr(config, key):
            absent = "" if key in given else ", for it is absent"
            raise ConfigError(
                f"{inside}: {key} is {shown(getattr(own, key))}{absent}; {where}: {key} is "
                f"{shown(getattr(config, key))}",
                expected="the same in both: mm_vision_tower names the tower that vision_config describes",
                fix="name the tower that the weights belong to, or remove vision_config",
            )
    return Tower(config, pixels, folder, tuple(unknown))


def require_blocks_of(config: int, names: Iterable[str], path: Path) -> None:
    """ConfigError when the tensors `names` hold more blocks of the tower than the `config` blocks of its settings: a
    layer counted from the end (mm_vision_select_layer) would be another one. `path`: whose weights these are."""
    found = max((int(match[1]) + 1 for name in names if (match := _BLOCK.match(name))), default=0)
    if found > config:
        raise ConfigError(
            f"{path}: num_hidden_layers of the vision tower is {config}, its weights have {found} blocks",
            expected="the blocks of the weights: mm_vision_select_layer counts from the last one",
            fix="use the config of the tower that the weights belong to",
        )


def _read(raw: Any, where: str, prefix: str) -> tuple[dict[str, Any], TowerConfig, list[str]]:
    """What a config of a tower (or of the CLIP around it) gives, that with CLIP's defaults, and its unknown keys behind
    `prefix`."""
    unknown: list[str] = []
    if isinstance(raw, dict) and raw.get("vision_config") is not None:
        CLIP.check(raw, where)
        unknown += CLIP.unknown(raw)
        raw = _merged(raw["vision_config"], raw.get("vision_config_dict"), where)
    if isinstance(raw, dict):
        raw = {key: value for key, value in raw.items() if value is not None}
        TOWER.check(raw, where)
        unknown += TOWER.unknown(raw)
    return raw, parse(TowerConfig, raw, where), [f"{prefix}{key}" for key in unknown]


def _merged(config: Any, older: Any, where: str) -> Any:
    """`vision_config` with its older spelling `vision_config_dict`, which older transformers wrote beside it."""
    if not isinstance(config, dict) or not isinstance(older, dict):
        return config
    for key in {*config} & {*older} & TOWER.used:
        if config[key] != older[key]:
            raise ConfigError(
                f"{where}: {key} is {shown(config[key])} in vision_config and {shown(older[key])} in "
                "vision_config_dict",
                expected="the same in both",
                fix="remove the one that the weights do not belong to",
            )
    return older | config


def _read_pixels(path: Path) -> tuple[Pixels, list[str]]:
    """The statistics that preprocessor_config.json names, CLIP's without that file, and its unknown keys."""
    if not present(path):
        return Pixels(), []
    raw = {key: value for key, value in read_object(path).items() if value is not None}
    PREPROCESSOR.check(raw, path)
    unknown = [f"{path.parent.name}/{path.name}: {key}" for key in PREPROCESSOR.unknown(raw)]
    return parse(Pixels, raw, path), unknown


def find_tower(model: Path, name: str) -> Path | None:
    """The folder (with a `config.json`) of vision tower `name`, or None.

    Looks at an absolute path, then inside and beside the checkpoint folder `model` (whole name, then its last part),
    then in the local Hugging Face cache. Never uses the network. A name with ".." is a path of the training machine: of
    that only the last part says something here.
    """
    last = _last(name)
    if last is None:
        return None
    whole = () if ".." in PurePath(name).parts else (name,)
    # An absolute `name` replaces what stands left of it, so the first candidate covers that case too.
    for folder in (place / part for place in (model, model.parent) for part in (*whole, last)):
        if _is_file(folder / "config.json") and folder.resolve() != model.resolve():
            return folder
    return _cached(name)


def _last(name: str) -> str | None:
    """The last part of a path, where that is the name of something."""
    last = PurePath(name).name
    return None if last in ("", "..") else last


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name no file system takes: too long, a zero in it
        return False


def _cached(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # not a Hub name, e.g. a path from the training machine
        return None
    return Path(found).parent if isinstance(found, str) else None


def _check(config: TowerConfig, where: str) -> None:
    supported = {
        "hidden_act": (config.hidden_act in ("quick_gelu", "gelu"), "quick_gelu or gelu"),
        "num_channels": (config.num_channels == 3, "3 (RGB)"),
        "num_attention_heads": (
            config.hidden_size % config.num_attention_heads == 0,
            f"a divisor of hidden_size {config.hidden_size}",
        ),
        "patch_size": (
            config.image_size % config.patch_size == 0,
            f"a divisor of image_size {config.image_size}",
        ),
    }
    for key, (good, expected) in supported.items():
        if not good:
            raise ConfigError(f"{where}: {key} {shown(getattr(config, key))} is not supported", expected=expected)
