"""The decoder of a checkpoint as a GGUF file, for llama.cpp: layers in Q4_0, head and embeddings in Q8_0."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch

from engines.bundle.geometry import Geometry
from export.checkpoint.config import read_config
from export.checkpoint.folder import Checkpoint

LAYER, TABLE, EXACT = (getattr(gguf.GGMLQuantizationType, name) for name in ("Q4_0", "Q8_0", "F32"))
# What llama.cpp calls what, in a layer and outside.
IN_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(model: Path, out: Path, *, exact: bool = False) -> Path:
    """Write the decoder of the checkpoint `model` as `out` and return it. What reads hi-res pages is left out: without
    an image, or without selected pages, that is the whole model. exact: everything in float32."""
    config = read_config(model)
    g, checkpoint = config.geometry, Checkpoint.open(model, config.tower_folder)
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(g.context)
    writer.add_embedding_length(g.hidden)
    writer.add_block_count(g.layers)
    writer.add_feed_forward_length(g.intermediate)
    writer.add_head_count(g.heads)
    writer.add_head_count_kv(g.kv_heads)
    writer.add_layer_norm_rms_eps(g.rms_eps)
    writer.add_rope_freq_base(g.rope_theta)
    writer.add_rope_dimension_count(g.head_dim)
    writer.add_vocab_size(g.vocab)
    _add_tokenizer(writer, g.vocab)
    for name, kind, weight in _tensors(checkpoint, g):
        kind = EXACT if exact or weight.ndim == 1 else kind
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _tensors(checkpoint: Checkpoint, g: Geometry) -> Iterator[tuple[str, gguf.GGMLQuantizationType, np.ndarray]]:
    """Name, how it is stored, and float32 weights."""

    def weight(name: str) -> np.ndarray:
        return checkpoint.tensor(f"{name}.weight").to(torch.float32).numpy()

    for ours, theirs in OUTSIDE.items():
        yield f"{theirs}.weight", TABLE, weight(ours)
    for layer in range(g.layers):
        for ours, theirs in IN_LAYER.items():
            values = weight(f"model.layers.{layer}.{ours}")
            if ours.endswith(("q_proj", "k_proj")):
                values = _interleaved(values, g.head_dim)
            yield f"blk.{layer}.{theirs}.weight", LAYER, values


def _interleaved(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows [heads * head_dim, in] of each head in the order that llama.cpp turns them in: it pairs neighbours, where
    Hugging Face's layout pairs the two halves."""
    halves = weight.reshape(-1, 2, head_dim // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def _add_tokenizer(writer: gguf.GGUFWriter, vocab: int) -> None:
    """One that llama.cpp accepts; ids are what is asked, so that no text passes through it."""
    special = [("<unk>", gguf.TokenType.UNKNOWN), ("<s>", gguf.TokenType.CONTROL), ("</s>", gguf.TokenType.CONTROL)]
    letters = [(f"<0x{byte:02X}>", gguf.TokenType.BYTE) for byte in range(256)]
    pieces = [*special, *letters][:vocab]
    pieces += [(f"w{index}", gguf.TokenType.NORMAL) for index in range(len(pieces), vocab)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in pieces])
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types([kind for _, kind in pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
