"""Checkpoints that come quantised, in AWQ or GPTQ packing: what their configuration says, and what it leaves to choose.

The settings are `quantization_config` in config.json or, of older checkpoints, quantize_config.json (AutoGPTQ) or
quant_config.json (AutoAWQ) beside it. A packed value is (code - zero) * scale, with codes 0 .. 2^bits - 1 and, for each
group of inputs, a zero and a scale. A bundle stores integer * scale (export/weights), which is the same value:

  symmetric, every zero 2^(bits - 1)   integer = code - zero has as many bits as the code: int4, int8
  4 bits with other zeros              integer = code - zero is in -15 .. 15: exact in int8, in twice the bytes, for
                                       TensorRT takes no zero points
  8 bits with other zeros              has nine bits: refused
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from engines.bundle.geometry import Geometry
from engines.bundle.precision import BLOCK_SIZES, INT4, INT8, Precision
from engines.bundle.tensors import HEAD, fitting_blocks, quantised_tensors
from engines.checks import shown
from engines.errors import ConfigError, OptionError
from export.checkpoint.settings import parse, present, read_object

_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # files that need not name their method
_BITS = {"awq": (4,), "gptq": (4, 8)}
_FORMATS = {"awq": ("gemm",), "gptq": ("gptq", "gptq_v2")}  # the first when none is named
_USUAL = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
_UNPACKED = "use the checkpoint it was made from: --int4 or --int8 quantises that"


class _Settings(BaseModel):
    """The keys that matter, under all the names they have had."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    quant_method: str
    bits: int = Field(validation_alias=AliasChoices("bits", "w_bit"))
    group_size: int = Field(validation_alias=AliasChoices("group_size", "q_group_size"))
    format: str | None = Field(None, validation_alias=AliasChoices("checkpoint_format", "version", "format"))
    zero_point: bool = True  # AWQ
    sym: bool | None = None  # GPTQ, where it is true when absent; newer AWQ checkpoints have both
    desc_act: bool = False
    lm_head: bool = False
    is_marlin_format: bool = False
    pack_dtype: str = "int32"
    dynamic: dict[str, Any] = {}
    modules_to_not_convert: list[str] = []
    modules_in_block_to_quantize: list[list[str]] | None = None


@dataclass(frozen=True)
class Packing:
    """How linear layers are packed.

    method: "awq" or "gptq". group: inputs that share a zero and a scale, None = all of them. symmetric: every zero is
    2^(bits - 1). zero_offset: what a stored zero lacks (GPTQ's first format stores zero - 1). desc_act: groups may be
    of inputs in another order. head: lm_head is packed, too. skipped: modules with one of these in their name are
    floats; only: in each layer these alone are packed.
    """

    method: str
    bits: int
    group: int | None
    symmetric: bool
    zero_offset: int = 0
    desc_act: bool = False
    head: bool = False
    skipped: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None

    @property
    def precision(self) -> Precision:
        """The one that holds its integers."""
        return INT4 if self.bits == 4 and not self.grows else INT8

    @property
    def grows(self) -> bool:
        """Whether its integers (code - zero) take more bits than its codes."""
        return not self.symmetric

    @property
    def text(self) -> str:
        """For people: awq, 4 bits, groups of 128, with zero points."""
        groups = "a group per output" if self.group is None else f"groups of {self.group}"
        return f"{self.method}, {self.bits} bits, {groups}, {'symmetric' if self.symmetric else 'with zero points'}"

    def block(self, g: Geometry) -> int:
        """Values that share a scale in the bundle: the group; of a whole column the largest block that divides every
        one, its scale repeated. OptionError when none does."""
        if self.group is not None:
            return self.group
        shapes = quantised_tensors(g, self.head).values()
        fits = fitting_blocks(shapes)
        if not fits:
            raise OptionError(
                f"no block size divides the inputs of every layer: {sorted({k for _, k in shapes})}",
                expected=f"one of {', '.join(map(str, BLOCK_SIZES))}",
            )
        return fits[-1]

    def floats(self, g: Geometry) -> tuple[str, ...]:
        """Weights of the decoder's linear layers that should be floats in the checkpoint: from its settings alone."""
        return tuple(name for name in quantised_tensors(g, self.head) if not self._has(name))

    def _has(self, name: str) -> bool:
        module = name.removesuffix(".weight")
        if name == HEAD:
            return self.head
        if self.only is not None:
            return module.split(".", 3)[3] in self.only
        return not any(part in module for part in self.skipped)


def read_packing(folder: Path, config: Mapping[str, Any]) -> Packing | None:
    """How the checkpoint in `folder`, whose config.json is `config`, is packed; None when it holds floats.

    ConfigError, naming the file and the key, for another method of quantisation and for what cannot be carried over.
    """
    found = config.get("quantization_config") or config.get("compression_config")
    if found:
        return _packing(found, Path(folder) / "config.json: quantization_config")
    for name, method in _BESIDE.items():
        path = Path(folder) / name
        if present(path):
            return _packing({"quant_method": method} | read_object(path), path)
    return None


def _packing(raw: Any, path: Path) -> Packing:
    def refuse(found: str, expected: str, fix: str | None = _UNPACKED) -> None:
        raise ConfigError(f"{path}: {found}", expected=expected, fix=fix)

    given = {key: value for key, value in raw.items() if value is not None} if isinstance(raw, dict) else raw
    method = str(given.get("quant_method")).lower() if isinstance(given, dict) else None
    if method not in _FORMATS:
        fix = f"{_UNPACKED}; if its weights are floats, remove these settings"
        refuse(f"a checkpoint quantised with {shown(method)}", "quant_method " + " or ".join(_FORMATS), fix)
    s = parse(_Settings, given, path)
    formats = _FORMATS[method]
    format = "marlin" if s.is_marlin_format else (s.format or formats[0]).lower()
    if format not in formats:
        refuse(f"{method} in the format {shown(format)}", " or ".join(formats))
    if s.bits not in _BITS[method]:
        refuse(f"{method} with {shown(s.bits)} bits", f"{' or '.join(map(str, _BITS[method]))} bits")
    if s.group_size != -1 and s.group_size not in BLOCK_SIZES:
        refuse(f"group_size is {shown(s.group_size)}", f"-1, {', '.join(map(str, BLOCK_SIZES))}")
    if s.pack_dtype != "int32":
        refuse(f"pack_dtype is {shown(s.pack_dtype)}", "int32")
    mixed = [key for key in s.dynamic if not key.startswith("-:")]  # those say what is left out
    if mixed:
        refuse(
            f"dynamic: modules like {shown(mixed[0])} have settings of their own", "the same bits and groups everywhere"
        )
    symmetric = s.sym is not False if method == "gptq" else bool(s.sym) or not s.zero_point
    if s.bits == 8 and not symmetric:
        refuse("8 bits with zero points (sym is false)", "sym true: code - zero point has nine bits otherwise")
    only = None
    if method == "gptq":
        blocks = s.modules_in_block_to_quantize
        only = tuple(_USUAL.split()) if blocks is None else tuple(name for block in blocks for name in block)
    return Packing(
        method=method,
        bits=s.bits,
        group=None if s.group_size == -1 else s.group_size,
        symmetric=symmetric,
        zero_offset=1 if format == "gptq" else 0,
        desc_act=s.desc_act and method == "gptq",
        head=s.lm_head,
        skipped=tuple(s.modules_to_not_convert),
        only=only,
    )
