"""Packed checkpoints for tests: AWQ and GPTQ written bit by bit, from the definitions of the formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from engines.bundle.tensors import is_quantised
from export.checkpoint.config import read_config

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight columns is in bits 0-3, 4-7, ...


@dataclass(frozen=True)
class Format:
    """A way to quantise and pack. group -1: all inputs share a scale."""

    method: str = "awq"
    bits: int = 4
    group: int = 16
    symmetric: bool = True
    v2: bool = False

    @property
    def config(self) -> dict[str, object]:
        """`quantization_config`, with the keys its own packers write."""
        if self.method == "awq":
            version = {"version": "gemm", "zero_point": not self.symmetric, "modules_to_not_convert": None}
            return {"quant_method": "awq", "bits": 4, "group_size": self.group, **version}
        kind = {"desc_act": False, "sym": self.symmetric, "checkpoint_format": "gptq_v2" if self.v2 else "gptq"}
        return {"quant_method": "gptq", "bits": self.bits, "group_size": self.group, "damp_percent": 0.01, **kind}


@dataclass(frozen=True)
class Quantised:
    """A weight rounded to nearest: codes [K, N], zeros and float16 scales [K / group, N]."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray

    @property
    def integers(self) -> np.ndarray:
        """code - zero [K, N] int64."""
        return self.codes - self.zeros.repeat(len(self.codes) // len(self.zeros), axis=0)

    @property
    def values(self) -> np.ndarray:
        """The weight [N, K] float32 they stand for; the products are exact."""
        steps = self.scales.astype(np.float32).repeat(len(self.codes) // len(self.scales), axis=0)
        return np.ascontiguousarray((self.integers.astype(np.float32) * steps).T)


def quantise(weight: torch.Tensor, format: Format) -> Quantised:
    """A weight [N, K] in the format's groups."""
    columns = weight.double().numpy().T
    k, n = columns.shape
    group = k if format.group == -1 else format.group
    blocks = columns.reshape(k // group, group, n)
    most, middle = 2**format.bits - 1, 2 ** (format.bits - 1)
    low, high = np.minimum(blocks.min(1), 0), np.maximum(blocks.max(1), 0)
    span = 2 * np.abs(blocks).max(1) if format.symmetric else high - low
    scales = np.maximum(span / most, 1e-6).astype(np.float16)
    steps = scales.astype(np.float64)
    zeros = np.full(steps.shape, middle) if format.symmetric else np.rint(-low / steps).clip(1, most).astype(np.int64)
    codes = (np.rint(blocks / steps[:, None]) + zeros[:, None]).clip(0, most).astype(np.int64)
    return Quantised(codes.reshape(k, n), zeros.astype(np.int64), scales)


def pack(prefix: str, q: Quantised, format: Format) -> dict[str, torch.Tensor]:
    """The tensors of a packed layer."""
    k = len(q.codes)
    if format.method == "awq":
        words = {"qweight": _awq(q.codes), "qzeros": _awq(q.zeros)}
    else:
        zeros = q.zeros if format.v2 else q.zeros - 1
        rows = np.ascontiguousarray(_in_order(q.codes.T, format.bits).T)
        g_idx = np.arange(k, dtype=np.int32) // (k if format.group == -1 else format.group)
        words = {"qweight": rows, "qzeros": _in_order(zeros, format.bits), "g_idx": g_idx}
    return {f"{prefix}.{key}": torch.from_numpy(value) for key, value in {**words, "scales": q.scales}.items()}


def write_packed(
    source: Path,
    folder: Path,
    format: Format,
    *,
    floats: Callable[[str], bool] = lambda name: False,
    head: bool = False,
    overrides: dict[str, torch.Tensor | None] | None = None,
    beside: str | None = None,
    **config: object,
) -> tuple[Path, Path, dict[str, Quantised]]:
    """Pack the checkpoint `source` into `folder`; also its exact float values as a checkpoint `folder`-floats.

    floats: the linear weights that are left as they are; overrides: tensors replaced or, with None, removed; beside: a
    file of its own for the settings; config: entries of them. Everything else is rounded to float16. Returns the two
    folders and what the packed weights hold.
    """
    g = read_config(source).geometry
    packed, plain, held = {}, {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if is_quantised(name, g, head) and not floats(name):
            held[name] = q = quantise(tensor, format)
            packed |= pack(name.removesuffix(".weight"), q, format)
            plain[name] = torch.from_numpy(q.values)
        else:
            packed[name] = plain[name] = tensor.half()
    packed |= overrides or {}
    settings = {**format.config, **({"lm_head": True} if head else {}), **config}
    original = json.loads((source / "config.json").read_text())
    exact = folder.with_name(f"{folder.name}-floats")
    for out, tensors in ((folder, packed), (exact, plain)):
        (out / "clip").mkdir(parents=True)
        (out / "clip" / "config.json").write_text((source / "clip" / "config.json").read_text())
        save_file({name: t.contiguous() for name, t in tensors.items() if t is not None}, out / "model.safetensors")
        own = {"quantization_config": settings} if out == folder and beside is None else {}
        (out / "config.json").write_text(json.dumps(original | own))
    if beside is not None:
        (folder / beside).write_text(json.dumps(settings))
    return folder, exact, held


def _in_order(codes: np.ndarray, bits: int) -> np.ndarray:
    """[r, c] -> int32 [r, c * bits / 32]: the first column in the lowest bits."""
    per = 32 // bits
    words = np.zeros((len(codes), codes.shape[1] // per), np.uint32)
    for place in range(per):
        words |= codes[:, place::per].astype(np.uint32) << np.uint32(bits * place)
    return words.view(np.int32)


def _awq(codes: np.ndarray) -> np.ndarray:
    words = np.zeros((len(codes), codes.shape[1] // 8), np.uint32)
    for place, column in enumerate(AWQ_ORDER):
        words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * place)
    return words.view(np.int32)
