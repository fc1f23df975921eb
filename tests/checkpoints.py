"""Random checkpoints of any geometry in the official layout, small enough for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engines.bundle.geometry import Geometry
from engines.bundle.manifest import TURN_TEMPLATE
from engines.bundle.tensors import expected_tensors
from export.checkpoint.write_config import write_config

TEMPLATE = "USER: <image>\n{prompt} ASSISTANT:"  # short: shortest contexts hold it. A conversation has official turns
SPECIAL = ["<unk>", "<s>", "</s>"]


def write_checkpoint(
    folder: Path,
    g: Geometry,
    *,
    tokenizer: bool = False,
    template: str = TEMPLATE,
    seed: int = 0,
    overrides: dict[str, torch.Tensor] | None = None,
    **config: object,
) -> Path:
    """Write config.json, weights (float32), the tower's config and, when asked, a tokenizer; returns `folder`.

    `template`: of prompts, PROMPT_TEMPLATE for the official one. `overrides` replaces tensors by name, `config` entries
    of config.json. Queries and keys are drawn strong enough for
    attention, and with it the selection, to prefer some cells.
    """
    write_config(folder, g, prompt_template=template, turn_template=TURN_TEMPLATE, dtype="float32", **config)
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        if "norm" in name:
            return 1 + 0.1 * values if name.endswith("weight") else 0.1 * values
        if name.endswith("bias"):
            return 0.1 * values
        if len(shape) == 1 or name.endswith("embed_tokens.weight"):
            return values
        peak = 1.6 if ".q_proj" in name or ".k_proj" in name else 1.0
        return peak * values / torch.Size(shape[1:]).numel() ** 0.5

    tensors = {name: draw(name, shape) for name, shape in expected_tensors(g).items()}
    save_file({**tensors, **(overrides or {})}, folder / "model.safetensors")
    if tokenizer:
        write_tokenizer(folder, g.vocab)
    return folder


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A byte-level BPE that fits `vocab` (at least 259)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["what number is in the red square? a chat between a curious human"] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
