"""Score a bundle on a benchmark, by its authors' protocol: `python -m runtime.evaluate vstar --data DIR BUNDLE`.

It prints a table with intervals. A run that is killed goes on where it was when the same command comes again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.checks import shown
from engines.errors import DataError, OptionError
from engines.open import add_opening_options, add_slot_options, opening_options
from engines.progress import progress
from plugins import command
from runtime.engine import Engine
from runtime.evaluate import magnifier, scenes, textvqa, vstar
from runtime.evaluate.compare import Side, compared, comparison_markdown, draw_changes, require_of
from runtime.evaluate.report import markdown, summary, write_beside
from runtime.evaluate.results import Results, Run, merged, read_results, require_kept, write_results
from runtime.evaluate.run import Selection, evaluate, read_shard
from runtime.evaluate.task import Item, Record, Task, digest_of

TASKS = {task.name: task for task in (vstar.TASK, textvqa.TASK, magnifier.TASK, scenes.TASK)}
PICTURES = 24  # changed questions that are drawn, at most
PICTURED = f"of --compare with bundles: where each looked, for {PICTURES} questions with another score at most"
FILES = """Written beside FILE, NAME.jsonl: NAME.md, the table; NAME.json, the same for programs; NAME.answers.jsonl or
NAME.vbench_SUBSET.txt, what the authors' script writes."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line; --help shows every default."""
    look = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m runtime.evaluate", description=__doc__, formatter_class=look)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for task in TASKS.values():
        one = tasks.add_parser(task.name, help=task.title, description=task.title, epilog=FILES, formatter_class=look)
        add = one.add_argument
        add("bundle", type=Path, nargs="?", help="folder written by export/build.py")
        add("--data", type=Path, required=True, metavar="DIR", help="the data set as its authors pack it")
        add("--out", type=Path, metavar="FILE", help="results, to go on from; None = TASK-BUNDLE.jsonl in this folder")
        add("--subset", action="append", default=[], help="a part of the data; may be repeated; none = all")
        add("--limit", type=int, default=Selection.limit, help="the first questions of each subset; None = all")
        add("--shard", default="1/1", metavar="I/N", help="each N-th question, from the I-th on; see merge")
        add("--page-budget", type=int, help="pages each layer reads at most; None = bundle's")
        add("--compare", type=Path, nargs=2, metavar=("A", "B"), help="bundles, or results of them, in BUNDLE's place")
        add("--pictures", type=Path, metavar="FOLDER", help=PICTURED)
        add_opening_options(one)
        add_slot_options(one)
    merge = tasks.add_parser("merge", help="one file of the results of several shards", formatter_class=look)
    merge.add_argument("out", type=Path, help="file to write")
    merge.add_argument("results", type=Path, nargs="+", help="files of --out, of one run")
    return parser.parse_args(arguments)


def run(given: argparse.Namespace) -> int:
    """Do what the command line says; the exit status. Raises a FlexError."""
    if given.task == "merge":
        _merge(given.results, given.out)
        return 0
    task = TASKS[given.task]
    if (given.bundle is None) == (given.compare is None):
        raise OptionError(
            "a BUNDLE and --compare" if given.bundle else "no BUNDLE", expected="BUNDLE, or --compare A B"
        )
    if given.pictures is not None and (given.compare is None or not all(map(Path.is_dir, given.compare))):
        raise OptionError("--pictures", expected="--compare with two bundles, to ask them", fix="leave it out")
    items = task.read(given.data)
    if given.compare is not None:
        _compare(task, items, given)
        return 0
    out = given.out or Path(f"{task.name}-{_name(given.bundle)}.jsonl")
    found, records = _evaluated(task, items, given.bundle, out, given)
    _tell(task, found, records, out)
    return 0


def _merge(paths: Sequence[Path], out: Path) -> None:
    _require_jsonl(out)
    found, records = merged(paths)
    task = TASKS.get(found.task)
    if task is None:
        raise DataError(f"{paths[0]} holds results of {shown(found.task)}", expected=f"one of {', '.join(TASKS)}")
    require_kept(out, found, records)
    write_results(out, found, records)
    _tell(task, found, records, out)


def _selection(given: argparse.Namespace) -> Selection:
    return Selection(tuple(given.subset), given.limit, read_shard(given.shard))


def _evaluated(
    task: Task, items: Sequence[Item], bundle: Path, out: Path, given: argparse.Namespace
) -> tuple[Run, list[Record]]:
    """The results of a bundle on the chosen questions, which are in `out` then."""
    _require_jsonl(out)
    chosen = _selection(given).of(items)
    with (
        Engine(bundle, **opening_options(given)) as engine,
        Results(out, Run.of(task, items, engine, given.page_budget)) as results,
    ):
        left = len(results.pending(chosen))
        with progress(f"{task.name}: {left} of {len(chosen)} questions", quiet=not left) as report:
            evaluate(task, chosen, engine, results, report)
        wanted = {item.index for item in chosen}
        return results.run, [record for record in results.records if record.index in wanted]


def _tell(task: Task, found: Run, records: Sequence[Record], out: Path) -> None:
    """Print the table, and write it, and the authors' files, beside the results."""
    if not records:
        raise OptionError(f"{out} has no results", expected="at least one", fix="a larger --limit, or another --shard")
    told = summary(task, found, records)
    text = markdown(told)
    files = {"md": text, "json": _json(told), **task.answer_files(records, found.template)}
    print(text)
    _say_written([out, *write_beside(out, files)])


def _compare(task: Task, items: Sequence[Item], given: argparse.Namespace) -> None:
    names = names_of(*given.compare)
    out = given.out or Path(f"{task.name}-{names[0]}-{names[1]}.json")
    sides = []
    for path, name in zip(given.compare, names, strict=True):
        if path.is_dir():
            file = out.with_name(f"{task.name}-{name}.jsonl")
            sides.append(Side(*_evaluated(task, items, path, file, given)))
        else:
            wanted = {item.index for item in _selection(given).of(items)}
            found, records = read_results(path)
            require_of(task.name, digest_of(items), found, f"{path}")
            sides.append(Side(found, [record for record in records if record.index in wanted]))
    told, changes = compared(task, *sides)
    text = comparison_markdown(told)
    print(text)
    written = write_beside(out, {"md": text, "json": _json(told)})
    if given.pictures is not None:
        opening = opening_options(given)
        with Engine(given.compare[0], **opening) as first, Engine(given.compare[1], **opening) as second:
            engines = list(zip([f"A: {names[0]}", f"B: {names[1]}"], (first, second), strict=True))
            written += draw_changes(task, changes[:PICTURES], items, engines, given.pictures, given.page_budget)
    _say_written(written)


def _require_jsonl(out: Path) -> None:
    """OptionError for a file of results whose name would be that of a file written beside it."""
    if out.suffix != ".jsonl":
        raise OptionError(f"--out {out}", expected="a name that ends with .jsonl")


def _name(path: Path) -> str:
    """What to call a bundle, or results, in the names of files."""
    return re.sub(r"[^\w.-]", "_", (path.resolve().name if path.is_dir() else path.stem)) or "bundle"


def names_of(first: Path, second: Path) -> list[str]:
    """Of two to compare: with their folders, where one name is that of two."""
    names = [_name(first), _name(second)]
    if names[0] == names[1] and first.resolve() != second.resolve():
        return [f"{_name(path.resolve().parent)}-{name}" for path, name in zip((first, second), names, strict=True)]
    return names


def _json(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def _say_written(paths: Sequence[Path]) -> None:
    print(f"wrote {', '.join(map(str, paths))}", file=sys.stderr)


def main() -> int:
    """Entry of the command line; returns the exit status."""
    return command.run(lambda: run(parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
