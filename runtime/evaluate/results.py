"""The file of results: a line for the run, then one for each question as soon as it is answered, so that a run which is
killed goes on where it was."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from engines.checks import shown
from engines.errors import DataError, OptionError
from plugins.files import open_file, parse_json, read_file
from runtime.engine import Engine
from runtime.evaluate.task import LARGEST, Item, Record, Task, digest_of, image_digest, there

FORMAT = 1  # of the file; raised when an older reader would misread it
ANOTHER = "another --out FILE, or delete this one"
Line = TypeVar("Line")


@dataclass(frozen=True)
class Run:
    """What results depend on; files of different runs are not mixed.

    task: its name. data: digest of the questions. questions: how many there are. bundle: digest of the bundle. name,
    precision, template: of its manifest. backend, device: that it ran on. page_budget: pages each layer may read.
    """

    task: str
    data: str
    questions: int
    bundle: str
    name: str
    precision: str
    template: str
    backend: str
    device: str
    page_budget: int

    @classmethod
    def of(cls, task: Task, items: Sequence[Item], engine: Engine, page_budget: int | None = None) -> Run:
        """The run of all items of a task on an engine; `page_budget`: None = the bundle's."""
        manifest = engine.manifest
        return cls(
            task=task.name,
            data=digest_of(items),
            questions=len(items),
            bundle=engine.digest,
            name=manifest.name,
            precision=manifest.precision,
            template=manifest.prompt.template,
            backend=engine.backend,
            device=engine.device,
            page_budget=manifest.page_budget if page_budget is None else page_budget,
        )

    def require_same(self, other: Run, where: str) -> None:
        """OptionError, which names the first difference, unless `other`, of the file `where`, is the same run."""
        for each in fields(self):
            mine, found = getattr(self, each.name), getattr(other, each.name)
            if mine != found:
                raise OptionError(
                    f"{where} holds results of another run: {each.name} {found!s:.100}",
                    expected=f"{each.name} {mine!s:.100}",
                    fix=ANOTHER,
                )

    def require_of(self, task: Task, data: str, where: str) -> None:
        """OptionError, unless the results in the file `where` are of this task, and of the questions with the digest
        `data`."""
        if self.task != task.name:
            raise OptionError(
                f"{where} holds results of the task {self.task!r:.100}",
                expected=task.name,
                fix="name the task that they are of",
            )
        if self.data != data:
            raise OptionError(
                f"{where} holds results of other questions: data {self.data:.100}",
                expected=f"data {data}",
                fix="the --data that they were made with; results of one --data for all",
            )


class Evaluation(NamedTuple):
    """A run, and its results in the order of the questions."""

    run: Run
    records: list[Record]


class Results:
    """Results on their way into a file, which holds each as soon as `add` returns. No other process can open it
    meanwhile."""

    def __init__(self, path: Path, run: Run) -> None:
        """Open `path`, and go on from what it holds of this run: what is cut off at its end, because the process was
        killed, is dropped, and so is a run that had not answered anything. OptionError for results of another run, and
        for a file that another process has open so; DataError for what is no file of results."""
        self.path, self.run = path, run
        self._records: dict[int, Record] = {}
        self._sorted = True
        self._file = _locked(path)
        try:
            self._go_on(_whole_lines(path))
        except BaseException:
            self._file.close()
            raise

    def _go_on(self, whole: Sequence[bytes]) -> None:
        """Take what the file holds, these lines and perhaps a part of one more."""
        if whole:
            found, records = _parsed(whole, self.path)
            if records:
                self.run.require_same(found, str(self.path))
            elif found != self.run:
                whole = []
            self._records = {record.index: record for record in records}
            self._sorted = [record.index for record in records] == sorted(self._records)
        end = sum(map(len, whole))
        if self._file.seek(0, os.SEEK_END) > end:
            self._file.truncate(end)
        if not whole:
            self._write(_head(self.run))

    def __enter__(self) -> Results:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()  # as it is; who goes on from it puts it into order

    def close(self) -> None:
        """Close the file, with its lines in the order of the questions: it does not show in how many runs it was made.
        OptionError where that fails: a full disk."""
        try:
            if not self._sorted:
                write_results(self.path, Evaluation(self.run, self.records))
                self._sorted = True
        finally:
            self._file.close()

    @property
    def records(self) -> list[Record]:
        """In the order of the questions."""
        return [self._records[index] for index in sorted(self._records)]

    def pending(self, items: Iterable[Item]) -> list[Item]:
        """Those that have no result yet. OptionError for one that has, of another image than it has now."""
        left, digests = list[Item](), dict[Path | bytes, str]()  # of images with several questions once
        for item in items:
            record = self._records.get(item.index)
            if record is None:
                left.append(item)
                continue
            digest = digests.get(item.image) or digests.setdefault(item.image, image_digest(item.image))
            if record.image != digest:
                raise OptionError(
                    f"{self.path} holds a result of {item.key!r:.100} with another image: sha256 {record.image:.16}",
                    expected=f"sha256 {digest}",
                    fix=ANOTHER,
                )
        return left

    def add(self, record: Record) -> None:
        """Write a result. OptionError where that fails: a full disk."""
        self._sorted &= not self._records or record.index > max(self._records)
        self._records[record.index] = record
        self._write(asdict(record))

    def _write(self, row: Mapping[str, Any]) -> None:
        try:
            self._file.write(_line(row))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OptionError(
                f"--out {self.path}: {error.strerror}", fix="make room, and start it again: it goes on from here"
            ) from None


def read_results(path: Path) -> Evaluation:
    """A file of results; one that is still being written, too. DataError for any other file."""
    whole = _whole_lines(path)
    if not whole:
        raise DataError(f"{path} holds no results", expected="a file that --out wrote")
    run, records = _parsed(whole, path)
    return Evaluation(run, sorted(records, key=lambda record: record.index))


def write_results(path: Path, found: Evaluation) -> None:
    """A whole file of results, or none: an older one stays until the new one is there. OptionError where that fails."""
    making = path.with_name(f".{path.name}.making")
    try:
        making.write_bytes(b"".join(map(_line, (_head(found.run), *map(asdict, found.records)))))
        making.replace(path)
    except OSError as error:
        with suppress(OSError):
            making.unlink()
        raise _cannot_write(path, error) from None


def merged(paths: Sequence[Path]) -> Evaluation:
    """The results of several files of one run, such as its shards. OptionError for files of different runs, or with
    different results of one question; DataError for what is no file of results."""
    run, records = read_results(paths[0])
    all_of = {record.index: record for record in records}
    for path in paths[1:]:
        found, more = read_results(path)
        run.require_same(found, str(path))
        for record in more:
            before = all_of.setdefault(record.index, record)
            if before != record:
                name = next(
                    each.name for each in fields(record) if getattr(before, each.name) != getattr(record, each.name)
                )
                raise OptionError(
                    f"{path} has another result of {record.key}: {name} {getattr(record, name)!r:.100}",
                    expected=f"{getattr(before, name)!r:.100}, as in a file before it",
                    fix="merge files whose questions differ: of --shard 1/2, 2/2",
                )
    return Evaluation(run, [all_of[index] for index in sorted(all_of)])


def require_kept(path: Path, found: Evaluation) -> None:
    """OptionError if `path` already holds results that these do not: of another run, or of a question more. So a shard
    that stands where the merged file should is not lost. DataError for what is no file of results."""
    if not there(path, Path.exists):
        return
    held, older = read_results(path)
    found.run.require_same(held, str(path))
    if lost := {record.index for record in older} - {record.index for record in found.records}:
        raise OptionError(
            f"--out {path} holds {len(lost)} results that are in none of the files to merge",
            expected="a new file, or an earlier merge of these",
            fix=f"--out NEW.jsonl, and {path} among those to merge",
        )


def _locked(path: Path) -> BinaryIO:
    """A file, made if need be, to append to, which no other process gets from here while this one has it open."""
    if there(path, Path.exists):
        open_file(path, DataError).close()  # an ordinary one: a pipe would wait
    try:
        file = open(path, "a+b")  # noqa: SIM115 - closed by Results
    except OSError as error:
        raise _cannot_write(path, error) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # else who had it has put another in its place
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        file.close()
        raise OptionError(
            f"--out {path} cannot be locked: {error.strerror}",
            expected="a disk that knows locks, for two runs not to write into one file",
            fix="--out FILE on a disk of this machine",
        ) from None
    file.close()
    raise OptionError(
        f"--out {path}: another process writes into it",
        expected="a file of its own for each run",
        fix="wait for the other, or name another --out FILE; merge makes one of them",
    )


def _cannot_write(path: Path, error: OSError) -> OptionError:
    return OptionError(f"--out {path}: {error.strerror}", expected="a file name in a folder of yours")


def _head(run: Run) -> dict[str, Any]:
    return {"evaluation": FORMAT, **asdict(run)}


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _whole_lines(path: Path) -> list[bytes]:
    """The lines that end with a line's end. DataError for what is no file."""
    return [line for line in read_file(path, DataError, limit=LARGEST).splitlines(keepends=True) if line[-1:] == b"\n"]


def _parsed(lines: Sequence[bytes], path: Path) -> tuple[Run, list[Record]]:
    """DataError, which names the line, for what is no result."""
    rows = [parse_json(line, f"{path}, line {number}", DataError, fix=ANOTHER) for number, line in enumerate(lines, 1)]
    head = rows[0]
    if not isinstance(head, dict) or head.pop("evaluation", None) != FORMAT:
        raise DataError(f"{path} is no file of results", expected="one that --out wrote, of this version", fix=ANOTHER)
    run = _made(Run, head, f"{path}, line 1")
    records = [_made(Record, row, f"{path}, line {number}") for number, row in enumerate(rows[1:], 2)]
    seen = set[int]()
    for number, record in enumerate(records, 2):
        where = f"{path}, line {number}"
        if record.index in seen or not 0 <= record.index < run.questions:
            raise DataError(
                f"{where}: question {record.index}", expected=f"each once, 0 .. {run.questions - 1}", fix=ANOTHER
            )
        if not 0 <= record.score <= 1 or not 0 <= record.pages_read <= run.page_budget:
            raise DataError(
                f"{where}: score {shown(record.score)}, {shown(record.pages_read)} pages",
                expected=f"a score of 0 .. 1, 0 .. {run.page_budget} pages",
                fix=ANOTHER,
            )
        seen.add(record.index)
    return run, records


def _made(kind: type[Line], row: Any, where: str) -> Line:
    """`row` as a Run or a Record. Field by field: as a whole, pydantic's strict mode takes a dataclass only from text,
    and no text with half a character, which the name of a file may hold."""
    wanted = _FIELDS[kind]
    if not isinstance(row, dict) or row.keys() != wanted.keys():
        raise DataError(f"{where} is no line of results", expected=f"{', '.join(wanted)}", fix=ANOTHER)
    made = {}
    for name, adapter in wanted.items():
        try:
            made[name] = adapter.validate_python(row[name], strict=True)
        except ValidationError as error:
            why = error.errors(include_url=False)[0]["msg"]
            raise DataError(f"{where} is no line of results: {name}: {why:.200}", fix=ANOTHER) from None
    return kind(**made)


_FIELDS: dict[type[Any], dict[str, TypeAdapter[Any]]] = {
    kind: {name: TypeAdapter(hint) for name, hint in get_type_hints(kind).items()} for kind in (Run, Record)
}
