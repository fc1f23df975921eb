"""A baseline and others on the same questions: how the scores differ, whether by more than chance, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
from PIL import ImageDraw, ImageFont

from engines.errors import OptionError
from runtime.engine import Engine
from runtime.evaluate.report import INTERVAL, TOTAL, counted, described, interval, kind_of_interval, percent, table
from runtime.evaluate.results import Evaluation, Run
from runtime.evaluate.significance import Estimate, estimate, exact_p
from runtime.evaluate.task import Item, Looked, Record, Task
from runtime.image import load_image
from runtime.terminal.show import draw_selection, write_picture

TEST = "McNemar's exact test, two-sided"
SIGN_TEST = "exact sign test, two-sided"  # what McNemar's is for graded scores
CHANGES = ["worse", "better", "p", "other answers"]  # columns
TITLE = 24  # pixels


@dataclass(frozen=True)
class Pair:
    """What the baseline and another made of one question."""

    baseline: Record
    other: Record

    @property
    def change(self) -> float:
        """How much better the other's score is."""
        return self.other.score - self.baseline.score


@dataclass(frozen=True)
class Difference:
    """Of a subset, or of all: the mean scores of the two, the questions whose score is worse and better than the
    baseline's, the p of these, and answers with another text."""

    subset: str
    count: int
    baseline: float
    other: float
    worse: int
    better: int
    p: float
    other_answers: int


@dataclass(frozen=True)
class Changed:
    """A question with another score; answers and scores of the baseline and the other."""

    index: int
    key: str
    subset: str
    question: str
    answers: tuple[str, str]
    scores: tuple[float, float]


@dataclass(frozen=True)
class Other:
    """What is held against the baseline. whole: of all questions; differences: of each subset, and of all."""

    name: str
    run: Run
    score: Estimate
    whole: Difference
    differences: list[Difference]
    changed: list[Changed]


@dataclass(frozen=True)
class Comparison:
    """A baseline and others. name, run, score: of the baseline. test: what p is of. interval: the kind of the
    scores'. count: questions that all have answered."""

    title: str
    name: str
    run: Run
    score: Estimate
    test: str
    interval: str
    count: int
    others: list[Other]

    def changed(self) -> list[int]:
        """The places of the questions that any of the others scores otherwise."""
        return sorted({each.index for other in self.others for each in other.changed})


def compared(task: Task, evaluations: Mapping[str, Evaluation]) -> Comparison:
    """How each evaluation but the first differs from the first, on the questions that all have answered. OptionError
    where there is none, or one was about different images. The names are what they are called; their data is the same.
    """
    places = set.intersection(*({record.index for record in found.records} for found in evaluations.values()))
    if not places:
        raise OptionError(
            "--compare: no question that all have answered", expected="the same --limit, --subset and --shard"
        )
    (name, baseline), *others = (
        (name, Evaluation(found.run, [record for record in found.records if record.index in places]))
        for name, found in evaluations.items()
    )
    return Comparison(
        title=task.title,
        name=name,
        run=baseline.run,
        score=_score(task, baseline.records),
        test=SIGN_TEST if task.graded else TEST,
        interval=kind_of_interval(task),
        count=len(places),
        others=[_other(task, baseline, name, found) for name, found in others],
    )


def _other(task: Task, baseline: Evaluation, name: str, found: Evaluation) -> Other:
    pairs = [Pair(*both) for both in zip(baseline.records, found.records, strict=True)]
    for pair in pairs:
        if pair.baseline.image != pair.other.image:
            raise OptionError(
                f"--compare: {pair.other.key!r:.100} of {name} is about another image",
                expected="the same images",
                fix="evaluate all with the same --data",
            )
    differences = [
        _difference(subset, of_subset) for subset, of_subset in counted(task, pairs, lambda pair: pair.baseline).items()
    ]
    return Other(
        name=name,
        run=found.run,
        score=_score(task, found.records),
        whole=_difference(TOTAL, [pair for pair in pairs if task.counts(pair.baseline.subset)] or pairs),
        differences=differences,
        changed=[
            Changed(
                index=pair.baseline.index,
                key=pair.baseline.key,
                subset=pair.baseline.subset,
                question=pair.baseline.question,
                answers=(pair.baseline.answer, pair.other.answer),
                scores=(pair.baseline.score, pair.other.score),
            )
            for pair in pairs
            if pair.change
        ],
    )


def _score(task: Task, records: Sequence[Record]) -> Estimate:
    """Of the subsets that the total is of; where there is none of these, of all."""
    scores = [record.score for record in records if task.counts(record.subset)]
    return estimate(scores or [record.score for record in records], task.graded)


def _difference(subset: str, pairs: Sequence[Pair]) -> Difference:
    count = len(pairs)
    worse, better = sum(pair.change < 0 for pair in pairs), sum(pair.change > 0 for pair in pairs)
    return Difference(
        subset=subset,
        count=count,
        baseline=sum(pair.baseline.score for pair in pairs) / count,
        other=sum(pair.other.score for pair in pairs) / count,
        worse=worse,
        better=better,
        p=exact_p(better, worse),
        other_answers=sum(pair.baseline.answer != pair.other.answer for pair in pairs),
    )


def comparison_markdown(found: Comparison) -> str:
    """A comparison as a table with a row for each evaluation; then, for each of the others, where it differs."""
    head = [f"against {found.name}", "score", INTERVAL, *CHANGES]
    rows = [[found.name, percent(found.score.mean), interval(found.score), *[""] * len(CHANGES)]]
    rows += [
        [each.name, percent(each.score.mean), interval(each.score), *_changes(each.whole)] for each in found.others
    ]
    lines = [f"### {found.title}", "", *table(head, rows), ""]
    lines += [f"- {name}: {described(run)}" for name, run in _runs(found)]
    lines += ["", _notes(found)]
    for other in found.others:
        lines += ["", f"#### {other.name} against {found.name}", "", *_details(found.name, other)]
    return "\n".join([*lines, ""])


def _notes(found: Comparison) -> str:
    """What the numbers of the first table are."""
    return (
        f"{found.count} of {found.run.questions} questions. Scores in %, {found.interval}. worse, better: questions "
        f"with a lower or higher score than {found.name} has; p: {found.test}. Data {found.run.data}."
    )


def _runs(found: Comparison) -> list[tuple[str, Run]]:
    """What was compared, by its name."""
    return [(found.name, found.run), *((other.name, other.run) for other in found.others)]


def _details(baseline: str, other: Other) -> list[str]:
    head = ["", "questions", baseline, other.name, "difference", *CHANGES]
    rows = [
        [
            row.subset,
            f"{row.count}",
            percent(row.baseline),
            percent(row.other),
            f"{100 * (row.other - row.baseline):+.1f}",
            *_changes(row),
        ]
        for row in other.differences
    ]
    lines = table(head, rows)
    if other.changed:
        changed = [
            [each.key, each.question, *(f"{a} ({s:.2g})" for a, s in zip(each.answers, each.scores, strict=True))]
            for each in other.changed
        ]
        head = ["", "question", baseline, other.name]
        lines += ["", "Questions with another score:", "", *table(head, changed, texts=len(head))]
    return lines


def _changes(found: Difference) -> list[str]:
    """Cells of CHANGES."""
    return [f"{found.worse}", f"{found.better}", f"{found.p:.3g}", f"{found.other_answers}"]


def where_looked(task: Task, items: Sequence[Item], engine: Engine, page_budget: int | None) -> list[Looked]:
    """Where an engine looks for each of these. Raises what an engine does."""
    looked = []
    for item in items:
        with engine.image(item.image, exif=False) as view:
            looked.append(task.look(engine, view, item, page_budget))
    return looked


def draw_looks(items: Sequence[Item], looked: Mapping[str, Sequence[Looked]], folder: Path) -> list[Path]:
    """A picture for each item: where each evaluation looked, by its name. Returns the files, FOLDER/INDEX.png. Raises
    ImageError and OptionError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"--pictures {folder}: {error.strerror}", expected="a folder of yours") from None
    written = []
    for place, item in enumerate(items):
        image, path = load_image(item.image, exif=False), folder / f"{item.index:05d}.png"
        sheet = _stacked([(name, draw_selection(image, *each[place])) for name, each in looked.items()])
        write_picture(sheet, path, "--pictures")
        written.append(path)
    return written


def _stacked(panels: Sequence[tuple[str, PIL.Image.Image]]) -> PIL.Image.Image:
    """One above the other, each under its name."""
    width, height = max(panel.width for _, panel in panels), sum(panel.height + TITLE for _, panel in panels)
    sheet, y = PIL.Image.new("RGB", (width, height), "white"), 0
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for name, panel in panels:
        draw.text((10, y + 4), name, "black", font)
        sheet.paste(panel, (0, y + TITLE))
        y += panel.height + TITLE
    return sheet
