"""Is the fresh bundle the model? Compares it with the PyTorch reference, stage by stage, on a generated request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch

from engines.backend import Image
from engines.bundle.folder import Bundle
from engines.bundle.geometry import Geometry
from engines.bundle.precision import BF16, FP8, FP16, FP32, INT4, INT8, Precision
from engines.bundle.rebuild import apart_of
from engines.bundle.tensors import Coding, expected_tensors, in_vision, stored_as
from engines.errors import OptionError, ParityError
from engines.memory import available_bytes
from engines.ort import OrtDecoder, OrtModel
from export import second_opinion
from export.checkpoint.folder import Checkpoint
from export.checkpoint.packed import PackedCheckpoint
from export.network.reference import ReferenceDecoder, ReferenceModel, Weights
from export.weights.stored import HALF_A_STEP, Stored, largest_rounding, require_others
from plugins.cached_attention import STEPS as STEPS_OF_A_PAGE
from plugins.cached_attention.reference import quantise

STEPS = 4  # decode steps compared, tokens forced to the reference's
TAIL = 12  # prompt tokens around the image
SEEDS = 3  # requests tried when the first one's selection hangs on rounding
ON_THE_EDGE = 0.01  # distance from the threshold, on the 0..255 scale, within which float32 rounding may decide
OVERHEAD = 1_000_000_000  # Python, torch, ONNX Runtime and their work space, bytes


@dataclass(frozen=True)
class Limits:
    """Largest errors allowed, as a share of the reference's largest value: of features and pages; of the prompt's
    logits; of logits once pages are read. cells: the share of cells that may differ."""

    features: float
    prefill: float
    decode: float
    cells: float


# float32 leaves room for the order of summation alone; float16 (11-bit mantissa) and bfloat16 (8-bit) round every value
# on the way through all layers; int8 and int4 bundles, compared with the weights they store, round what enters a linear
# layer to int8, which the prompt's logits see through all layers. fp8 is multiplied in float32. Once pages are read, a
# cell that crosses the threshold changes what the next layers see: none does in float32, but rounding moves scores.
LIMITS = {
    FP32: Limits(features=2e-5, prefill=2e-5, decode=1e-4, cells=0.0),
    FP16: Limits(features=2e-2, prefill=2e-2, decode=5e-2, cells=0.02),
    BF16: Limits(features=1e-1, prefill=1e-1, decode=2e-1, cells=0.10),
    INT8: Limits(features=2e-2, prefill=2e-1, decode=5e-1, cells=0.10),
    INT4: Limits(features=2e-2, prefill=2e-1, decode=5e-1, cells=0.10),
    FP8: Limits(features=1e-3, prefill=1e-3, decode=5e-2, cells=0.02),
}
# Of float32 bundles with lazy int8 pages. Once pages are read the reference rounds its own, and a projection that
# differs in its last bit may be a tie that goes the other way, by a whole step. Measured, 16 requests of two models:
# 9e-6 in 15 of them, 5e-4 in one; and what moves a score by as much may flip a cell as float16 does.
LAZY_INT8 = replace(LIMITS[FP32], decode=LIMITS[FP16].decode, cells=LIMITS[FP16].cells)
# With an int8 cache all that reads it, the prompt's logits too: the reference rounds as well, and such ties decide; a
# float32 bundle is then held to what float16 is, others to what int8 is. Measured, 8 requests of the default model, in
# float32: prompt 6e-4, once pages are read 1e-2, no cell; in float16 1e-2, 0.3 and 2.5 % of the cells.
THROUGH_AN_INT8_CACHE = "prefill", "decode", "cells"
# With a vision tower in codes what enters its linear layers is rounded to int8 as well, through all of them; how wide
# the codes are is not seen, as the reference has what they stand for. Measured, the default model and the official
# small one: features 0.021, page values 0.035, and twice that is allowed.
THROUGH_CODED_VISION = 7e-2


def stored_of(bundle: Bundle) -> str:
    """How a bundle stores what it does, for people: what it is held to follows from it."""
    return stored_as(bundle.precision, bundle.manifest.geometry, apart_of(bundle.manifest))


def limits_of(precision: Precision, g: Geometry, coded_vision: bool = False) -> Limits:
    """What a whole bundle is held to: of all that is rounded in it, what a stage sees most of. It is no sum, as the
    reference has the same codes, pages and cache: what is left is what enters linear layers, and ties.

    precision, g: of the bundle. coded_vision: its vision tower is in codes.
    """
    if coded_vision:
        plain = limits_of(precision, g)
        return replace(plain, features=max(plain.features, THROUGH_CODED_VISION))
    if g.int8_cache:
        own, least = LIMITS[precision], LIMITS[FP16 if precision == FP32 else INT8]
        return replace(own, **{name: max(getattr(own, name), getattr(least, name)) for name in THROUGH_AN_INT8_CACHE})
    return LAZY_INT8 if precision == FP32 and g.lazy_pages and g.int8_pages else LIMITS[precision]


@dataclass(frozen=True)
class Stage:
    """One row of the report: the largest error of a stage and its limit, as a share of values or cells, or in steps."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # False for NaN


def parity_bytes(g: Geometry, precision: Precision, coding: Coding | None = None, calibrated: bool = False) -> int:
    """Bytes the parity check needs: the float32 reference, and the bundle in ONNX Runtime on the CPU, which keeps the
    stored weights and, for reduced precisions, copies of them: float32, or of what is quantised in another order;
    caches and hi-res pages of both. `calibrated`: before that, a second reference in place of the bundle."""
    shapes = expected_tensors(g)
    weights = sum(map(prod, shapes.values()))
    coding = coding or Coding()
    quantised, schemes = coding.tensors(g), coding.schemes(g)
    integers = sum(2 * schemes[name].stored_bytes(shape) for name, shape in quantised.items())
    others = weights - sum(map(prod, quantised.values()))
    copies = 4 if precision.itemsize == 4 else 4 + precision.itemsize
    pages = 2 * len(g.reading_layers) * g.kv_heads * g.head_dim * g.hires_side**2
    cache = 2 * g.layers * g.kv_heads * g.head_dim * (g.image_tokens + 64)
    beside = max(others * copies + integers, 4 * weights if calibrated else 0)
    return 4 * weights + beside + (pages + cache) * 8 + OVERHEAD


def require_memory(g: Geometry, precision: Precision, coding: Coding, calibrated: bool) -> None:
    """OptionError when the parity check needs more memory than there is."""
    needed, available = parity_bytes(g, precision, coding, calibrated), available_bytes()
    if needed > available:
        raise OptionError(
            f"the parity check needs {needed / 1e9:.1f} GB of memory, this machine has {available / 1e9:.1f} GB free",
            fix="add --check weights: compares every stored tensor with the checkpoint instead, in under 1 GB",
        )


def parity(bundle: Bundle, checkpoint: Checkpoint, threads: int | None = None) -> list[Stage]:
    """Run the bundle on ONNX Runtime and the reference in float32 side by side; returns the stages in order.

    The weights of the reference are the checkpoint's, its pages float32. int8 and int4 bundles are compared in two
    steps: what they store with the checkpoint, to half a quantisation step or byte for byte, and what they compute with
    a reference that has what they store; what the rounding of weights costs in answers is another question (python -m
    tests.parity.report). Of calibrated bundles, a step between: that the checkpoint with their scales folded in is
    still the same network. int8 pages likewise: what is stored with the reference's pages, to half a step beyond the
    limit of the precision, and what it leads to with a reference that reads what is stored (with lazy pages: its own,
    so rounded). With an int8 cache that of the reference is int8, too: what it costs is another question again.
    Where transformers is installed, its own Llama and CLIP are asked as well (export/second_opinion.py).
    Raises ParityError naming the first stage that misses its limit. Needs both models in memory.
    """
    stages: list[Stage] = []
    weights: Weights = checkpoint
    stored = Stored(bundle)
    if stored.schemes:
        weights = stored
        stages.append(Stage("weights, in steps", largest_rounding(stored, checkpoint), HALF_A_STEP))
        require_others(stored, checkpoint)
    folded = stored.source(checkpoint) if stored.scales else None
    limits = limits_of(bundle.precision, bundle.manifest.geometry, any(map(in_vision, stored.schemes)))
    for stage in _all_stages(bundle, checkpoint, folded, weights, limits, threads):
        stages.append(stage)
        if not stage.passed:
            done = ", ".join(f"{passed.name} {passed.error:.1e}" for passed in stages[:-1]) or "none"
            raise ParityError(
                f"{stage.name} differs from the reference by {stage.error:.2e} (passed before: {done})",
                expected=f"at most {stage.limit:.0e} for {stored_of(bundle)}",
                fix="--fp32 tells rounding from a wrong graph; please report a miss in fp32",
            )
    return stages


def _all_stages(
    bundle: Bundle,
    checkpoint: Checkpoint,
    folded: Weights | None,
    weights: Weights,
    limits: Limits,
    threads: int | None,
) -> Iterator[Stage]:
    g, precision = bundle.manifest.geometry, bundle.precision
    if folded is not None:
        yield from _folding(g, checkpoint, folded)
    reference, model = ReferenceModel(g, weights), OrtModel(bundle, threads=threads)
    yield from _stages(reference, model, g, limits)
    if why_no_second_opinion(checkpoint):
        return
    asked = second_opinion.request(g)
    ours = []
    if weights is checkpoint and not g.int8_cache:
        ours.append((FP32, "", second_opinion.of_model(reference, asked)))
        ours.append((precision, ", the bundle", second_opinion.of_model(model, asked)))
    del reference, model  # their memory is needed
    if not ours:  # what rounds weights or keys is no opinion about the checkpoint's own network
        plain = ReferenceModel(replace(g, int8_cache=False), checkpoint)
        ours.append((FP32, "", second_opinion.of_model(plain, asked)))
    yield from _second_opinion(bundle, checkpoint, asked, ours)


def why_no_second_opinion(checkpoint: Checkpoint) -> str | None:
    """Why transformers is not asked about this checkpoint; None if it is."""
    if not second_opinion.available():
        return f"transformers is not installed: {second_opinion.INSTALL}"
    if isinstance(checkpoint, PackedCheckpoint):
        return "its weights are packed, and transformers needs a GPU to open them"
    return None


def _second_opinion(
    bundle: Bundle,
    checkpoint: Checkpoint,
    asked: second_opinion.Request,
    ours: list[tuple[Precision, str, second_opinion.Opinion]],
) -> Iterator[Stage]:
    """What transformers makes of the checkpoint beside what the reference and the bundle make of it."""
    with second_opinion.contained():
        ends, found = second_opinion.end_tokens(checkpoint.folder), bundle.manifest.prompt.eos_token_ids
    if ends is not None and set(ends) != set(found):
        raise ParityError(
            f"transformers ends an answer at the tokens {sorted(ends)}, this bundle at {sorted(found)}",
            expected="the same end tokens",
            fix="name the end tokens in generation_config.json; please report this",
        )
    with second_opinion.contained():
        theirs = second_opinion.of_transformers(checkpoint.folder, asked)
    for precision, whose, opinion in ours:
        limits = LIMITS[precision]
        yield Stage(f"transformers' CLIP{whose}", _error(theirs.features, opinion.features), limits.features)
        yield Stage(f"transformers' Llama{whose}", _error(theirs.logits, opinion.logits), limits.prefill)


def _folding(g: Geometry, checkpoint: Checkpoint, folded: Weights) -> Iterator[Stage]:
    """The reference with the checkpoint's weights beside one with scales folded in, both float32. Page values differ:
    scales are in them."""
    plain = replace(g, int8_cache=False)  # where a last bit that differs would be a step of 127
    limits = limits_of(FP32, plain)
    for stage in _stages(ReferenceModel(plain, checkpoint), ReferenceModel(plain, folded), plain, limits):
        if not stage.name.startswith(("vision ", "page ")):
            yield Stage(f"scales folded in: {stage.name}", stage.error, stage.limit)


def _stages(
    reference: ReferenceModel, model: OrtModel | ReferenceModel, g: Geometry, limits: Limits
) -> Iterator[Stage]:
    rng = np.random.default_rng(0)
    tiles = rng.standard_normal((1 + g.zoom**2, 3, g.lowres, g.lowres), dtype=np.float32)
    low, high = model.vision(tiles[:1]), model.vision(tiles[1:])
    expected_low, expected_high = reference.vision(tiles[:1]), reference.vision(tiles[1:])
    errors = (_error(a.numpy(), b.numpy()) for a, b in ((expected_low, low), (expected_high, high)))
    yield Stage("vision features", _worst(errors), limits.features)

    around = min(TAIL, (g.context - g.image_tokens - STEPS) // 2)  # a small context leaves little room for text
    begin = np.array([around], np.int64)
    expected, found = reference.project(expected_high, begin), model.project(high, begin)
    for half in ("page_key", "page_value"):
        if not g.lazy_pages:  # else they show in the decode logits
            names = [name for name in expected if half in name]
            errors = [_error(expected[name].numpy(), _as_stored(found, name)) for name in names]
            # A step is a share of the token's largest value, which is at most the layer's.
            rounding = HALF_A_STEP / STEPS_OF_A_PAGE if g.int8_pages else 0.0
            yield Stage(half.replace("_", " ") + "s", _worst(errors), limits.features + rounding)
    if g.int8_pages:  # from here on the reference reads rounded pages, too
        for name, pages in expected.items():
            expected[name] = _rounded(pages) if g.lazy_pages else torch.from_numpy(_as_stored(found, name))

    wide = np.array([[g.grid // 6, 0]], np.int64)  # the padding of a 3:2 image
    for _ in range(SEEDS):
        text = rng.integers(0, g.vocab, (1, 2 * around))
        image = -1 - np.arange(g.image_tokens)[None]
        ids = np.concatenate((text[:, :around], image, text[:, around:]), axis=1)
        slow = reference.decoder(Image(expected_low, expected, begin, wide), ids.shape[1] + STEPS)
        fast = model.decoder(Image(low, found, begin, wide), ids.shape[1] + STEPS)
        stages = _decode(slow, fast, ids, g, limits)
        if stages is not None:
            yield from stages
            return
    yield Stage("selection (undecidable in every request tried)", float("nan"), limits.cells)


def _decode(
    slow: ReferenceDecoder, fast: OrtDecoder | ReferenceDecoder, ids: np.ndarray, g: Geometry, limits: Limits
) -> list[Stage] | None:
    """Prefill and STEPS forced steps side by side; None when rounding decided a cell before anything was compared."""
    theirs, ours = slow.run(ids[:, :-1]), fast.run(ids[:, :-1])
    prefill = Stage("prefill logits", _error(theirs.logits, ours.logits), limits.prefill)
    token, flips, errors = ids[:, -1:], [], []
    for _ in range(STEPS):
        theirs, ours = slow.run(token, g.stored_pages), fast.run(token, g.stored_pages)
        differ = theirs.cells() != ours.cells()
        if differ.any() and not (differ & ~_on_the_edge(slow, g)).any():
            break  # both are right, and have gone different ways
        flips.append(float(differ.mean()))
        errors.append(_error(theirs.logits, ours.logits))
        token = theirs.logits.argmax(-1, keepdims=True)
    if not errors:
        return None
    cells = Stage("selected cells", _worst(flips), limits.cells)
    return [prefill, cells, Stage("decode logits", _worst(errors), limits.decode)]


def _on_the_edge(decoder: ReferenceDecoder, g: Geometry) -> np.ndarray:
    """bool [1, M, pages]: cells whose pooled score lies so close to the threshold that rounding may decide."""
    map = torch.from_numpy(np.stack(decoder.maps, 1)[0])  # [M, G, G]
    rows = int(decoder.image.margins[0, 0])
    map[:, :rows] = 0
    map[:, g.grid - rows :] = 0
    low, high = map.amin((1, 2), keepdim=True), map.amax((1, 2), keepdim=True)
    score = torch.nn.functional.adaptive_max_pool2d(255 * (map - low) / (high - low), g.cells).flatten(1)
    return ((score - g.threshold).abs() < ON_THE_EDGE).numpy()[None]


def _as_stored(found: dict[str, Any], name: str) -> np.ndarray:
    """A store of the bundle in floats: int8 pages times their scales."""
    pages, scale = found[name].numpy(), found.get(name.replace(".", "_scale.", 1))
    return pages if scale is None else pages * scale.numpy()[..., None]


def _rounded(pages: torch.Tensor) -> torch.Tensor:
    """Pages as an int8 store would give them back."""
    whole, step = quantise(pages)
    return whole.float() * step[..., None]


def _worst(errors: Iterable[float]) -> float:
    """The largest error, NaN if any is NaN: Python's max() would return a number that came before it."""
    return float(np.max(list(errors)))


def _error(expected: np.ndarray, found: np.ndarray) -> float:
    if not np.isfinite(found).all():
        return float("nan")
    scale = np.abs(expected).max() or 1.0  # a stage that is all zeros has no scale of its own
    return float(np.abs(expected - found.astype(np.float32)).max() / scale)
