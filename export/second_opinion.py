"""A second opinion on a checkpoint: transformers' own Llama and CLIP, which read its config.json themselves.

The reference of the parity check is built from what this project read of the checkpoint. A setting that was misread is
misread on both sides there. Here transformers makes the models of the raw config.json, and safetensors and torch load
the weights. Shared are only the size of the request, where the tower's folder lies, and the sizes of a published tower
that the checkpoint names and does not describe. What is compared is what transformers can compute: a prompt with a
low-res image, and no pages.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from engines.backend import Model
from engines.bundle.geometry import Geometry
from engines.errors import ParityError
from export.checkpoint.tower import PUBLISHED, find_tower

if TYPE_CHECKING:
    from transformers.models.clip.modeling_clip import CLIPVisionModel
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

STEPS = 3  # of one token, after the prompt
INSTALL = "pip install 'transformers>=5.24'"
_TOWER, _PROJECTOR = "model.vision_tower.vision_tower.", "model.mm_projector."
# How it runs, what pads batches, and what repeats the rest: transformers takes fewer values of these than there are.
_NO_MATTER = ("pad_token_id", "torch_dtype", "dtype", "use_cache", "text_config")
_UNUSED = re.compile(r"post_layernorm|\.inv_freq$|position_ids$")  # by what is compared
_HIRES = r"model\.layers\.\d+\.self_attn\.[kv]_proj_hd\."


@dataclass(frozen=True)
class Request:
    """A made-up prompt with an image. tile: [1, 3, lowres, lowres] float32. ids: [1, n + STEPS] int64, where -1-j is
    image feature j; the last STEPS are fed one by one. begin: [1] int64, where the image begins."""

    tile: np.ndarray
    ids: np.ndarray
    begin: np.ndarray


@dataclass(frozen=True)
class Opinion:
    """What a model makes of a request. features: [1, image tokens, hidden] float32; logits: [STEPS, vocab] float32."""

    features: np.ndarray
    logits: np.ndarray


def available() -> bool:
    """Whether transformers is installed."""
    return importlib.util.find_spec("transformers") is not None


def request(g: Geometry) -> Request:
    """The request for a model of this geometry: the same whenever it is asked for."""
    rng = np.random.default_rng(7)
    around = min(12, (g.context - g.image_tokens - STEPS) // 2)
    text = rng.integers(0, g.vocab, (1, 2 * around + STEPS))
    image = -1 - np.arange(g.image_tokens)[None]
    tile = rng.standard_normal((1, 3, g.lowres, g.lowres), dtype=np.float32)
    return Request(tile, np.concatenate((text[:, :around], image, text[:, around:]), 1), np.array([around], np.int64))


def of_model(model: Model[Any], asked: Request) -> Opinion:
    """The opinion of the reference, or of a bundle: no page is read."""
    features = model.vision(asked.tile)
    image = replace(model.no_image(1), features=features, begin=asked.begin)
    decoder = model.decoder(image, asked.ids.shape[1])
    decoder.run(asked.ids[:, :-STEPS])
    steps = [decoder.run(ids[None], 0) for ids in asked.ids[0, -STEPS:, None]]
    return Opinion(features.numpy().astype(np.float32), np.concatenate([step.logits for step in steps]))


@torch.no_grad()
def of_transformers(folder: Path, asked: Request) -> Opinion:
    """The opinion of transformers about the checkpoint in `folder`, in float32; ParityError where its model does not
    have the checkpoint's weights.

    Needs memory for the model in float32.
    """
    raw = _config(folder / "config.json")
    states = _clip(folder, raw)(torch.from_numpy(asked.tile), output_hidden_states=True).hidden_states
    features = _projector(folder, raw)(states[-1][:, 1:])
    llama = _llama(folder, raw)
    row = torch.from_numpy(asked.ids[0])
    words = llama.get_input_embeddings()(row.clamp(min=0))
    embedded = torch.where((row < 0)[:, None], features[0][(-1 - row).clamp(min=0)], words)
    logits = llama(inputs_embeds=embedded[None], logits_to_keep=STEPS, use_cache=False).logits[0]
    return Opinion(features.numpy(), logits.numpy())


@contextmanager
def contained() -> Iterator[None]:
    """ParityError for whatever transformers raises about a checkpoint: its own code checks values, often by their way
    through it, which this project has no use for."""
    try:
        yield
    except (ParityError, MemoryError):
        raise
    except Exception as error:
        raise ParityError(
            f"transformers cannot open this checkpoint: {type(error).__name__}: {error!s:.300}",
            expected="settings that transformers reads",
            fix="correct what it names in config.json or generation_config.json; or leave transformers out: "
            "--check weights",
        ) from error


def end_tokens(folder: Path) -> tuple[int, ...] | None:
    """The tokens that end an answer, as transformers' generate() would have it; None where it has none."""
    from transformers.generation.configuration_utils import GenerationConfig
    from transformers.models.llama.configuration_llama import LlamaConfig

    with _silent():  # it warns of a temperature without sampling, which Vicuna's file has
        if (folder / "generation_config.json").is_file():
            found = GenerationConfig.from_dict(_config(folder / "generation_config.json")).eos_token_id
        else:
            found = GenerationConfig.from_model_config(
                LlamaConfig.from_dict(_config(folder / "config.json"))
            ).eos_token_id
    return (found,) if isinstance(found, int) else tuple(found) if found else None


def _config(path: Path) -> dict[str, Any]:
    """A settings file without what does not matter and what is null: that means the default, and transformers 5 refuses
    many. Of token ids it says that there is none."""
    return _said(json.loads(path.read_text(encoding="utf-8-sig")))


def _said(raw: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in raw.items()
        if key not in _NO_MATTER and (value is not None or key.endswith("token_id"))
    }


def _llama(folder: Path, raw: dict[str, Any]) -> LlamaForCausalLM:
    """The decoder without what FlexAttention adds to it."""
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    state = _state(folder, f"(?!{re.escape(_TOWER)}|{re.escape(_PROJECTOR)}|{_HIRES})")
    return _filled(LlamaForCausalLM, LlamaConfig.from_dict(raw), state)


def _clip(folder: Path, raw: dict[str, Any]) -> CLIPVisionModel:
    """The vision tower up to the block whose output is selected: weights of later ones may be missing."""
    from transformers.models.clip.configuration_clip import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPVisionModel

    tower = find_tower(folder, raw["mm_vision_tower"])
    state = {name.removeprefix(_TOWER): of for name, of in _state(folder, re.escape(_TOWER)).items()}
    if not state and tower is not None:
        state = _state(tower, r"vision_model\.")
    if raw.get("vision_config"):
        config = CLIPVisionConfig.from_dict(_described(raw["vision_config"]))
    elif tower is not None:
        config = CLIPVisionConfig.from_dict(_described(_config(tower / "config.json")))
    else:  # named only: transformers would have to ask the hub
        config = CLIPVisionConfig.from_dict(PUBLISHED[Path(raw["mm_vision_tower"]).name].model_dump())
    select = raw["mm_vision_select_layer"]  # of the list of hidden states, embeddings first
    config.num_hidden_layers = blocks = select if select >= 0 else config.num_hidden_layers + 1 + select
    later = re.compile(r"encoder\.layers\.(\d+)\.")
    state = {name: of for name, of in state.items() if not ((block := later.search(name)) and int(block[1]) >= blocks)}
    return _filled(CLIPVisionModel, config, state)


def _described(raw: dict[str, Any]) -> dict[str, Any]:
    """A config of a tower, or that inside one of a whole CLIP."""
    return _said(raw.get("vision_config") or raw)


def _projector(folder: Path, raw: dict[str, Any]) -> nn.Module:
    """LLaVA's `linear` or `mlpNx_gelu` projector, as its builder puts it together."""
    found = _state(folder, re.escape(_PROJECTOR))
    state = {name.removeprefix(_PROJECTOR): of.float() for name, of in found.items()}
    depth = re.fullmatch(r"mlp(\d+)x_gelu", raw.get("mm_projector_type", "linear"))
    modules: list[nn.Module] = []
    for at in range(int(depth[1]) if depth else 1):
        weight = state[f"{2 * at}.weight" if depth else "weight"]
        modules += [nn.GELU()] * (at > 0) + [nn.Linear(weight.shape[1], weight.shape[0])]
    module = nn.Sequential(*modules) if depth else modules[0]
    module.load_state_dict(state)
    return module.eval()


def _filled(kind: Any, config: Any, state: dict[str, Tensor]) -> Any:
    """A model of transformers with these weights, in float32; ParityError where it has no place for one, or misses one
    that this project has, too."""
    config.return_dict = True  # how it answers, not what
    config._attn_implementation = "eager"  # products and softmax as written, whatever the machine has
    with _silent():
        model, info = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
        )
    problems = [f"no place for {name}" for name in sorted(info["unexpected_keys"]) if _counts(name, state[name])]
    problems += [f"no weights for {name}" for name in sorted(info["missing_keys"]) if not _UNUSED.search(name)]
    problems += [f"another shape of {name}" for name, *_ in sorted(info["mismatched_keys"])]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ParityError(
            f"transformers' {kind.__name__}, made of this config.json, has {', '.join(problems[:3])}{more}",
            expected="a model of the same weights as this project's",
            fix="check that config.json belongs to these weights; --check weights leaves transformers out",
        )
    return model.eval()


def _counts(name: str, tensor: Tensor) -> bool:
    """Whether a tensor without a place would change the model: not one outside it, nor a bias of zeros."""
    inside = name.startswith(("model.", "lm_head.", "vision_model."))
    return inside and not (name.endswith(".bias") and not tensor.any())


@contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' own reports and warnings: they speak of weights and settings that nobody asks for."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _state(folder: Path, wanted: str) -> dict[str, Tensor]:
    """The tensors of a folder whose names match `wanted`: of its one file, else as its index says, else of all its
    files."""
    return {name: of for file, named in _files(folder) for name, of in _read(file, re.compile(wanted), named)}


def _files(folder: Path) -> Iterator[tuple[Path, set[str] | None]]:
    """The weight files that count, and the names that the index assigns to each (None: all of it)."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (folder / whole).is_file():
            yield folder / whole, None
            return
        if (index := folder / f"{whole}.index.json").is_file():
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            for file in sorted(set(named.values())):
                yield folder / file, {name for name in named if named[name] == file}
            return
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        if files := sorted(path for path in folder.glob(pattern) if not path.name.startswith(".")):
            yield from ((file, None) for file in files)
            return


def _read(file: Path, wanted: re.Pattern[str], named: set[str] | None) -> Iterator[tuple[str, Tensor]]:
    """The wanted tensors of one file, and no byte of the others."""
    from safetensors import safe_open

    def counts(name: str) -> bool:
        return wanted.match(name) is not None and (named is None or name in named)

    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            yield from ((name, opened.get_tensor(name)) for name in opened.keys() if counts(name))  # noqa: SIM118
    else:
        state = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
        yield from ((name, of) for name, of in state.items() if counts(name))
