"""The command that builds a bundle again as it was built: what errors give as their fix."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping

from engines.bundle.kinds import BACKENDS, ONNXRUNTIME
from engines.bundle.manifest import Manifest
from engines.bundle.precision import BLOCK_SIZES, INT4, PRECISIONS, block_name
from engines.bundle.tensors import APART, MODEL
from engines.checks import is_integer

_BOARD = re.compile(r"[a-z0-9-]{1,40}")


def rebuild_unknown(path: str | os.PathLike[str]) -> str:
    """The command where nothing says how the bundle was built: its options are left to who knows them."""
    return f"python export/build.py --model CHECKPOINT --out {shlex.quote(os.fspath(path))}"


def apart_of(manifest: Manifest) -> dict[str, str]:
    """How the bundle stores what may be stored apart: names of precisions, or MODEL, by the keys of APART. What its
    options say is text that somebody else wrote: what is no such choice is left out."""
    used = manifest.options
    found = {kind: value for kind, known in APART.items() if (value := used.get(kind)) in known}
    if used.get("quantize_head") is True:  # all that bundles of before know
        found["head"] = manifest.precision
    return {kind: str(found.get(kind, MODEL)) for kind in APART}


def block_of(manifest: Manifest) -> int | None:
    """The block size that a build was told: of the linear layers, or of an int4 head or vision beside others."""
    used, own = manifest.options.get("block_size"), PRECISIONS[manifest.precision].block_sizes
    if INT4.name in apart_of(manifest).values() and len(own) < 2 and used in BLOCK_SIZES:
        return int(str(used))
    return manifest.block_size


def rebuild(
    manifest: Manifest,
    path: str | os.PathLike[str],
    *,
    backend: str | None = None,
    engines: Mapping[str, object] | None = None,
    **changes: object,
) -> str:
    """The command that builds the bundle in `path` again. Where its checkpoint lies, and the data it was calibrated
    with, no manifest says: CHECKPOINT and DATA stand for them.

    backend, engines: others than those of its build; `engines` are fields of engines.trt.options.EngineOptions.
    changes: of the knobs precision (its name), block_size, context, page_slots, kv and kv_cache ("int8"), head, vision
    and embeddings (names of precisions, or MODEL), residency.
    """
    used, g = manifest.options, manifest.geometry
    backend = backend or (str(used["backend"]) if used.get("backend") in BACKENDS else manifest.backend)
    apart = apart_of(manifest)
    knobs: dict[str, object] = {"precision": manifest.precision, "block_size": block_of(manifest), **apart}
    kept = {"kv": g.int8_pages, "kv_cache": g.int8_cache}
    knobs |= {
        "context": g.context,
        "page_slots": g.page_slots,
        "residency": manifest.residency,
        **{knob: "int8" if int8 else "model" for knob, int8 in kept.items()},
    } | changes
    size, precision = knobs["block_size"], PRECISIONS[str(knobs["precision"])]
    words = [rebuild_unknown(path), f"--{precision}"]
    words += ["--block-size", block_name(size)] if is_integer(size) else []
    if "head" not in changes and apart["head"] == manifest.precision:  # what is stored as they are, stays so
        knobs["head"] = precision.name if precision.quantises else MODEL
    same = knobs["head"] == precision.name
    words += ["--quantize-head"] if same else []
    words += [f"--{kind} {knobs[kind]}" for kind in APART if knobs[kind] != MODEL and not (same and kind == "head")]
    if is_integer(size):  # what is quantised, has one
        words += ["--calibrate DATA"] if used.get("calibrate") and precision.calibrates(size) else []
    words += ["--page-budget", str(manifest.page_budget)] if manifest.page_budget != g.pages else []
    words += ["--context", str(knobs["context"])]
    words += ["--projection lazy"] if g.lazy_pages or is_integer(knobs["page_slots"]) else []
    words += ["--page-slots", str(knobs["page_slots"])] if is_integer(knobs["page_slots"]) else []
    words += [f"--{knob.replace('_', '-')} int8" for knob in kept if knobs[knob] == "int8"]
    words += [f"--residency {knobs['residency']}"] if knobs["residency"] != Manifest.residency else []
    words += [f"--check {used['check']}"] if used.get("check") in ("weights", "none") else []
    if backend != ONNXRUNTIME:
        record = used.get(backend) if engines is None else engines
        words += ["--backend", backend, *engine_words(record if isinstance(record, dict) else {})]
    return " ".join(words)


def engine_words(record: Mapping[str, object]) -> list[str]:
    """The options of a command line that say what `record` does, fields of EngineOptions as a manifest or the class
    itself has them. Of a manifest they are text that somebody else wrote: what is no such option is left out."""
    words = ["--no-plugins"] if record.get("plugins") is False else []
    boards = [name for name in _list(record.get("boards")) if isinstance(name, str) and _BOARD.fullmatch(name)]
    targets = [f"sm_{int(sm)}" for sm in _list(record.get("targets")) if is_integer(sm)]
    words += ["--target", ",".join(boards + targets)] if targets else []
    for knob in ("workspace", "optimization_level", "batch", "layers_per_engine"):
        value = record.get(knob)
        words += [f"--{knob.replace('_', '-')}", str(int(value))] if is_integer(value) else []
    words += ["--no-timing-cache"] if record.get("timing_cache") is False else []
    words += ["--keep-log"] if record.get("keep_log") is True else []
    return words


def _list(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else []
