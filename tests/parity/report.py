"""What each precision costs: `python -m tests.parity.report`, one table in Markdown.

The small official model replays the recorded official runs, its tokens forced to the official ones; the default model
answers questions about fresh scenes with digits that training never saw. Bundles are built for the purpose, unchecked:
this is the check of what a build cannot judge, how much the rounding of weights matters.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from engines.bundle.folder import Bundle
from engines.bundle.precision import COLUMN, FP16, FP32, INT4, INT8, PRECISIONS
from engines.bundle.tensors import APART, MODEL
from engines.errors import OptionError
from engines.ort import OrtModel
from export.build import BuildOptions, build
from export.default_model.evaluate import TOKENS, prompt, scenes_with_questions
from export.default_model.questions import ask
from export.default_model.scenes import make_scene
from runtime import Engine
from tests.parity.official import CASES, Case, recorded
from tests.paths import OFFICIAL


@dataclass(frozen=True)
class Row:
    """A build whose cost the report shows. block: of int8, int4 and fp8 alone; kv: of the hi-res pages; kv_cache: of
    ordinary tokens; head, vision, embeddings: what these are stored in."""

    precision: str
    block: int | None = None
    calibrated: bool = False
    kv: str = "model"
    kv_cache: str = "model"
    head: str = MODEL
    vision: str = MODEL
    embeddings: str = MODEL

    @property
    def label(self) -> str:
        """As the table calls it."""
        layout = "columns" if self.block == COLUMN else f"blocks of {self.block}"
        label = self.precision if self.block is None else f"{self.precision}, {layout}"
        label += ", calibrated" * self.calibrated + ("" if self.kv == "model" else f", kv {self.kv}")
        label += "" if self.kv_cache == "model" else f", kv cache {self.kv_cache}"
        return label + "".join(f", {kind} {value}" for kind in APART if (value := getattr(self, kind)) != MODEL)


BY_PRECISION = sorted(PRECISIONS.values(), key=lambda each: each != FP32)  # first what the answers are compared with
ROWS = [Row(each.name, block) for each in BY_PRECISION for block in each.block_sizes or (None,)]
# What is kept in 8 bits alone; others differ from their row above by as little.
ROWS[1:1] = [
    Row(FP32.name, kv="int8"),
    Row(FP32.name, kv_cache="int8"),
    Row(FP32.name, kv="int8", kv_cache="int8"),
]
ROWS += [Row(INT4.name, block, calibrated=True) for block in INT4.block_sizes]
# What is stored in codes beside the linear layers: each alone, beside what costs least of what it can be beside; all.
EVERYTHING = {"vision": INT8.name, "embeddings": INT8.name}
ROWS_APART = [
    Row(FP16.name, embeddings="int8"),
    *(Row(INT8.name, 16, **{kind: code}) for kind in ("head", "vision") for code in APART[kind] if code != MODEL),
    *(Row(INT4.name, 16, head=head) for head in APART["head"] if head != MODEL),
    *(Row(INT4.name, 16, calibrated, head=INT8.name, **EVERYTHING) for calibrated in (False, True)),
]
# All at once that --fit may choose for an engine of TensorRT, which has no embeddings in codes.
WHOLE = Row(INT4.name, 16, kv=INT8.name, kv_cache=INT8.name, head=INT8.name, vision=INT8.name)
ROWS_APART += [WHOLE, replace(WHOLE, calibrated=True)]
CALIBRATION_SCENES = 16  # of digits that training did see, four questions each
CALIBRATION_STEPS = 12
HEAD = (
    "precision",
    "logits before a flip",
    "logits, all steps",
    "IoU of selected pages, by layer",
    "official tokens",
    "numbers",
    "count",
    "other kinds",
    "answers of fp32",
    "their logits",
)
NUMBERS = ("one", "two")  # kinds of questions in the column "numbers"


@dataclass(frozen=True)
class Replay:
    """Recorded official runs against a bundle. Errors are the largest of a logit; NaN if nothing was compared."""

    before: float  # in the steps of a run before any cell differs
    always: float
    overlap: tuple[float, ...]  # mean intersection over union of the selected pages, of each selecting layer
    tokens: tuple[int, int]  # equal to the official ones, compared


def official_cases() -> list[Case]:
    """The recorded runs of the checkpoint as it is."""
    return [case for case in map(recorded, CASES) if not case.overrides]


def overlap(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Intersection over union of bool [M, cells] along the cells; 1 where both are empty."""
    both, either = (found & expected).sum(-1), (found | expected).sum(-1)
    return np.where(either == 0, 1.0, both / np.maximum(either, 1))


def replay(bundle: Path, cases: Sequence[Case]) -> Replay:
    """Run the recorded cases on ONNX Runtime."""
    model = OrtModel(Bundle(bundle))
    before, always, layers, equal = [], [], [], 0
    for case in cases:
        golden, same = case.golden, True
        for step, _, result in case.replay(model, model.geometry):
            expected = golden["select_mask"][step][:, ::8, ::8].reshape(-1, model.geometry.pages).astype(bool)
            found = result.cells()[0].astype(bool)
            same = same and np.array_equal(found, expected)
            error = float(np.abs(result.logits[0] - golden["logits"][step]).max())
            always.append(error)
            before += [error] if same else []
            layers.append(overlap(found, expected))
            equal += int(result.logits[0].argmax() == golden["output_ids"][1 + step])
    worst = float(np.max(before)) if before else float("nan")
    return Replay(worst, float(np.max(always)), tuple(np.mean(layers, axis=0).tolist()), (equal, len(always)))


@dataclass(frozen=True)
class Given:
    """An answer of the default model."""

    kind: str  # of the question
    right: bool
    tokens: tuple[int, ...]
    logits: np.ndarray  # [tokens, vocab] float32


def calibration_data(folder: Path, seed: int) -> tuple[Path, Path]:
    """Data to calibrate both models on, written below `folder`, none of which the report asks about.

    The small official model has random weights and no tokenizer: random tokens about the pictures that its
    preprocessing was recorded with. The default model: questions about scenes with digits of its training split.
    """
    small, default = folder / "small", folder / "default"
    for path in (small, default):
        path.mkdir()
    rng, rows = np.random.default_rng(seed), []
    for image in sorted((OFFICIAL / "preprocess").glob("*.png")):
        shutil.copy(image, small)
        tokens = rng.integers(3, 512, 24 + CALIBRATION_STEPS).tolist()
        prompt = [1, *tokens[:12], -200, *tokens[12:24]]
        rows.append({"image": image.name, "input_ids": prompt, "answer_ids": tokens[24:]})
    (small / "data.json").write_text(json.dumps(rows))
    rows = []
    for index in range(CALIBRATION_SCENES):
        rng = np.random.default_rng([seed + 1, index])
        scene = make_scene(rng, "train")
        scene.image.save(default / f"{index}.png")
        for kind in ("one", "two", "yes/no", "count"):
            question = ask(rng, scene.things, scene.image.size, kind)
            if question is not None:
                rows.append({"image": f"{index}.png", "question": question.text, "answer": question.answer})
    (default / "data.json").write_text(json.dumps(rows))
    return small, default


def answers(bundle: Path, asked: list, name: str) -> list[Given]:
    """The answer to every question."""
    engine, given = Engine(bundle), []
    for scene, questions in track(asked, name, console=Console(stderr=True), transient=True):
        with engine.image(scene.image) as view:
            for question in questions:
                answer = view.ask(prompt(question), max_new_tokens=TOKENS, trace=True)
                right = answer.text == question.answer
                given.append(Given(question.kind, right, tuple(answer.token_ids), answer.trace.logits))
    return given


def table(models: tuple[Path, Path], scenes: int, seed: int, rows: Sequence[Row]) -> list[str]:
    """The lines of the report. `models`: the official small one, the default one; answers are compared with those of
    the first row. Where a block size does not divide a model's weights, the cells say "-", and the end says why; a row
    of nothing else is left out.
    """
    cases, asked = official_cases(), scenes_with_questions(scenes, seed)
    lines = ["| " + " | ".join(HEAD) + " |", "| --- |" + " ---: |" * (len(HEAD) - 1)]
    reasons: dict[str, None] = {}
    first: list[Given] = []
    with tempfile.TemporaryDirectory() as folder:
        data = calibration_data(Path(folder), seed)

        def built(index: int, row: Row) -> Path | None:
            try:
                out, calibrate = Path(folder) / str(index), data[index] if row.calibrated else None
                options = BuildOptions(
                    models[index], out, row.precision, row.block, calibrate=calibrate, kv=row.kv, kv_cache=row.kv_cache,
                    head=row.head, vision=row.vision, embeddings=row.embeddings, check="none",
                )  # fmt: skip
                return build(options).path
            except OptionError as error:
                reasons[f"- {models[index].name}: {error.found}"] = None
                return None

        for row in rows:
            cells = ["-"] * (len(HEAD) - 1)
            if bundle := built(0, row):
                measured = replay(bundle, cases)
                shares = " ".join(f"{share:.3f}" for share in measured.overlap)
                before = "no such step" if np.isnan(measured.before) else f"{measured.before:.2g}"
                errors = before, f"{measured.always:.2g}"
                cells[:4] = [*errors, shares, "{} of {}".format(*measured.tokens)]
            if bundle := built(1, row):
                given = answers(bundle, asked, row.label)
                first = first or given
                right: list[list[bool]] = [[], [], []]
                for answer in given:
                    right[0 if answer.kind in NUMBERS else 1 if answer.kind == "count" else 2].append(answer.right)
                pairs = zip(given, first, strict=True)
                equal = [(answer, other) for answer, other in pairs if answer.tokens == other.tokens]
                errors = [np.abs(answer.logits - other.logits).mean() for answer, other in equal]
                cells[4:8] = [*(f"{100 * np.mean(share):.1f}" for share in right), f"{len(equal)} of {len(given)}"]
                cells[8] = f"{np.mean(errors):.3f}" if errors else "-"
            if set(cells) != {"-"}:
                lines.append("| " + " | ".join([row.label, *cells]) + " |")
    lines.append(
        f"\nLeft: the official small model, {len(cases)} runs, forced tokens; errors of logits are absolute. Right: "
        f"the default model, {scenes} scenes of seed {seed}, percent of exact answers; where they equal the first "
        "row's, the mean error of their logits.\n"
    )
    return [*lines, *reasons]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=BuildOptions.model, help="the default model's checkpoint")
    parser.add_argument("--scenes", type=int, default=40, help="fresh scenes, 14 questions each")
    parser.add_argument("--seed", type=int, default=2026)
    given = parser.parse_args()
    print("\n".join(table((OFFICIAL / "weights", given.model), given.scenes, given.seed, [*ROWS, *ROWS_APART])))


if __name__ == "__main__":
    main()
