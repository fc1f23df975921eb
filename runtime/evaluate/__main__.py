"""Score a bundle on a benchmark, by its authors' protocol: `python -m runtime.evaluate vstar --data DIR BUNDLE`.

It prints a table with intervals. A run that is killed goes on where it was when the same command comes again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engines.bundle.folder import read_manifest
from engines.errors import DataError, OptionError
from engines.open import add_opening_options, add_slot_options, opening_options
from engines.progress import progress
from plugins import command
from runtime.engine import Engine
from runtime.evaluate import magnifier, scenes, textvqa, vstar
from runtime.evaluate.asking import Selection, evaluate, read_shard
from runtime.evaluate.compare import compared, comparison_markdown, draw_looks, where_looked
from runtime.evaluate.report import markdown, summary, write_beside
from runtime.evaluate.results import Evaluation, Results, Run, merged, read_results, require_kept, write_results
from runtime.evaluate.task import Item, Looked, Task, digest_of, there

TASKS = {task.name: task for task in (vstar.TASK, textvqa.TASK, magnifier.TASK, scenes.TASK)}
PICTURES = 24  # changed questions that are drawn, at most
PICTURED = f"of --compare with bundles: where each looked, for {PICTURES} questions with another score at most"
COMPARED = "bundles, or results of them, in BUNDLE's place: each against the first"
OUT = """results to go on from, NAME.jsonl; None = TASK-BUNDLE.jsonl in this folder, of a shard TASK-BUNDLE-IofN.jsonl.
Of --compare: the comparison, NAME.json, and the bundles' results beside it, NAME-BUNDLE.jsonl; None = TASK-A-B.json and
TASK-BUNDLE.jsonl"""
FILES = """Written beside NAME.jsonl: NAME.md, the table; NAME.json, the same for programs; NAME.answers.jsonl or
NAME.vbench_SUBSET.txt, what the authors' script writes. Beside the NAME.json of --compare: NAME.md."""
LETTERS = 8  # of a bundle's digest, in the names of bundles that have one name


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line; --help shows every default."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m runtime.evaluate", description=__doc__, formatter_class=style)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for task in TASKS.values():
        one = tasks.add_parser(task.name, help=task.title, description=task.title, epilog=FILES, formatter_class=style)
        add = one.add_argument
        add("bundle", type=Path, nargs="?", help="folder written by export/build.py")
        add("--data", type=Path, required=True, metavar="DIR", help="the data set as its authors pack it")
        add("--out", type=Path, metavar="FILE", help=OUT)
        add("--subset", action="append", default=[], help="a part of the data; may be repeated; none = all")
        add("--limit", type=int, default=Selection.limit, help="the first questions of each subset; None = all")
        add("--shard", default="1/1", metavar="I/N", help="each N-th question, from the I-th on; see merge")
        add("--page-budget", type=int, help="pages each layer reads at most; None = bundle's")
        add("--compare", type=Path, nargs="+", metavar="BUNDLE", help=COMPARED)
        add("--pictures", type=Path, metavar="FOLDER", help=PICTURED)
        add_opening_options(one)
        add_slot_options(one)
    merge = tasks.add_parser("merge", help="one file of the results of several shards", formatter_class=style)
    merge.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write, NAME.jsonl")
    merge.add_argument("results", type=Path, nargs="+", help="results of one run, as --out or shards have written them")
    return parser.parse_args(arguments)


def run(given: argparse.Namespace) -> int:
    """Do what the command line says; the exit status. Raises a FlexError."""
    if given.task == "merge":
        _merge(given.out, given.results)
        return 0
    task = TASKS[given.task]
    if (given.bundle is None) == (given.compare is None):
        raise OptionError(
            "a BUNDLE and --compare" if given.bundle else "no BUNDLE", expected="BUNDLE, or --compare A B"
        )
    if given.compare is not None and len(given.compare) == 1:
        raise OptionError(f"--compare {given.compare[0]}", expected="two or more: each is held against the first")
    if given.pictures is not None and (given.compare is None or not all(map(_is_bundle, given.compare))):
        raise OptionError("--pictures", expected="--compare with bundles, to ask them", fix="leave it out")
    if given.out is not None:
        _require_suffix(given.out, ".jsonl" if given.compare is None else ".json")
    items = task.read(given.data)
    if given.compare is not None:
        _compare(task, items, given)
        return 0
    out = given.out or Path(f"{task.name}-{_name(given.bundle)}{_shard(given)}.jsonl")
    _tell(task, _evaluated(task, items, given.bundle, out, given), out)
    return 0


def _merge(out: Path, paths: Sequence[Path]) -> None:
    _require_suffix(out, ".jsonl")
    found = merged(paths)
    if found.run.task not in TASKS:
        raise DataError(
            f"{paths[0]} holds results of the task {found.run.task!r:.100}",
            expected=f"one of {', '.join(TASKS)}",
            fix="merge them with the version that made them",
        )
    require_kept(out, found)
    write_results(out, found)
    _tell(TASKS[found.run.task], found, out)


def _selection(given: argparse.Namespace) -> Selection:
    return Selection(tuple(given.subset), given.limit, read_shard(given.shard))


def _evaluated(task: Task, items: Sequence[Item], bundle: Path, out: Path, given: argparse.Namespace) -> Evaluation:
    """The results of a bundle on the chosen questions, which are in `out` then."""
    chosen = _selection(given).of(items)
    with (
        Engine(bundle, **opening_options(given)) as engine,
        Results(out, Run.of(task, items, engine, given.page_budget)) as results,
    ):
        pending = results.pending(chosen)
        with progress(f"{task.name}: {len(pending)} of {len(chosen)} questions", quiet=not pending) as report:
            evaluate(task, pending, engine, results, report)
        return _of_these(Evaluation(results.run, results.records), chosen)


def _of_these(found: Evaluation, chosen: Sequence[Item]) -> Evaluation:
    wanted = {item.index for item in chosen}
    return Evaluation(found.run, [record for record in found.records if record.index in wanted])


def _tell(task: Task, found: Evaluation, out: Path) -> None:
    """Print the table, and write it, and the authors' files, beside the results."""
    if not found.records:
        raise OptionError(f"{out} has no results", expected="at least one", fix="a larger --limit, or another --shard")
    told = summary(task, found)
    text = markdown(told)
    files = {"md": text, "json": _json(told), **task.answer_files(found.records, found.run.template)}
    print(text)
    _say_written([out, *write_beside(out, files)])


def _compare(task: Task, items: Sequence[Item], given: argparse.Namespace) -> None:
    names = names_of(given.compare)
    out = given.out or Path(f"{task.name}-{'-'.join(names)}.json")
    stem = task.name if given.out is None else given.out.stem
    chosen, data = _selection(given).of(items), digest_of(items)
    held = dict[str, Evaluation]()  # before any bundle is asked
    for path, name in zip(given.compare, names, strict=True):
        if not _is_bundle(path):
            found = read_results(path)
            found.run.require_of(task, data, str(path))
            held[name] = _of_these(found, chosen)
    evaluations = {
        name: held.get(name)
        or _evaluated(task, items, path, out.with_name(f"{stem}-{name}{_shard(given)}.jsonl"), given)
        for path, name in zip(given.compare, names, strict=True)
    }
    told = compared(task, evaluations)
    text = comparison_markdown(told)
    print(text)
    written = write_beside(out, {"md": text, "json": _json(told)})
    if given.pictures is not None:
        changed = [items[index] for index in told.changed()[:PICTURES]]
        looked = dict[str, list[Looked]]()
        for path, name in zip(given.compare, names, strict=True):  # one after the other: two may not fit
            with Engine(path, **opening_options(given)) as engine:
                looked[name] = where_looked(task, changed, engine, given.page_budget)
        written += draw_looks(changed, looked, given.pictures)
    _say_written(written)


def _require_suffix(out: Path, suffix: str) -> None:
    """OptionError for a file that is not named as what it holds: files beside it would take its name."""
    if out.suffix != suffix:
        raise OptionError(f"--out {out}", expected=f"a name that ends with {suffix}")


def _shard(given: argparse.Namespace) -> str:
    """What the names of a shard's results have behind the bundle's name."""
    index, count = read_shard(given.shard)
    return "" if count == 1 else f"-{index}of{count}"


def names_of(paths: Sequence[Path]) -> list[str]:
    """What to call bundles and results, each otherwise: by their names; several of one name, with the first letters of
    the bundle's digest; and with their places, where it is one bundle. Raises what reading a manifest or results does.
    """
    names = list(map(_name, paths))
    both = list(zip(names, paths, strict=True))
    names = [f"{name}-{_digest(path)}" if names.count(name) > 1 else name for name, path in both]
    return [f"{name}-{place}" if names.count(name) > 1 else name for place, name in enumerate(names, 1)]


def _digest(path: Path) -> str:
    """The first letters of a bundle's digest, of the bundle or its results."""
    digest = read_manifest(path)[1] if _is_bundle(path) else read_results(path).run.bundle
    return digest.removeprefix("sha256:")[:LETTERS]


def _is_bundle(path: Path) -> bool:
    """Whether it is one, and no file of results. DataError where nobody can tell."""
    return there(path, Path.is_dir)


def _name(path: Path) -> str:
    """What to call a bundle, or results, in the names of files."""
    name = path.stem if path.suffix == ".jsonl" and not _is_bundle(path) else path.resolve().name
    return re.sub(r"[^\w.-]", "_", name) or "bundle"


def _json(found: Any) -> str:
    """A dataclass as JSON."""
    return json.dumps(asdict(found), indent=1, ensure_ascii=False) + "\n"


def _say_written(paths: Sequence[Path]) -> None:
    print(f"wrote {', '.join(map(str, paths))}", file=sys.stderr)


def main() -> int:
    """Entry of the command line; returns the exit status."""
    return command.run(lambda: run(parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
