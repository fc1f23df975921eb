"""Scales of input channels, folded into a checkpoint: the same network in other numbers, no operator more.

A linear layer's columns are multiplied by the scales of its input, and what makes that input is divided by them:

| scales | columns multiplied | divided |
|---|---|---|
| `model.layers.N.attention` [hidden] | q_proj, k_proj, v_proj | weight of input_layernorm |
| `model.layers.N.output` [kv_heads * hd] | o_proj | rows and biases of v_proj and v_proj_hd |
| `model.layers.N.mlp` [hidden] | gate_proj, up_proj | weight of post_attention_layernorm |
| `model.layers.N.down` [intermediate] | down_proj | rows of up_proj |
| `head` [hidden] | lm_head, where it is quantised as they are | weight of the last norm |

Heads that share values share their scales. k_proj_hd and v_proj_hd have no scales of their own input: hi-res features
come from the projector without a norm, and its output is the low-res image tokens, too.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from engines.bundle.folder import Bundle
from engines.bundle.geometry import Geometry
from engines.errors import BundleError
from export.checkpoint.folder import Checkpoint
from export.checkpoint.formats.key_table import TensorInfo

HEAD_GROUP = "head"


def group_sizes(g: Geometry, head: bool) -> dict[str, int]:
    """Channels of every group of scales, in model order."""
    sizes: dict[str, int] = {}
    for index in range(g.layers):
        base = f"model.layers.{index}."
        sizes |= {f"{base}attention": g.hidden, f"{base}output": g.kv_heads * g.head_dim}
        sizes |= {f"{base}mlp": g.hidden, f"{base}down": g.intermediate}
    return {**sizes, HEAD_GROUP: g.hidden} if head else sizes


def spread(scales: Tensor, g: Geometry) -> Tensor:
    """Scales of value channels [kv_heads * hd] for every head that reads them: [heads * hd]."""
    return scales.view(g.kv_heads, 1, g.head_dim).expand(-1, g.heads // g.kv_heads, -1).flatten()


class Folded:
    """A checkpoint whose tensors carry the scales; what they change is float32. `info`, `chunks` and
    `tensor` as of Checkpoint (export/checkpoint/folder.py)."""

    def __init__(self, checkpoint: Checkpoint, g: Geometry, scales: Mapping[str, Tensor]) -> None:
        self._checkpoint = checkpoint
        self._columns: dict[str, Tensor] = {}  # of a weight [N, K]: multiplied
        self._rows: dict[str, Tensor] = {}  # of a weight [N, K], or of a vector [N]: divided
        for group, values in scales.items():
            self._add(group, values, g)

    def _add(self, group: str, values: Tensor, g: Geometry) -> None:
        if group == HEAD_GROUP:
            self._columns["lm_head.weight"], self._rows["model.norm.weight"] = values, values
            return
        base, kind = group.rsplit(".", 1)
        attend, mlp = f"{base}.self_attn", f"{base}.mlp"
        if kind == "attention":
            self._rows[f"{base}.input_layernorm.weight"] = values
            self._columns |= {f"{attend}.{name}_proj.weight": values for name in "qkv"}
        elif kind == "output":
            self._columns[f"{attend}.o_proj.weight"] = spread(values, g)
            names = ("v_proj", "v_proj_hd")
            self._rows |= {f"{attend}.{name}.{what}": values for name in names for what in ("weight", "bias")}
        elif kind == "mlp":
            self._rows[f"{base}.post_attention_layernorm.weight"] = values
            self._columns |= {f"{mlp}.{name}_proj.weight": values for name in ("gate", "up")}
        else:
            self._columns[f"{mlp}.down_proj.weight"], self._rows[f"{mlp}.up_proj.weight"] = values, values

    def info(self, name: str) -> TensorInfo:
        """See Checkpoint.info; `file` and `offset` are those of the checkpoint's tensor."""
        info = self._checkpoint.info(name)
        if name not in self._columns and name not in self._rows:
            return info
        return replace(info, dtype=torch.float32, nbytes=4 * torch.Size(info.shape).numel())

    def chunks(self, name: str, max_bytes: int = 16 << 20) -> Iterator[bytes]:
        """See Checkpoint.chunks."""
        info = self._checkpoint.info(name)
        columns, rows = self._columns.get(name), self._rows.get(name)
        if columns is None and rows is None:
            yield from self._checkpoint.chunks(name, max_bytes)
            return
        start, width = 0, info.shape[1] if len(info.shape) == 2 else 1
        for chunk in self._checkpoint.chunks(name, max_bytes // 4 * info.dtype.itemsize):
            values = torch.frombuffer(bytearray(chunk), dtype=info.dtype).float()
            at = torch.arange(start, start + len(values))
            if columns is not None:
                values *= columns[at % width]
            if rows is not None:
                values /= rows[at // width]
            start += len(values)
            yield values.numpy().tobytes()

    def tensor(self, name: str) -> Tensor:
        """See Checkpoint.tensor."""
        info = self.info(name)
        return torch.frombuffer(bytearray(b"".join(self.chunks(name))), dtype=info.dtype).reshape(info.shape)


def to_bytes(scales: Mapping[str, Tensor]) -> bytes:
    """The scales as the bundle stores them: a NumPy archive, the same bytes for the same scales."""
    file = io.BytesIO()
    np.savez(file, **{name: values.numpy() for name, values in scales.items()})
    return file.getvalue()


def read_scales(bundle: Bundle) -> dict[str, Tensor]:
    """The scales a bundle was built with; empty where it was built without. BundleError for anything else."""
    name, g = bundle.manifest.scales, bundle.manifest.geometry
    if name is None:
        return {}
    with open(bundle.file(name), "rb") as file:
        scales = _read(file, name)
    expected = group_sizes(g, bundle.manifest.options.get("quantize_head") is True)
    if {group: tuple(values.shape) for group, values in scales.items()} != {
        group: (size,) for group, size in expected.items()
    }:
        raise BundleError(f"the scales in {name} are not this model's", fix="build the bundle again")
    for group, values in scales.items():
        if values.dtype != torch.float32 or not bool(((values > 0) & (values < torch.inf)).all()):
            raise BundleError(
                f"{group} in {name} is no scale", expected="positive float32 numbers", fix="build the bundle again"
            )
    return scales


def _read(file: BinaryIO, name: str) -> dict[str, Tensor]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {group: torch.from_numpy(archive[group]) for group in archive.files}
    except Exception as error:  # zipfile and NumPy raise a dozen kinds for damaged data
        raise BundleError(f"{name} holds no scales: {error}", fix="build the bundle again") from error
