"""The questions of a benchmark, put to an engine: which of them, several at a time, and how far it is."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeVar

from engines.checks import require_integer, shown
from engines.errors import FlexError, OptionError
from runtime.engine import Engine
from runtime.evaluate.results import Results
from runtime.evaluate.task import Item, Record, Task, image_digest

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")

AHEAD = 2  # times the slots: so many images are on their way, for slots not to wait for the slowest


@dataclass(frozen=True)
class Selection:
    """Which questions to ask. subsets: some of the data's; () = all. limit: the first of each subset; None = all.
    shard: (i, n), 1 <= i <= n: each n-th question, from the i-th on."""

    subsets: tuple[str, ...] = ()
    limit: int | None = None
    shard: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        require_integer(self.limit, f"--limit {self.limit}", 1, none="all")

    def of(self, items: Sequence[Item]) -> list[Item]:
        """Those of a data set. OptionError for a subset that it has not."""
        there = list(dict.fromkeys(item.subset for item in items))
        unknown = [subset for subset in self.subsets if subset not in there]
        if unknown:
            raise OptionError(f"--subset {unknown[0]}", expected=f"some of {there}")
        chosen = []
        for subset in dict.fromkeys(self.subsets or there):  # one may be named twice
            chosen += [item for item in items if item.subset == subset][: self.limit]
        index, count = self.shard
        return [item for item in sorted(chosen, key=lambda item: item.index) if item.index % count == index - 1]


def read_shard(text: str) -> tuple[int, int]:
    """ "2/4" as (2, 4). OptionError for anything else."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise OptionError(f"--shard {shown(text)}", expected="I/N, such as 1/4, 2/4, 3/4 and 4/4 on four machines")
    return int(found[1]), int(found[2])


def evaluate(
    task: Task, items: Iterable[Item], engine: Engine, results: Results, report: Callable[[float], None]
) -> None:
    """Ask those of `items` that have no result yet, as many images at a time as the engine has slots; the results come
    in the order of the questions. `report` is told the part of these that is done, 0 .. 1.

    Raises what the engine does, with the name of the question; results before it are kept, and the engine is usable.
    """

    def ask(group: Sequence[Item]) -> Iterator[Record]:
        """Questions about one image, which is encoded once. As it is stored: the official code does not turn it."""
        item = group[0]
        try:
            with engine.image(item.image, exif=False) as view:
                digest = image_digest(item.image)
                for item in group:
                    yield replace(task.ask(engine, view, item, results.run.page_budget), image=digest)
        except FlexError as error:
            raise error.within(item.key) from error

    def asked_ahead(group: Sequence[Item]) -> Iterator[Record]:
        return ahead(ask(group))

    pending = results.pending(items)
    groups = (list(group) for _, group in groupby(pending, key=lambda item: item.image))
    done = 0
    with closing(in_order(ask if engine.slots == 1 else asked_ahead, groups, engine.slots)) as told:
        for records in told:
            for record in records:
                results.add(record)
                done += 1
                report(done / len(pending))


def ahead(answers: Iterable[Answered]) -> Iterator[Answered]:
    """The answers, made now; what ends them, if it is an error, is raised in its place: behind those before it."""
    made, failure = list[Answered](), None
    try:
        for answer in answers:
            made.append(answer)
    except FlexError as error:
        failure = error

    def told() -> Iterator[Answered]:
        yield from made
        if failure is not None:
            raise failure

    return told()


def in_order(ask: Callable[[Asked], Answered], groups: Iterable[Asked], workers: int) -> Generator[Answered]:
    """`ask` of each group, `workers` at a time, in their order. Raises what `ask` does; what waits is dropped then."""
    if workers == 1:  # here, where Ctrl-C ends it at once
        yield from map(ask, groups)
        return
    waiting = deque[Future[Answered]]()
    with ThreadPoolExecutor(workers, "flexattention-evaluate") as pool:
        try:
            for group in groups:
                waiting.append(pool.submit(ask, group))
                if len(waiting) >= AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()
