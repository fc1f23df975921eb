"""What is shown of results: a table, and the same as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from engines.bundle.manifest import PROMPT_TEMPLATE
from engines.errors import OptionError
from runtime.evaluate.results import Evaluation, Run
from runtime.evaluate.significance import CONFIDENCE, MEANS, SHARES, Estimate, estimate
from runtime.evaluate.task import Record, Task

TOTAL = "all"  # the row of all questions that count
INTERVAL = f"{100 * CONFIDENCE:.0f} % interval"
Counted = TypeVar("Counted")


@dataclass(frozen=True)
class Score(Estimate):
    """The score of a subset, or of all. pages_read: mean of its records."""

    subset: str
    pages_read: float


@dataclass(frozen=True)
class Summary:
    """What a run scored. answered: questions that have a result. cut_off: answers that ended at their most tokens, or
    at the end of the context. interval: the kind that `scores` have, of `confidence`. scores: a row each."""

    title: str
    run: Run
    official_template: bool
    answered: int
    cut_off: int
    confidence: float
    interval: str
    scores: list[Score]


def counted(task: Task, rows: Sequence[Counted], record: Callable[[Counted], Record]) -> dict[str, list[Counted]]:
    """The rows of each subset, and of them all where there are several: a row of a table each. `rows`: in the order of
    the questions. `record`: of a row."""
    subsets = dict.fromkeys(record(row).subset for row in rows)
    found = {subset: [row for row in rows if record(row).subset == subset] for subset in subsets}
    counting = list(filter(task.counts, subsets))
    total = [row for row in rows if record(row).subset in counting]
    return found | ({TOTAL: total} if len(counting) > 1 else {})


def kind_of_interval(task: Task) -> str:
    """What the intervals of its scores are."""
    return MEANS if task.graded else SHARES


def summary(task: Task, found: Evaluation) -> Summary:
    """The scores of a run, of at least one record, with what they depend on."""
    return Summary(
        title=task.title,
        run=found.run,
        official_template=found.run.template == PROMPT_TEMPLATE,
        answered=len(found.records),
        cut_off=sum(record.details.get("finish_reason") == "length" for record in found.records),
        confidence=CONFIDENCE,
        interval=kind_of_interval(task),
        scores=[
            Score(
                **asdict(estimate([each.score for each in records], task.graded)),
                subset=subset,
                pages_read=sum(each.pages_read for each in records) / len(records),
            )
            for subset, records in counted(task, found.records, lambda record: record).items()
        ],
    )


def markdown(found: Summary) -> str:
    """A summary as a table, with the lines that it needs to be compared with another."""
    head = ["", "questions", "score", INTERVAL, "pages read"]
    rows = [
        [row.subset, f"{row.count}", percent(row.mean), interval(row), f"{row.pages_read:.1f}"] for row in found.scores
    ]
    notes = [
        described(found.run),
        f"Scores in %, {found.interval}. Pages: mean of a layer and a token. Data {found.run.data}.",
    ]
    if found.cut_off:
        notes.append(f"{found.cut_off} answers were cut off, at their most tokens or the end of the context.")
    if found.answered < found.run.questions:
        notes.append(f"{found.answered} of {found.run.questions} questions: not the whole benchmark.")
    if not found.official_template:
        notes.append("The bundle's prompt template is not the official one.")
    return "\n".join([f"### {found.title}", "", *table(head, rows), "", *notes, ""])


def table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> list[str]:
    """The lines of a table in Markdown. texts: so many columns, from the first on, are text; the others are numbers."""
    rule = ["---" if column < texts else "---:" for column in range(len(head))]
    return [
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
        for row in (head, rule, *rows)
    ]


def described(run: Run) -> str:
    """A line that says what ran."""
    place = f"{run.backend}, {run.device}, at most {run.page_budget} pages a layer"
    return f"{run.name} ({run.precision}) on {place}; bundle {run.bundle}."


def percent(share: float) -> str:
    """0.487 as "48.7"."""
    return f"{100 * share:.1f}"


def interval(found: Estimate) -> str:
    """ "39.8 .. 57.7"."""
    return "-" if found.low is None or found.high is None else f"{percent(found.low)} .. {percent(found.high)}"


def write_beside(results: Path, texts: dict[str, str]) -> list[Path]:
    """Write files beside a file of results: NAME.jsonl becomes NAME.SUFFIX for each suffix. Returns them. OptionError
    where that fails."""
    written = []
    for suffix, text in texts.items():
        path = results.with_name(f"{results.stem}.{suffix}")
        try:
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise OptionError(f"{path} cannot be written: {error.strerror}", expected="a folder of yours") from None
        written.append(path)
    return written
