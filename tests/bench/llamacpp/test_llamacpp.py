"""The benchmark beside llama.cpp: that its GGUF file holds the checkpoint's weights, and what it prints. llama.cpp
itself is no dependency; the command compares what both models say before it measures."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from export.checkpoint.config import read_config
from export.checkpoint.folder import Checkpoint
from tests.bench.llamacpp.__main__ import Contender, LlamaCpp, alike, table
from tests.bench.llamacpp.weights import IN_LAYER, write_gguf
from tests.checkpoints import write_checkpoint
from tests.geometries import tiny


def read(path) -> tuple[gguf.GGUFReader, dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    return reader, {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in reader.tensors}


def test_a_file_holds_the_weights(tmp_path):
    g = tiny(hidden=64, intermediate=96, head_dim=16)
    model = write_checkpoint(tmp_path / "checkpoint", g)
    config = read_config(model)
    checkpoint = Checkpoint.open(model, config.tower_folder)
    reader, exact = read(write_gguf(model, tmp_path / "exact.gguf", exact=True))
    assert len(exact) == 3 + len(IN_LAYER) * g.layers
    assert reader.get_field("llama.attention.head_count_kv").contents() == g.kv_heads
    assert reader.get_field("llama.rope.freq_base").contents() == pytest.approx(g.rope_theta)
    expected = checkpoint.tensor("model.layers.1.mlp.down_proj.weight").float().numpy()
    np.testing.assert_array_equal(exact["blk.1.ffn_down.weight"], expected)
    _, coded = read(write_gguf(model, tmp_path / "coded.gguf"))
    for name, weight in exact.items():
        step = 0 if weight.ndim == 1 else 1 / 64 if "blk" not in name else 1 / 7  # of the largest of a block
        assert np.abs(coded[name] - weight).max() <= step * np.abs(weight).max() + 1e-7
    assert any((coded[name] != weight).any() for name, weight in exact.items())


def test_heads_turn_as_they_do_here(tmp_path):
    """llama.cpp turns neighbours of the rows it is given; scores must be those of halves of the checkpoint's rows."""
    g = tiny(hidden=64, intermediate=96, head_dim=16)
    model = write_checkpoint(tmp_path / "checkpoint", g)
    checkpoint = Checkpoint.open(model, read_config(model).tower_folder)
    _, theirs = read(write_gguf(model, tmp_path / "exact.gguf", exact=True))
    x = torch.randn(2, g.hidden, generator=torch.Generator().manual_seed(0))
    angle = torch.arange(2)[:, None] * g.rope_theta ** (-torch.arange(0, g.head_dim, 2) / g.head_dim)

    def split(weight: torch.Tensor, heads: int) -> torch.Tensor:
        return (x @ weight.T).unflatten(1, (heads, -1)).transpose(0, 1)

    def halves(name: str, heads: int) -> torch.Tensor:
        weight = checkpoint.tensor(f"model.layers.0.self_attn.{name}_proj.weight").float()
        rows, turn = split(weight, heads)[None], torch.cat((angle, angle), -1)[None]
        return apply_rotary_pos_emb(rows, rows, turn.cos(), turn.sin())[0][0]

    def neighbours(name: str, heads: int) -> torch.Tensor:
        rows = split(torch.tensor(theirs[f"blk.0.attn_{name}.weight"]), heads)
        turned = torch.view_as_complex(rows.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones(()), angle)
        return torch.view_as_real(turned).flatten(-2)

    def scores(turned: Callable[[str, int], torch.Tensor]) -> torch.Tensor:
        key = turned("k", g.kv_heads).repeat_interleave(g.heads // g.kv_heads, 0)
        return turned("q", g.heads) @ key.transpose(-1, -2)

    torch.testing.assert_close(scores(neighbours), scores(halves))


def test_what_is_compared_and_printed():
    logits = np.array([3.0, 1.0, 0.0, -1.0])
    probabilities = np.exp(logits) / np.exp(logits).sum()
    assert alike(logits, list(enumerate(probabilities))) == pytest.approx(1)
    assert alike(logits[::-1], list(enumerate(probabilities))) < 0
    _, *lines = table([Contender("there", [2.0], [0.04]), Contender("here", [3.0, 2.0, 5.0], [0.02])])
    assert lines == [["there", "2.00 s", "1.00x", "40.0 ms", "1.00x"], ["here", "3.00 s", "1.50x", "20.0 ms", "0.50x"]]


def test_no_package(tmp_path):
    with pytest.raises(RuntimeError, match="node-llama-cpp"):
        LlamaCpp(tmp_path, tmp_path / "none.gguf", 1)
