"""Random checkpoints in the official layout: `python tests/bench/random_checkpoint.py --shape 7b --out DIR`.

Answers are meaningless as text; shapes, names, shards and sizes are those of a trained checkpoint. "7b" takes 16.2 GB.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engines.bundle.geometry import Geometry
from export.checkpoint.config import read_config
from export.checkpoint.folder import expected_tensors

SHARD = 1 << 30  # bytes
BLOCK = 1 << 24  # random numbers drawn once; tensors are windows of them
DECODERS = {
    "small": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 12, "num_attention_heads": 4},
    "mid": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 16, "num_attention_heads": 8},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "7b-slice": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 4, "num_attention_heads": 32},
}
START_LAYER = {"7b-slice": "1"}  # two layers of each kind; the others start where official code does
VOCABULARY = {"small": 512, "mid": 4096, "7b": 32000, "7b-slice": 32000}
SMALL_TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 336,
    "patch_size": 14, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "model_type": "clip_vision_model",
}  # fmt: skip


def write(
    shape: str,
    out: Path,
    dtype: torch.dtype = torch.float16,
    *,
    seed: int = 0,
    threshold: int = 48,
    context: int = 2048,
) -> Path:
    """Write a checkpoint of `shape`, a key of DECODERS, into `out` and return it; threshold -1 selects all."""
    out.mkdir(parents=True, exist_ok=True)
    tower = "openai/clip-vit-large-patch14-336" if shape.startswith("7b") else "clip"
    config = {
        **DECODERS[shape],
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "vocab_size": VOCABULARY[shape],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": context,
        "tokenizer_model_max_length": context,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "image_aspect_ratio": "pad",
        "mm_vision_tower": tower,
        "mm_vision_select_layer": -2,
        "mm_projector_type": "mlp2x_gelu",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "extra": {
            "highres_size": "1008",
            "lowres_size": "336",
            "threshold": str(threshold),
            "warmup": "10",
            "zoom_ratio": "3",
            **({"start_layer": START_LAYER[shape]} if shape in START_LAYER else {}),
        },
    }
    (out / "config.json").write_text(json.dumps(config, indent=1))
    if tower == "clip":
        (out / "clip").mkdir(exist_ok=True)
        (out / "clip" / "config.json").write_text(json.dumps(SMALL_TOWER, indent=1))
    _write_tokenizer(out, VOCABULARY[shape])
    _write_shards(out, read_config(out).geometry, dtype, seed)
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
    parser.add_argument("--shape", choices=DECODERS, default="small")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--dtype", choices=["float16", "float32", "bfloat16"], default="float16")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(write(arguments.shape, arguments.out, getattr(torch, arguments.dtype), seed=arguments.seed))


if __name__ == "__main__":
    main()
