"""Tensors of a checkpoint that no bundle holds: each is proven not to matter, or the build stops."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from engines.bundle.geometry import Geometry
from engines.bundle.tensors import HEAD, TOWER_PREFIX, expected_tensors
from engines.errors import CheckpointError
from export.checkpoint.folder import DTYPES, Checkpoint, read_tower_weights
from export.checkpoint.model_folder import weights_in

EMBEDDING = "model.embed_tokens.weight"
_HIRES = re.compile(r"model\.layers\.(\d+)\.self_attn\.[kv]_proj_hd\.(weight|bias)")
_BLOCK = re.compile(re.escape(TOWER_PREFIX) + r"vision_model\.encoder\.layers\.(\d+)\.")
_FREQUENCIES = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_POSITIONS = TOWER_PREFIX + "vision_model.embeddings.position_ids"
_UNUSED_NORM = TOWER_PREFIX + "vision_model.post_layernorm."
_USED = ("model.", "lm_head.")  # every name the official model has begins like this
_LISTED = 10  # names spelt out for one meaning
_PIECE = 1 << 20  # elements compared at once
_TABLE = "constant table, equal to what is computed instead"


def require_depth(checkpoint: Checkpoint, geometry: Geometry) -> None:
    """CheckpointError unless the weights have as many layers as the geometry says, and at least its vision blocks and
    projections. Comes before anything that lists the tensors of a geometry: a configuration can say any number."""
    projections = 2 * geometry.projector_depth - 1 if geometry.projector_depth > 1 else 0  # GELUs take the odd places
    for prefix, said, exact, why in (
        ("model.layers.", geometry.layers, True, "num_hidden_layers"),
        (f"{TOWER_PREFIX}vision_model.encoder.layers.", geometry.vision.layers, False, "mm_vision_select_layer"),
        ("model.mm_projector.", projections, False, "mm_projector_type"),
    ):
        pattern = re.compile(re.escape(prefix) + r"([0-9]+)\.")
        found = 1 + max((int(match[1]) for name in checkpoint.names if (match := pattern.match(name))), default=-1)
        if found < said or (exact and found > said):
            last = f"end with {prefix}{found - 1}" if found else f"have no {prefix}0"
            raise CheckpointError(
                f"{checkpoint.folder}: the weights {last}",
                expected=f"{prefix}{said - 1} as the last, by config.json ({why})"
                if exact
                else f"{prefix}{said - 1}, by config.json ({why}), in the checkpoint or a vision tower folder",
                fix="check that config.json belongs to these weights and that the download or merge is complete",
            )


def require_one_tower(checkpoint: Checkpoint, tower_folder: Path | None, geometry: Geometry) -> None:
    """CheckpointError when the checkpoint holds a vision tower and the folder that config.json names another one, both
    rounded to the coarser dtype: either may be the one the model was trained with."""
    names = [name for name in expected_tensors(geometry) if name.startswith(TOWER_PREFIX)]
    if tower_folder is None or not weights_in(tower_folder) or checkpoint.info(names[0]).file.parent == tower_folder:
        return
    named = Checkpoint(tower_folder, read_tower_weights(tower_folder)[0])
    for name in names:
        if named.has(name) and not _are_equal((checkpoint, name), (named, name), rounded=True):
            raise CheckpointError(
                f"{checkpoint.folder}: two vision towers that differ, first in {name}: its own, and the one in "
                f"{tower_folder}, which mm_vision_tower names",
                expected="one vision tower",
                fix="if the checkpoint's own counts (it was trained), put the tower's config.json and "
                "preprocessor_config.json alone into a folder inside the checkpoint and name that in mm_vision_tower; "
                "if the other does, remove the tower from the checkpoint's weights",
            )


def dropped_tensors(checkpoint: Checkpoint, geometry: Geometry) -> dict[str, str]:
    """The name of everything of the checkpoint that the bundle leaves out, and why that changes nothing.

    Tensors by name; files and stale tensors as in Checkpoint.unread. Constant tables, shared and zero tensors are read
    and compared. Raises CheckpointError, which names them, for tensors that the official model would compute with, or
    that show that this is not the model config.json describes.
    """
    needed = expected_tensors(geometry)
    dropped, refused = {}, {}
    for name in checkpoint.names:
        if name not in needed:
            reason = _reason(checkpoint, name, geometry, needed)
            if reason is None:
                refused[name] = _meaning(name, geometry)
            else:
                dropped[name] = reason
    if refused:
        raise _refusal(checkpoint, refused)
    return dropped | checkpoint.unread


def _refusal(checkpoint: Checkpoint, refused: dict[str, tuple[str, str]]) -> CheckpointError:
    found = []
    for meaning in dict.fromkeys(refused.values()):
        names = [name for name in refused if refused[name] == meaning]
        more = f", ... and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        found.append(f"{len(names)} x {meaning[0]}: {', '.join(names[:_LISTED])}{more}")
    return CheckpointError(
        f"{checkpoint.folder}: {len(refused)} tensors have no place in the bundle, and they may matter:\n    "
        + "\n    ".join(found),
        expected="tensors of the official model alone, with what config.json says of them",
        fix="; ".join(dict.fromkeys(fix for _, fix in refused.values())),
    )


def _reason(checkpoint: Checkpoint, name: str, g: Geometry, needed: Iterable[str]) -> str | None:
    """Why the bundle may do without this tensor; None if it may not."""
    info = checkpoint.info(name)
    if (hires := _HIRES.fullmatch(name)) and int(hires[1]) <= g.start_layer:
        return f"hi-res projection of a layer that reads no pages (those after {g.start_layer} do)"
    if (block := _BLOCK.match(name)) and int(block[1]) >= g.vision.layers:
        return f"vision block after the selected layer (the first {g.vision.layers} run)"
    if name.startswith(_UNUSED_NORM):
        return "norm after the last vision block, which is not used"
    if name == _POSITIONS:
        positions = torch.arange(g.image_tokens + 1)
        same = info.nbytes <= 8 * len(positions) and torch.equal(
            checkpoint.tensor(name).flatten().double(), positions.double()
        )
        return _TABLE if same else None
    if _FREQUENCIES.fullmatch(name):
        return _TABLE if _is_plain_rotary(checkpoint, name, g) else None
    if name == HEAD and g.tied_embeddings:
        return (
            f"equal to {EMBEDDING}, with which it is shared"
            if _are_equal((checkpoint, name), (checkpoint, EMBEDDING))
            else None
        )
    if name.endswith(".bias") and f"{name.removesuffix('.bias')}.weight" in needed and _is_zero(checkpoint, name):
        return "bias of zeros: adds nothing"
    if not name.startswith(_USED):
        return "outside the model: no part of it has this name"
    return None


def _meaning(name: str, g: Geometry) -> tuple[str, str]:
    """What a tensor that may not be left out is, and what helps."""
    if name == HEAD:
        return (
            f"an output layer that differs from {EMBEDDING}, though tie_word_embeddings is true",
            'set "tie_word_embeddings": false in config.json if lm_head.weight counts, or remove it from the weights',
        )
    if name == _POSITIONS or _FREQUENCIES.fullmatch(name):
        return (
            f"a table that differs from what config.json implies (rope_theta {g.rope_theta:g})",
            "put into config.json what the weights were trained with",
        )
    if name.endswith(".bias"):
        return (
            "a bias that is not zero, of a layer that has none here",
            'set "attention_bias": true in config.json, if q, k, v and o all have biases'
            if ".self_attn." in name and not name.startswith(TOWER_PREFIX)
            else "use a checkpoint of the official model: it has no biases there",
        )
    return (
        "a part that this model does not have",
        "export the checkpoint of a LLaVA-FlexAttention model; what was added to it must be merged into its weights",
    )


def _is_zero(checkpoint: Checkpoint, name: str) -> bool:
    info = checkpoint.info(name)
    is_vector = len(info.shape) == 1 and info.nbytes <= 8 * _PIECE
    return is_vector and info.dtype in DTYPES and not checkpoint.tensor(name).any()


def _is_plain_rotary(checkpoint: Checkpoint, name: str, g: Geometry) -> bool:
    """Whether a stored table of frequencies is rope_theta's, as far as its dtype tells: within two units in the last
    place, since powers are rounded differently from machine to machine."""
    info, exact = checkpoint.info(name), 1.0 / g.rope_theta ** (torch.arange(0, g.head_dim, 2).double() / g.head_dim)
    if info.shape != tuple(exact.shape) or info.dtype not in DTYPES:
        return False
    limits = torch.finfo(torch.float32 if info.dtype == torch.float64 else info.dtype)  # computed in float32 at best
    stored = checkpoint.tensor(name).double()
    return torch.allclose(stored, exact, rtol=2 * limits.eps, atol=limits.smallest_normal * limits.eps)


def _are_equal(one: tuple[Checkpoint, str], two: tuple[Checkpoint, str], rounded: bool = False) -> bool:
    """Whether two tensors hold the same numbers, compared a few rows at a time; rounded: to the coarser dtype."""
    infos = [checkpoint.info(name) for checkpoint, name in (one, two)]
    if infos[0].shape != infos[1].shape or not {info.dtype for info in infos} <= {*DTYPES}:
        return False
    coarser = max((info.dtype for info in infos), key=lambda dtype: torch.finfo(dtype).eps)
    compared = coarser if rounded else torch.float64
    columns = infos[0].shape[-1]
    elements = max(1, _PIECE // columns) * columns
    pieces = [
        checkpoint.chunks(name, elements * info.dtype.itemsize)
        for (checkpoint, name), info in zip((one, two), infos, strict=True)
    ]
    for pair in zip(*pieces, strict=True):
        left, right = (
            torch.frombuffer(bytearray(data), dtype=info.dtype) for data, info in zip(pair, infos, strict=True)
        )
        if not torch.equal(left.to(compared), right.to(compared)):
            return False
    return True
