"""Is the fresh bundle the model? Compares it with the PyTorch reference, stage by stage, on a generated request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engines.backend import Image
from engines.bundle.folder import Bundle
from engines.bundle.geometry import Geometry
from engines.bundle.precision import BITS
from engines.errors import ParityError
from engines.ort import OrtDecoder, OrtModel
from export.checkpoint.folder import Checkpoint
from export.network.reference import ReferenceDecoder, ReferenceModel, Weights
from export.weights.folding import checkpoint_of
from export.weights.stored import HALF_A_STEP, Stored, largest_rounding, require_others
from plugins.project_pages import STEPS as STEPS_OF_A_PAGE
from plugins.project_pages.reference import quantise

STEPS = 4  # decode steps compared, tokens forced to the reference's
TAIL = 12  # prompt tokens around the image
SEEDS = 3  # requests tried when the first one's selection hangs on rounding
ON_THE_EDGE = 0.01  # distance from the threshold, on the 0..255 scale, within which float32 rounding may decide
# Largest error allowed of features and pages, as a share of the reference's largest value. float32 leaves room for the
# order of summation alone; float16 (11-bit mantissa) and bfloat16 (8-bit) round every value on the way through all
# layers; int8 and int4 bundles, compared with the weights they store, round what enters a linear layer to int8. fp8 is
# multiplied in float32.
ERROR = {"fp32": 2e-5, "fp16": 2e-2, "bf16": 1e-1, "int8": 2e-2, "int4": 2e-2, "fp8": 1e-3}
# The same of the prompt's logits, which that rounding reaches through all layers.
PREFILL_ERROR = {**ERROR, "int8": 2e-1, "int4": 2e-1}
# And once pages are read: a cell that crosses the threshold changes what the next layers see.
DECODE_ERROR = {"fp32": 1e-4, "fp16": 5e-2, "bf16": 2e-1, "int8": 5e-1, "int4": 5e-1, "fp8": 5e-2}
# Share of cells that may differ: none in float32; reduced precision moves scores across the threshold.
CELLS = {"fp32": 0.0, "fp16": 0.02, "bf16": 0.10, "int8": 0.10, "int4": 0.10, "fp8": 0.02}
# Limits of float32 bundles with lazy int8 pages, once pages are read. There the reference rounds its own pages, and a
# projection that differs in its last bit may be a tie that goes the other way, by a whole step. Measured, 16 requests
# of two models: 9e-6 in 15 of them, 5e-4 in one; and what moves a score by as much may flip a cell as float16 does.
LAZY_INT8 = "fp16"


@dataclass(frozen=True)
class Stage:
    """One row of the report: the largest error of a stage and its limit, as a share of values or cells, or in steps."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # False for NaN


def parity(bundle: Bundle, checkpoint: Checkpoint, threads: int | None = None) -> list[Stage]:
    """Run the bundle on ONNX Runtime and the reference in float32 side by side; returns the stages in order.

    The weights of the reference are the checkpoint's, its pages float32. int8 and int4 bundles are compared in two
    steps: what they store with the checkpoint, to half a quantisation step or byte for byte, and what they compute with
    a reference that has what they store; what the rounding of weights costs in answers is another question (python -m
    tests.parity.report). Of calibrated bundles, a step between: that the checkpoint with their scales folded in is
    still the same network. int8 pages likewise: what is stored with the reference's pages, to half a step beyond the
    limit of the precision, and what it leads to with a reference that reads what is stored (with lazy pages: its own,
    so rounded).
    Raises ParityError naming the first stage that misses its limit. Needs both models in memory.
    """
    manifest = bundle.manifest
    stages: list[Stage] = []
    weights: Weights = checkpoint
    if manifest.precision in BITS:
        weights = stored = Stored(bundle)
        stages.append(Stage("weights, in steps", largest_rounding(stored, checkpoint), HALF_A_STEP))
        require_others(stored, checkpoint)
    for stage in _all_stages(bundle, checkpoint, weights, threads):
        stages.append(stage)
        if not stage.passed:
            done = ", ".join(f"{passed.name} {passed.error:.1e}" for passed in stages[:-1]) or "none"
            raise ParityError(
                f"{stage.name} differs from the reference by {stage.error:.2e} (passed before: {done})",
                expected=f"at most {stage.limit:.0e} for {manifest.precision}",
                fix="--fp32 tells rounding from a wrong graph; please report a miss in fp32",
            )
    return stages


def _all_stages(bundle: Bundle, checkpoint: Checkpoint, weights: Weights, threads: int | None) -> Iterator[Stage]:
    g, precision = bundle.manifest.geometry, bundle.manifest.precision
    if bundle.manifest.scales:
        yield from _folding(g, checkpoint, checkpoint_of(bundle, checkpoint))
    yield from _stages(ReferenceModel(g, weights), OrtModel(bundle, threads=threads), g, precision)


def _folding(g: Geometry, checkpoint: Checkpoint, folded: Weights) -> Iterator[Stage]:
    """The reference with the checkpoint's weights beside one with scales folded in, both float32. Page values differ:
    scales are in them."""
    for stage in _stages(ReferenceModel(g, checkpoint), ReferenceModel(g, folded), g, "fp32"):
        if not stage.name.startswith(("vision ", "page ")):
            yield Stage(f"scales folded in: {stage.name}", stage.error, stage.limit)


def _stages(
    reference: ReferenceModel, model: OrtModel | ReferenceModel, g: Geometry, precision: str
) -> Iterator[Stage]:
    limit = ERROR[precision]
    rng = np.random.default_rng(0)
    tiles = rng.standard_normal((1 + g.zoom**2, 3, g.lowres, g.lowres), dtype=np.float32)
    low, high = model.vision(tiles[:1]), model.vision(tiles[1:])
    expected_low, expected_high = reference.vision(tiles[:1]), reference.vision(tiles[1:])
    errors = (_error(a.numpy(), b.numpy()) for a, b in ((expected_low, low), (expected_high, high)))
    yield Stage("vision features", _worst(errors), limit)

    around = min(TAIL, (g.context - g.image_tokens - STEPS) // 2)  # a small context leaves little room for text
    begin = np.array([around], np.int64)
    expected, found = reference.project(expected_high, begin), model.project(high, begin)
    for half in ("page_key", "page_value"):
        if not g.lazy_pages:  # else they show in the decode logits
            names = [name for name in expected if half in name]
            errors = [_error(expected[name].numpy(), _as_stored(found, name)) for name in names]
            # A step is a share of the token's largest value, which is at most the layer's.
            rounding = HALF_A_STEP / STEPS_OF_A_PAGE if g.int8_pages else 0.0
            yield Stage(half.replace("_", " ") + "s", _worst(errors), limit + rounding)
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
        stages = _decode(slow, fast, ids, g, precision)
        if stages is not None:
            yield from stages
            return
    yield Stage("selection (undecidable in every request tried)", float("nan"), limit)


def _decode(
    slow: ReferenceDecoder, fast: OrtDecoder | ReferenceDecoder, ids: np.ndarray, g: Geometry, precision: str
) -> list[Stage] | None:
    """Prefill and STEPS forced steps side by side; None when rounding decided a cell before anything was compared."""
    theirs, ours = slow.run(ids[:, :-1]), fast.run(ids[:, :-1])
    prefill = Stage("prefill logits", _error(theirs.logits, ours.logits), PREFILL_ERROR[precision])
    token, flips, errors = ids[:, -1:], [], []
    for _ in range(STEPS):
        theirs, ours = slow.run(token, g.pages), fast.run(token, g.pages)
        differ = theirs.cells() != ours.cells()
        if differ.any() and not (differ & ~_on_the_edge(slow, g)).any():
            break  # both are right, and have gone different ways
        flips.append(float(differ.mean()))
        errors.append(_error(theirs.logits, ours.logits))
        token = theirs.logits.argmax(-1, keepdims=True)
    if not errors:
        return None
    limits = LAZY_INT8 if precision == "fp32" and g.lazy_pages and g.int8_pages else precision
    cells = Stage("selected cells", _worst(flips), CELLS[limits])
    return [prefill, cells, Stage("decode logits", _worst(errors), DECODE_ERROR[limits])]


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
