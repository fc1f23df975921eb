"""What a manifest says, checked before anything is made of it: numbers in their ranges, names that are files of the
folder, and parts that fit the geometry and each other."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from engines.bundle.geometry import Geometry
from engines.bundle.kinds import BACKENDS, ONNXRUNTIME, OPTIONAL, PARTS, kinds, layers_of
from engines.bundle.manifest import MANIFEST, Manifest, Plan, is_system_prompt, is_template, is_turn_template
from engines.bundle.pages import equally_long
from engines.bundle.precision import PRECISIONS
from engines.bundle.specs import graph_io, plan_io, symbols
from engines.residency import RESIDENCIES
from plugins.op import ITEMSIZE

# The sizes that are believed, of a checkpoint's config too: many times those of any published model, and small enough
# that what is computed from them alone, names and shapes of every tensor, stays in the megabytes; of the context, two
# rotary tables of 256 MB at heads of 128.
SIZES = {
    "hidden": (1, 1 << 17), "intermediate": (1, 1 << 19), "layers": (2, 512), "heads": (1, 1024), "kv_heads": (1, 1024),
    "head_dim": (2, 4096), "vocab": (1, 1 << 22), "projector_depth": (1, 16), "context": (1, 1 << 20),
    "lowres": (1, 1 << 13), "zoom": (1, 32), "cells": (1, 512), "start_layer": (0, 510),
    # Of a map scaled to 0 .. 255; what is below selects everything, what is above nothing.
    "threshold": (-(1 << 31), (1 << 31) - 1),
    "vision.hidden": (1, 1 << 17), "vision.intermediate": (1, 1 << 19), "vision.layers": (0, 512),
    "vision.heads": (1, 1024), "vision.patch": (1, 1 << 13),
}  # fmt: skip
NUMBERS = {"rms_eps": (0.0, 1.0), "vision.eps": (0.0, 1.0), "rope_theta": (0.0, 1e12)}  # least excluded, most included
# Pixels are 0 .. 1, and so is their mean. They deviate from it by half at most; 1 leaves them as they are, 1/255 makes
# bytes of them.
MEAN, STD = (0.0, 1.0), (1e-3, 1.0)
HIRES_SIDE = 1 << 10  # hi-res tokens a side; official 72. The order of the pages takes 8 MB at this
FILE_BYTES = 1 << 46
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")  # nothing that any file system takes for another folder
_DEVICES = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9])(\..*)?", re.IGNORECASE)  # devices in every folder, on Windows
_SHA256 = re.compile(r"[0-9a-f]{64}")


def contradiction(manifest: Manifest) -> str | None:
    """What in a well-formed manifest is out of range, or does not fit together: the first, in words; or None."""
    return next(_contradictions(manifest), None)


def _contradictions(manifest: Manifest) -> Iterator[str]:
    yield from contradictions_of(manifest.geometry)  # first: the others compute with it
    yield from _of_files(manifest)
    g = manifest.geometry
    if manifest.precision not in PRECISIONS:
        yield f"precision {manifest.precision!r:.100}, expected one of {list(PRECISIONS)}"
    precision = PRECISIONS[manifest.precision]
    sizes = precision.block_sizes or (None,)
    if manifest.block_size not in sizes:
        yield f"block size {manifest.block_size} with {manifest.precision}, expected {' or '.join(map(str, sizes))}"
    if manifest.backend not in BACKENDS:
        yield f"backend {manifest.backend!r:.100}, expected one of {list(BACKENDS)}"
    if manifest.residency not in RESIDENCIES:
        yield f"residency {manifest.residency!r:.100}, expected one of {list(RESIDENCIES)}"
    if not 0 <= manifest.page_budget <= g.pages:
        yield f"page_budget {manifest.page_budget}, expected 0 .. {g.pages}"
    if list(manifest.parts) != list(PARTS):
        yield f"parts {list(manifest.parts)}, expected {list(PARTS)}"
    prompt = manifest.prompt
    if not is_template(prompt.template):
        yield f"prompt template {prompt.template!r:.100}, expected one <image> and one {{prompt}}"
    if prompt.turn is not None and not is_turn_template(prompt.turn):
        yield f"turn template {prompt.turn!r:.100}, expected one {{answer}}, then one {{prompt}}, and no <image>"
    if prompt.system is not None and not is_system_prompt(prompt.system, prompt.template):
        yield f"system text {prompt.system!r:.100}, expected once in the template, before <image> and {{prompt}}"
    ids = {"eos_token_ids": prompt.eos_token_ids, "bos_token_id": (prompt.bos_token_id,)}
    for name, values in ids.items():
        odd = [value for value in values if value is not None and not 0 <= value < g.vocab]
        if odd:
            yield f"{name} {odd[0]}, expected 0 .. {g.vocab - 1}, the vocabulary"
    if manifest.scales and not precision.quantises:
        yield f"scales with {manifest.precision}, which has no quantised weights"
    for name, part in manifest.parts.items():
        if (set(part.graphs) ^ set(kinds(name, g))) - (set(OPTIONAL) & set(kinds(name, g))):
            yield f"graphs of {name}: {sorted(part.graphs)}, expected {sorted(kinds(name, g))}"
        for kind, graph in part.graphs.items():
            if (graph.inputs, graph.outputs) != graph_io(name, kind, g, precision):
                yield f"inputs and outputs of the {kind} graph of {name} are not those of its geometry"
        for backend, plan in part.plans.items():
            if problem := _of_plan(manifest, name, backend, plan):
                yield f"the {backend} engine of {name}: {problem}"
        if part.plans.keys() != manifest.parts[PARTS[0]].plans.keys():
            yield f"engines of {name} for {sorted(part.plans)}, of others for {sorted(manifest.parts[PARTS[0]].plans)}"


def contradictions_of(g: Geometry) -> Iterator[str]:
    """What in a geometry is out of range, or does not fit together, in words."""

    def value(name: str) -> float:
        return getattr(g.vision, name.partition(".")[2]) if "." in name else getattr(g, name)  # type: ignore[no-any-return]

    for name, (low, high) in SIZES.items():
        if not low <= value(name) <= high:
            yield f"geometry.{name} is {value(name):.30g}, expected {low} .. {high}"
    for name, (above, most) in NUMBERS.items():
        if not above < value(name) <= most:  # false for NaN
            yield f"geometry.{name} is {value(name)}, expected more than {above:g}, at most {most:g}"
    for name, values, (least, most) in (("image_mean", g.image_mean, MEAN), ("image_std", g.image_std, STD)):
        for each in values:
            if not least <= each <= most:
                yield f"geometry.{name} holds {each}, expected {least:g} .. {most:g}: pixels are 0 .. 1"
    if g.vision.activation not in ("quick_gelu", "gelu"):
        yield f"geometry.vision.activation is {g.vision.activation!r:.100}, expected quick_gelu or gelu"
    for found, expected, fits in (
        (f"hidden {g.hidden} with {g.heads} heads of {g.head_dim}", "their product", g.hidden == g.heads * g.head_dim),
        (f"head_dim {g.head_dim}", "an even number", g.head_dim % 2 == 0),
        (f"kv_heads {g.kv_heads}", f"a divisor of heads {g.heads}", g.heads % g.kv_heads == 0),
        (
            f"vision.heads {g.vision.heads}",
            f"a divisor of vision.hidden {g.vision.hidden}",
            g.vision.hidden % g.vision.heads == 0,
        ),
        (f"vision.patch {g.vision.patch}", f"a divisor of lowres {g.lowres}", g.lowres % g.vision.patch == 0),
        (f"{g.hires_side} hi-res tokens a side", f"at most {HIRES_SIDE}", g.hires_side <= HIRES_SIDE),
        (f"cells {g.cells}", f"at most {g.grid}, the image tokens a side", g.cells <= g.grid),
        (f"context {g.context}", f"more than the {g.image_tokens} image tokens", g.context > g.image_tokens),
        (f"start_layer {g.start_layer}", f"at most {g.layers - 2}", g.start_layer <= g.layers - 2),
        (f"page_slots {g.page_slots}", f"1 .. {g.pages}, the pages", 1 <= g.stored_pages <= g.pages),
        ("page_slots without lazy_pages", "both", g.page_slots is None or g.lazy_pages),
        (
            f"page_slots with {g.hires_side} hi-res tokens a side in {g.cells} cells",
            "a divisor of them, as page slots hold pages of one length",
            g.page_slots is None or equally_long(g),
        ),
    ):
        if not fits:
            yield f"geometry: {found}, expected {expected}"


def _of_files(manifest: Manifest) -> Iterator[str]:
    for name, file in manifest.files.items():
        outside = not _NAME.fullmatch(name) or name.endswith(".") or _DEVICES.fullmatch(name)
        if outside:
            yield f"lists {name[:100]!r}, expected names of files inside the bundle: letters, digits, and . _ -"
        if name.lower() == MANIFEST:
            yield f"lists {name}, which is itself"
        if not 0 <= file.bytes <= FILE_BYTES:
            yield f"{name} of {file.bytes} bytes, expected 0 .. {FILE_BYTES}"
        if not _SHA256.fullmatch(file.sha256):
            yield f"{name}: SHA-256 {file.sha256[:100]!r}, expected 64 hexadecimal digits"
    folded = Counter(name.lower() for name in manifest.files)
    for name in manifest.files:
        if folded[name.lower()] > 1:
            yield f"lists {name} twice, in letters of another case: one file where these do not count"
    used = [file for file in (manifest.prompt.tokenizer, manifest.kernels, manifest.scales) if file is not None]
    for part in manifest.parts.values():
        used += [part.weights, *(graph.file for graph in part.graphs.values())]
        used += [file for plan in part.plans.values() for file in plan.used]
    seen: set[str] = set()
    for name in used:
        if name not in manifest.files:
            yield f"{name[:100]!r} is used but not among the files"
        if name in seen:
            yield f"{name} is used twice, expected a file for each use"
        seen.add(name)


def _of_plan(manifest: Manifest, part: str, backend: str, plan: Plan) -> str | None:
    if backend not in BACKENDS or backend == ONNXRUNTIME:
        return f"expected one of {[name for name in BACKENDS if name != ONNXRUNTIME]}"
    if (plan.inputs, plan.outputs) != plan_io(part, manifest.geometry, PRECISIONS[manifest.precision]):
        return "inputs and outputs are not those of its geometry"
    if not plan.sms or not 50 <= min(plan.sms) <= max(plan.sms) < 1000:
        return f"compute capabilities {list(plan.sms)[:20]}, expected numbers such as 86"
    if not plan.profiles:
        return "no optimisation profile"
    for profile in plan.profiles:
        if set(profile.sizes) != set(symbols(plan.inputs)):
            return f"profile {profile.name} has sizes of {sorted(profile.sizes)}"
        if any(not 0 < low <= best <= high < 1 << 31 for low, best, high in profile.sizes.values()):
            return f"profile {profile.name} has sizes {profile.sizes}, expected 0 < minimum <= optimum <= maximum"
    if plan.plugins and part != "decoder":
        return "needs plugins, which only a decoder does"
    if plan.chain and (problem := _of_chain(manifest, part, plan)):
        return f"its chain: {problem}"
    kernels = manifest.files[manifest.kernels].sha256 if manifest.kernels in manifest.files else None
    if plan.plugins != (plan.kernels is not None) or (plan.plugins and plan.kernels != kernels):
        return f"built with kernels {plan.kernels}, the bundle's are {kernels}"
    return None


def _of_chain(manifest: Manifest, part: str, plan: Plan) -> str | None:
    """What is wrong with the engines of a part that has several: each takes what the part does, or one before gives."""
    layers = layers_of(part, manifest.geometry)
    if not layers or plan.file != plan.chain[0].file:
        return "only a part whose weights belong to layers has one, whose first engine is the part's file"
    ends = [layers.start, *(link.layers[1] for link in plan.chain)]
    for begin, link in zip(ends, plan.chain, strict=False):
        if link.layers[0] != begin or link.layers[1] <= begin:
            return f"layers {list(link.layers)} after {begin}"
    if ends[-1] != layers.stop:
        return f"layers to {ends[-1]}, expected to {layers.stop}"
    own = {spec.name: spec for spec in plan.outputs}
    there, read = {spec.name: spec for spec in plan.inputs}, set()
    for link in plan.chain:
        for spec in link.inputs:
            if there.get(spec.name) != spec:
                return f"{spec.name[:100]!r} is read, which none before it gives so"
            read.add(spec.name)
        for spec in link.outputs:
            sizes = [size for size in spec.shape if not isinstance(size, str)]
            odd = set(spec.shape) - {*sizes, "batch", "steps"} or any(not 0 < size < 1 << 31 for size in sizes)
            if spec.name in there or own.get(spec.name, spec) != spec or odd or spec.dtype not in ITEMSIZE:
                return f"{spec.name[:100]!r} is given twice, or not as the part has it"
            there[spec.name] = spec
    if lost := (own.keys() - there.keys()) | (there.keys() - own.keys() - read):
        return f"nobody gives or reads {sorted(lost)[0][:100]!r}"
    return None
