"""Two bundles on the same questions: how the scores differ, whether by more than chance, and where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import PIL.Image
from PIL import ImageDraw, ImageFont

from engines.errors import OptionError
from runtime.engine import Engine
from runtime.evaluate.report import counted, described, percent, table
from runtime.evaluate.results import Run
from runtime.evaluate.significance import exact_p
from runtime.evaluate.task import Item, Record, Task
from runtime.image import load_image
from runtime.terminal.show import draw_selection, write_picture

TEST = "McNemar's exact test, two-sided"
SIGN_TEST = "exact sign test, two-sided"  # what McNemar's is for graded scores
TITLE = 24  # pixels


@dataclass(frozen=True)
class Side:
    """One of the two: its results."""

    run: Run
    records: Sequence[Record]


@dataclass(frozen=True)
class Change:
    """A question that the two answer with different scores; records of the first and the second."""

    before: Record
    after: Record


def require_of(task: str, data: str, found: Run, where: str) -> None:
    """OptionError unless results are of that task and that data."""
    for name, wanted in (("task", task), ("data", data)):
        if (held := getattr(found, name)) != wanted:
            raise OptionError(
                f"--compare: {where} holds results of {name} {held}",
                expected=f"{name} {wanted}, as the command says",
                fix="name the task and the --data that it was evaluated with",
            )


def compared(task: Task, first: Side, second: Side) -> tuple[dict[str, Any], list[Change]]:
    """How the second differs from the first on the questions that both answered, as JSON; and the questions whose score
    changed. OptionError for results of different questions."""
    for name in ("task", "data"):
        one, other = getattr(first.run, name), getattr(second.run, name)
        if one != other:
            raise OptionError(
                f"--compare: results of {name} {one} and {name} {other}",
                expected="the same questions",
                fix="evaluate both with the same --data",
            )
    after = {record.index: record for record in second.records}
    pairs = [Change(record, after[record.index]) for record in first.records if record.index in after]
    if not pairs:
        raise OptionError(
            "--compare: no question that both answered", expected="the same --limit, --subset and --shard"
        )
    by_index = {pair.before.index: pair for pair in pairs}
    rows = [_row(subset, [by_index[each.index] for each in found]) for subset, found in _counted(task, pairs).items()]
    changes = [pair for pair in pairs if pair.before.score != pair.after.score]
    return {
        "title": task.title,
        "first": asdict(first.run),
        "second": asdict(second.run),
        "test": SIGN_TEST if task.graded else TEST,
        "scores": rows,
        "other_answers": sum(pair.before.answer != pair.after.answer for pair in pairs),
        "changed": [
            {
                "key": pair.before.key,
                "subset": pair.before.subset,
                "question": pair.before.question,
                "answers": [pair.before.answer, pair.after.answer],
                "scores": [pair.before.score, pair.after.score],
            }
            for pair in changes
        ],
    }, changes


def _counted(task: Task, pairs: Sequence[Change]) -> dict[str, list[Record]]:
    return counted(task, [pair.before for pair in pairs])


def _row(subset: str, pairs: Sequence[Change]) -> dict[str, Any]:
    count = len(pairs)
    first, second = (
        sum(score) / count for score in zip(*((p.before.score, p.after.score) for p in pairs), strict=True)
    )
    gained = sum(pair.after.score > pair.before.score for pair in pairs)
    lost = sum(pair.after.score < pair.before.score for pair in pairs)
    return {
        "subset": subset,
        "count": count,
        "first": first,
        "second": second,
        "gained": gained,
        "lost": lost,
        "p": exact_p(gained, lost),
    }


def comparison_markdown(found: dict[str, Any]) -> str:
    """What `compared` found, as tables."""
    head = ["", "questions", "A", "B", "B - A", "only B better", "only A better", "p"]
    rows = [
        [
            row["subset"],
            f"{row['count']}",
            percent(row["first"]),
            percent(row["second"]),
            f"{100 * (row['second'] - row['first']):+.1f}",
            f"{row['gained']}",
            f"{row['lost']}",
            f"{row['p']:.3g}",
        ]
        for row in found["scores"]
    ]
    sides = [f"{letter}: {described(found[side])}" for letter, side in (("A", "first"), ("B", "second"))]
    lines = [f"### {found['title']}: A and B", "", *table(head, rows), "", *sides]
    lines.append(f"Scores in %; p: {found['test']}. {found['other_answers']} answers differ.")
    if found["changed"]:
        changed = [
            [each["key"], each["question"], *(_answer(each, side) for side in (0, 1))] for each in found["changed"]
        ]
        lines += ["", "Questions with another score:", "", *table(["", "question", "A", "B"], changed)]
    return "\n".join([*lines, ""])


def _answer(changed: dict[str, Any], side: int) -> str:
    answer, score = changed["answers"][side], changed["scores"][side]
    return f"{answer} ({score:.2g})"


def draw_changes(
    task: Task,
    changes: Iterable[Change],
    items: Sequence[Item],
    engines: Sequence[tuple[str, Engine]],
    folder: Path,
    page_budget: int | None = None,
) -> list[Path]:
    """A picture for each change, of where each engine looked. Returns the files, FOLDER/INDEX.png. `engines`: each with
    what to call it. Raises what an engine does, and OptionError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"--pictures {folder}: {error.strerror}", expected="a folder of yours") from None
    by_index, written = {item.index: item for item in items}, []
    for change in changes:
        item = by_index[change.before.index]
        image, panels = load_image(item.image, exif=False), []
        for name, engine in engines:
            with engine.image(image, exif=False) as view:
                panels.append((name, draw_selection(image, *task.look(engine, view, item, page_budget))))
        path = folder / f"{item.index:05d}.png"
        write_picture(_stacked(panels), path, "--pictures")
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
