"""What is shown of results: a table, and the same as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engines.bundle.manifest import PROMPT_TEMPLATE
from engines.errors import OptionError
from runtime.evaluate.results import Run
from runtime.evaluate.significance import CONFIDENCE, MEANS, SHARES, estimate
from runtime.evaluate.task import Record, Task

TOTAL = "all"  # the row of all questions that count


def counted(task: Task, records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each subset, and of them all where there are several: a row of a table each."""
    subsets = {subset: [each for each in records if each.subset == subset] for subset in _subsets(records)}
    total = [each for each in records if task.overall is None or each.subset in task.overall]
    several = len({each.subset for each in total}) > 1
    return subsets | ({TOTAL: total} if several else {})


def _subsets(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record.subset for record in sorted(records, key=lambda record: record.index)))


def summary(task: Task, run: Run, records: Sequence[Record]) -> dict[str, Any]:
    """The scores of a run, with what they depend on, as JSON. `records`: at least one."""
    rows = [
        {
            "subset": subset,
            **asdict(estimate([each.score for each in found], task.graded)),
            "pages_read": sum(each.pages_read for each in found) / len(found),
        }
        for subset, found in counted(task, records).items()
    ]
    return {
        "title": task.title,
        **asdict(run),
        "official_template": run.template == PROMPT_TEMPLATE,
        "answered": len(records),
        "cut_off": sum(record.details.get("finish_reason") == "length" for record in records),
        "confidence": CONFIDENCE,
        "interval": MEANS if task.graded else SHARES,
        "scores": rows,
    }


def markdown(found: dict[str, Any]) -> str:
    """A `summary` as a table, with the lines that it needs to be compared with another."""
    head = ["", "questions", "score", f"{100 * found['confidence']:.0f} % interval", "pages read"]
    rows = [
        [row["subset"], f"{row['count']}", percent(row["mean"]), interval(row), f"{row['pages_read']:.1f}"]
        for row in found["scores"]
    ]
    notes = [
        described(found),
        f"Scores in %, {found['interval']}. Pages: mean of a layer and a token. Data {found['data']}.",
    ]
    if found["cut_off"]:
        notes.append(f"{found['cut_off']} answers were cut off, at their most tokens or the end of the context.")
    if found["answered"] < found["questions"]:
        notes.append(f"{found['answered']} of {found['questions']} questions: not the whole benchmark.")
    if not found["official_template"]:
        notes.append("The bundle's prompt template is not the official one.")
    return "\n".join([f"### {found['title']}", "", *table(head, rows), "", *notes, ""])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown; all columns but the first are numbers."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return [
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
        for row in (head, rule, *rows)
    ]


def described(run: dict[str, Any]) -> str:
    """A line that says what ran, of a Run as JSON."""
    place = f"{run['backend']}, {run['device']}, at most {run['page_budget']} pages a layer"
    return f"{run['name']} ({run['precision']}) on {place}; bundle {run['bundle']}."


def percent(share: float) -> str:
    """0.487 as "48.7"."""
    return f"{100 * share:.1f}"


def interval(row: dict[str, Any]) -> str:
    """ "39.8 .. 57.7", of an estimate as JSON."""
    return "-" if row["low"] is None else f"{percent(row['low'])} .. {percent(row['high'])}"


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
