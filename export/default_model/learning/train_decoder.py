"""Trains projector, decoder and hi-res projections on features of the frozen tower."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.bundle.precision import INT4, Scheme
from engines.bundle.tensors import is_quantised
from export.default_model.learning import aids
from export.default_model.learning.bfloat16 import Bfloat16
from export.default_model.learning.packing import Described, Lessons, pack, prefix_ids
from export.default_model.learning.student import MODES, Student, Whitening, run
from export.default_model.model import GEOMETRY
from export.default_model.questions import KINDS, build_tokenizer
from export.weights.awq import rounded

logger = logging.getLogger(__name__)
G = GEOMETRY
SCENES, QUESTIONS = 8, 9  # of a step
LEARNING_RATE, DECAY = 4e-3, 0.02
SHARES = {"none": 0.05, "own": 0.40, "all": 0.45, "helped": 0.10}  # how often an answer token sees which pages
GAP = 0.4  # share of steps in which the conversation stands further from the image, as if more had been said
FADE = 0.5  # the part of the steps after which aids count half
ROUNDED = 0.5  # share of the steps after that which compute with weights as int4 stores them
CODED = Scheme(INT4, 32)  # the largest blocks that divide the model's weights


@dataclass(frozen=True)
class Features:
    """Scenes as the decoder gets them, whitened, on the device that trains."""

    low: Tensor  # [N, 144, W] bfloat16, row-major
    high: Tensor  # [N, 1296, W]
    margins: Tensor  # [N, 2]: rows, columns of the low-res map that are padding at each end
    scenes: list[Described]

    def of(self, index: Tensor | slice, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """low, high, margins of some scenes."""
        return self.low[index].to(dtype), self.high[index].to(dtype), self.margins[index]

    @classmethod
    def gathered(cls, parts: Iterable[Features], count: int) -> Features:
        """The `count` scenes of all `parts`, in order. Each is asked for when the one before is copied: together they
        take gigabytes."""
        arrays: list[Tensor] = []
        scenes: list[Described] = []
        for part in parts:
            own = part.low, part.high, part.margins
            arrays = arrays or [array.new_empty(count, *array.shape[1:]) for array in own]
            for whole, array in zip(arrays, own, strict=True):
                whole[len(scenes) : len(scenes) + len(array)] = array
            scenes += part.scenes
        low, high, margins = arrays
        return cls(low, high, margins, scenes)


def train(
    features: Features, steps: int, *, whitening: Whitening, directions: Tensor, validation: Features,
    reads: bool = True, seed: int = 0, workers: int = 0, log: int = 400,
) -> tuple[Student, dict[str, float]]:  # fmt: skip
    """A trained student, in float32 and for raw features, and what `check` says of it.

    `reads=False`: the low-res baseline, which sees no page. `workers`: processes that prepare lessons.
    """
    torch.manual_seed(seed)
    student = Student().to(features.low.device)
    whitening.begin(student, directions, seed)
    started = time.perf_counter()
    trainer = Bfloat16(student, LEARNING_RATE, steps, DECAY)
    lessons = Lessons(features.scenes, steps, (SCENES, QUESTIONS), seed)
    for step, means in _steps(student, trainer, features, lessons, reads=reads, workers=workers, log=log):
        found = check(student, validation, mode=1 if reads else 0)
        text = " ".join(f"{name} {value:.3f}" for name, value in means.items())
        text += " | " + " ".join(f"{name} {value:.3f}" for name, value in found.items())
        logger.info("decoder %d %s %.0f s", step, text, time.perf_counter() - started)
    trainer.restore()
    found = check(student, validation, mode=1 if reads else 0)
    whitening.fold_into(student)
    return student, found


def _steps(
    student: Student, trainer: Bfloat16, features: Features, lessons: Lessons, *, reads: bool, workers: int,
    log: int,
) -> Iterator[tuple[int, dict[str, float]]]:  # fmt: skip
    """Take all steps; every `log` of them, and at the end, say how many were taken, and what the losses were."""
    rng, device = np.random.default_rng(lessons.seed), str(features.low.device)
    prefix = torch.tensor(prefix_ids(build_tokenizer()), device=device)
    shares = [SHARES[mode] for mode in MODES] if reads else [1, 0, 0, 0]
    wanted = tuple(aids.WEIGHTS) if reads else aids.LOWRES_AIDS
    coded = {name for name, _ in student.named_parameters() if is_quantised(name.partition(".")[2], G)}
    recent = []
    for number, (chosen, packed) in enumerate(lessons.ahead(workers)):
        batch = packed.to(device)
        modes = torch.from_numpy(rng.choice(len(MODES), size=batch.where.shape, p=shares)).to(device)
        gap = int(rng.integers(0, 200)) if rng.random() < GAP else 0
        threshold = int(rng.integers(*aids.THRESHOLDS))
        settled = number >= FADE * lessons.steps
        if settled and rng.random() < ROUNDED:
            trainer.compute_with(partial(rounded, scheme=CODED), coded)
        inputs = features.of(torch.tensor(chosen, device=device), torch.bfloat16)
        logits, losses, pages = run(student, *inputs, batch, prefix, modes, threshold, gap)
        answer = F.cross_entropy(logits.flatten(0, 2), batch.answer.flatten(), ignore_index=-100, label_smoothing=0.01)
        share = 0.5 if settled else 1.0
        trainer.update(answer + share * sum(aids.WEIGHTS[name] * losses[name] for name in wanted))
        recent.append(torch.stack([answer.detach(), *(loss.detach() for loss in losses.values()), pages.detach()]))
        if (number + 1) % log == 0 or number + 1 == lessons.steps:
            yield number + 1, dict(zip(("answer", *losses, "pages"), torch.stack(recent).mean(0).tolist(), strict=True))
            recent = []


@torch.no_grad()
def check(
    student: Student, features: Features, *, mode: int, threshold: int = G.threshold, wording: str = "train"
) -> dict[str, float]:
    """Exact match per kind of question, and pages selected per reading layer and answer token.

    Answer tokens are forced, which equals greedy decoding where all are right.
    """
    rng, tokenizer = np.random.default_rng(0), build_tokenizer()
    device, kind = features.low.device, student.decoder.lm_head.weight.dtype
    prefix = torch.tensor(prefix_ids(tokenizer), device=device)
    right: dict[int, list[bool]] = {}
    pages = []
    for start in range(0, len(features.scenes), SCENES):
        part = slice(start, start + SCENES)
        batch = pack(rng, features.scenes[part], QUESTIONS, tokenizer, wording=wording).to(str(device))
        modes = torch.full(batch.where.shape, mode, device=device)
        logits, _, count = run(student, *features.of(part, kind), batch, prefix, modes, threshold)
        good = ((logits.argmax(-1) == batch.answer) | (batch.answer < 0)).all(-1).flatten().tolist()
        for key, ok in zip(batch.kind.flatten().tolist(), good, strict=True):
            right.setdefault(key, []).append(ok)
        pages.append(float(count))
    found = {KINDS[key]: float(np.mean(values)) for key, values in sorted(right.items())}
    return found | ({"pages": float(np.mean(pages))} if mode == 1 else {})
