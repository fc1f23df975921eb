"""Random checkpoints in the official layout: `python tests/bench/random_checkpoint.py --shape 7b --out DIR`.

Answers are meaningless as text; shapes, names, shards and sizes are those of a trained checkpoint. "7b" takes 16.2 GB.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engines.bundle.geometry import Geometry, Vision
from engines.bundle.tensors import expected_tensors
from export.checkpoint.write_config import write_config
from tests.geometries import official

SHARD = 1 << 30  # bytes
BLOCK = 1 << 24  # random numbers drawn once; tensors are windows of them
SMALL_TOWER = Vision(32, 64, 3, 4, 14, 1e-5, "quick_gelu")
MIDDLE_TOWER = Vision(512, 2048, 11, 8, 14, 1e-5, "quick_gelu")
SHAPES = {
    "small": official(
        hidden=64, intermediate=176, layers=12, heads=4, kv_heads=4, head_dim=16, vocab=512, vision=SMALL_TOWER
    ),
    "mid": official(
        hidden=512, intermediate=1376, layers=16, heads=8, kv_heads=8, head_dim=64, vocab=4096, vision=SMALL_TOWER
    ),
    # Half of its weights are the tables of its vocabulary, a third the vision tower.
    "tables": official(
        hidden=768,
        intermediate=2048,
        layers=4,
        heads=12,
        kv_heads=12,
        head_dim=64,
        vocab=32000,
        start_layer=1,
        vision=MIDDLE_TOWER,
    ),
    "7b": official(),
    "7b-slice": official(layers=4, start_layer=1),  # two layers of each kind
}


def write(
    shape: str,
    out: Path,
    dtype: torch.dtype = torch.float16,
    *,
    seed: int = 0,
    threshold: int = 48,
    context: int = 2048,
) -> Path:
    """Write a checkpoint of `shape`, a key of SHAPES, into `out` and return it; threshold -1 selects all."""
    g = replace(SHAPES[shape], threshold=threshold, context=context)
    tower = "openai/clip-vit-large-patch14-336" if g.vision == official().vision else "clip"
    write_config(out, g, tower=tower, dtype=str(dtype).removeprefix("torch."))
    _write_tokenizer(out, g.vocab)
    _write_shards(out, g, dtype, seed)
    return out


def _tensors(g: Geometry, dtype: torch.dtype, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(BLOCK, generator=generator).to(dtype)
    layers_with_hires = {index: f"model.layers.{index}.self_attn." for index in range(g.start_layer + 1)}
    shapes = expected_tensors(g)
    for prefix in layers_with_hires.values():  # present in every checkpoint though never used
        shapes |= {f"{prefix}{name}.weight": (g.kv_heads * g.head_dim, g.hidden) for name in ("k_proj_hd", "v_proj_hd")}
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        if "norm" in name and name.endswith("weight"):
            yield name, torch.ones(shape, dtype=dtype)
            continue
        start = int(torch.randint(BLOCK, (1,), generator=generator))
        values = noise.roll(-start).repeat(-(-count // BLOCK))[:count].clone().view(shape)
        # Unit variance through every layer; queries and keys stronger, so that attention picks something out.
        scale = 1.0 if name.endswith("embed_tokens.weight") else shape[-1] ** -0.5
        yield name, values * (1.4 * scale if ".q_proj" in name or ".k_proj" in name else scale)


def _write_shards(out: Path, g: Geometry, dtype: torch.dtype, seed: int) -> None:
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal pending, size
        save_file(pending, out / f"shard-{len(shards):05}.safetensors")
        shards.append(list(pending))
        pending, size = {}, 0

    for name, tensor in _tensors(g, dtype, seed):
        if pending and size + tensor.nbytes > SHARD:
            flush()
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    weight_map = {}
    for index, names in enumerate(shards):
        final = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        (out / f"shard-{index:05}.safetensors").rename(out / final)
        weight_map |= dict.fromkeys(names, final)
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index_file))


def _write_tokenizer(out: Path, vocabulary: int) -> None:
    """A byte-level BPE over this file: small, and any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, 512),
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([__file__], trainer)
    tokenizer.save(str(out / "tokenizer.json"))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--dtype", choices=["float16", "float32", "bfloat16"], default="float16")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(write(arguments.shape, arguments.out, getattr(torch, arguments.dtype), seed=arguments.seed))


if __name__ == "__main__":
    main()
