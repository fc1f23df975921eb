"""Where the CLIP vision tower of a checkpoint lives, and its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from engines.errors import ConfigError
from export.checkpoint.settings import parse, read_object

Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
Triple = tuple[float, float, float]


class TowerConfig(BaseModel):
    """The fields of a CLIP vision config that the export needs; defaults are those of CLIPVisionConfig."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    hidden_size: Count = 768
    intermediate_size: Count = 3072
    num_hidden_layers: Count = 12
    num_attention_heads: Count = 12
    num_channels: int = 3
    image_size: Count = 224
    patch_size: Count = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Positive = 1e-5


class Pixels(BaseModel):
    """Pixel statistics of a `preprocessor_config.json` (RGB, 0..1 scale); defaults are OpenAI CLIP's."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    image_mean: Triple = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[Positive, Positive, Positive] = (0.26862954, 0.26130258, 0.27577711)


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
    """A vision tower: its config, its pixel statistics, and its folder if there is one on this machine."""

    config: TowerConfig
    pixels: Pixels
    folder: Path | None


def read_tower(model: Path, name: str) -> Tower:
    """Find and read the vision tower `name` (`mm_vision_tower`) of the checkpoint folder `model`.

    Without a folder, a name whose last part is in `PUBLISHED` yields the published numbers, as the weights may still
    be inside the checkpoint. Raises ConfigError when the tower is unknown, its config bad, or its kind unsupported.
    """
    folder = find_tower(model, name)
    if folder is None:
        published = PUBLISHED.get(Path(name).name)
        if published is None:
            raise ConfigError(
                f"{model / 'config.json'}: mm_vision_tower is {name!r}, and there is no such folder",
                expected=f"a CLIP folder with config.json, or one of {', '.join(PUBLISHED)}",
                fix=f"put the folder of the vision tower at {model / Path(name).name}",
            )
        return Tower(published, Pixels(), None)
    path = folder / "config.json"
    raw = read_object(path)
    config = parse(TowerConfig, raw.get("vision_config", raw), path)
    _check(config, path)
    statistics = folder / "preprocessor_config.json"
    pixels = parse(Pixels, read_object(statistics), statistics) if statistics.is_file() else Pixels()
    return Tower(config, pixels, folder)


def find_tower(model: Path, name: str) -> Path | None:
    """The folder (with a `config.json`) of vision tower `name`, or None.

    Looks at an absolute path, then inside and beside the checkpoint folder `model` (whole name, then its last part),
    then in the local Hugging Face cache. Never uses the network.
    """
    last = Path(name).name
    # An absolute `name` replaces what stands left of it, so the first candidate covers that case too.
    for folder in (model / name, model / last, model.parent / name, model.parent / last):
        if (folder / "config.json").is_file() and folder.resolve() != model.resolve():
            return folder
    return _cached(name)


def _cached(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # not a Hub name, e.g. a path from the training machine
        return None
    return Path(found).parent if isinstance(found, str) else None


def _check(config: TowerConfig, path: Path) -> None:
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
            raise ConfigError(f"{path}: {key} {getattr(config, key)!r} is not supported", expected=expected)
