"""The file of results: what it goes on from, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from engines.errors import DataError, OptionError
from runtime.evaluate import results as results_module
from runtime.evaluate.asking import Selection, ahead, evaluate, in_order, read_shard
from runtime.evaluate.report import counted, markdown, summary, table
from runtime.evaluate.results import Evaluation, Results, Run, merged, read_results, require_kept, write_results
from runtime.evaluate.task import Item, Record, image_digest
from runtime.evaluate.vstar import TASK
from tests.paths import ROOT

RUN = Run("vstar", "sha256:d", 6, "sha256:b", "name", "fp16", "<image>{prompt}", "onnxruntime", "cpu", 81)
IMAGE = image_digest(b"")


def record(index: int, score: float = 1.0, subset: str = "direct_attributes") -> Record:
    """A result, with characters that are no ASCII, and half of one."""
    return Record(index, f"k{index}", subset, "was?\n„\ud800“", "Straße", score, 1.5, {"losses": [0.25, 1.0]}, IMAGE)


def item(index: int, image: bytes = b"") -> Item:
    """The question of a `record`."""
    return Item(index, f"k{index}", "direct_attributes", image, "q", "q", ("a", "b"))


def write(path: Path, *records: Record, run: Run = RUN) -> None:
    """A file of results."""
    write_results(path, Evaluation(run, list(records)))


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "r.jsonl"
    with Results(path, RUN) as results:
        for index in (0, 1, 4):
            results.add(record(index))
    assert read_results(path) == (RUN, [record(0), record(1), record(4)])


@pytest.mark.parametrize("cut", range(1, 140, 7))
def test_a_line_that_was_cut_off_is_written_again(tmp_path, cut):
    """A process may be killed in the middle of any line, the first one too."""
    path = tmp_path / "r.jsonl"
    write(path, record(0), record(1))
    whole = path.read_bytes()
    for kept, complete in ((whole[:-cut], {0}), (whole[:cut], set())):
        path.write_bytes(kept)
        with Results(path, RUN) as results:
            done = {each.index for each in results.records}
            assert done == complete
            for index in {0, 1} - done:
                results.add(record(index))
        assert path.read_bytes() == whole


def test_lines_come_into_the_order_of_the_questions(tmp_path):
    path, other = tmp_path / "r.jsonl", tmp_path / "o.jsonl"
    write(other, *map(record, range(6)))
    for indices in ((1, 4), (0, 2, 3), (5,)):
        with Results(path, RUN) as results:
            for index in indices:
                results.add(record(index))
    assert path.read_bytes() == other.read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "change",
    [{"bundle": "sha256:c"}, {"data": "sha256:e"}, {"page_budget": 4}, {"backend": "tensorrt"}, {"task": "scenes"}],
)
def test_results_of_another_run_are_refused(tmp_path, change):
    path = tmp_path / "r.jsonl"
    write(path, record(0))
    before = path.read_bytes()
    ((name, value),) = change.items()
    with pytest.raises(OptionError, match=f"results of another run: {name} {getattr(RUN, name)}") as caught:
        Results(path, replace(RUN, **change))
    assert caught.value.expected == f"{name} {value}" and "--out" in caught.value.fix
    assert path.read_bytes() == before


def test_one_process_writes_a_file(tmp_path):
    """Two would write over each other's lines; nor does one that was refused leave anything."""
    path, whole = tmp_path / "r.jsonl", tmp_path / "w.jsonl"
    write(whole, record(0), record(1))
    with Results(path, RUN) as results:
        results.add(record(1))
        for run in (RUN, replace(RUN, bundle="sha256:c")):
            with pytest.raises(OptionError, match="another process writes into it"):
                Results(path, run)
        assert read_results(path) == (RUN, [record(1)]), "who reads may"
        results.add(record(0))
    with Results(path, RUN) as results:
        assert results.records == [record(0), record(1)]
    assert path.read_bytes() == whole.read_bytes()


def test_a_run_that_answered_nothing_is_in_nobodys_way(tmp_path):
    """As one with a page budget above the bundle's, which ends before its first answer."""
    path, whole = tmp_path / "r.jsonl", tmp_path / "w.jsonl"
    write(whole, record(0))
    with Results(path, replace(RUN, page_budget=123456, name="a name that is longer")):
        pass
    with Results(path, RUN) as results:
        results.add(record(0))
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "line, text, found",
    [
        (0, "{}\n", "is no file of results"),
        (0, '{"evaluation": 99}\n', "is no file of results"),
        (0, '{"evaluation": 1}\n', "line 1 is no line of results"),
        (1, "nonsense\n", "line 2 is no JSON"),
        (1, "[1]\n", "line 2 is no line of results"),
        (1, '{"index": 0}\n', "line 2 is no line of results"),
        (1, ("score", "1"), "line 2 is no line of results: score: Input should be a valid number"),
        (1, ("score", True), "line 2 is no line of results: score"),
        (1, ("score", 1.5), r"line 2: score 1\.5, 1\.5 pages"),
        (1, ("score", -1), "line 2: score -1"),
        (1, ("score", 10**400), "line 2"),
        (1, ("pages_read", 82), "line 2: score 1.0, 82.0 pages"),
        (1, ("pages_read", 10**400), "line 2"),
        (1, ("index", 0.0), "line 2 is no line of results: index"),
        (1, ("details", [1]), "line 2 is no line of results: details"),
        (1, ("another", 1), "line 2 is no line of results"),
        (0, ("questions", True), "line 1 is no line of results: questions"),
        (2, None, "line 3: question 0"),  # twice
    ],
)
def test_a_damaged_file_is_refused(tmp_path, line, text, found):
    path = tmp_path / "r.jsonl"
    write(path, record(0), record(1))
    lines = path.read_text().splitlines(keepends=True)
    if isinstance(text, tuple):
        name, value = text
        text = json.dumps({**json.loads(lines[line]), name: value}) + "\n"
    lines[line] = lines[1] if text is None else text
    path.write_text("".join(lines))
    for opened in (lambda: Results(path, RUN), lambda: read_results(path)):
        with pytest.raises(DataError, match=found):
            opened()


def test_files_that_hold_nothing(tmp_path):
    with pytest.raises(DataError, match="is missing"):
        read_results(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="holds no results"):
        read_results(tmp_path / "empty.jsonl")
    with pytest.raises(OptionError, match="No such file or directory"):
        Results(tmp_path / "no" / "folder.jsonl", RUN)
    long = tmp_path / f"{'a' * 300}.jsonl"
    for opened in (
        lambda: Results(long, RUN),
        lambda: write(long, record(0)),
        lambda: require_kept(long, Evaluation(RUN, [])),
    ):
        with pytest.raises((OptionError, DataError), match="File name too long"):
            opened()
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="is a pipe"):
        Results(tmp_path / "pipe.jsonl", RUN)


def test_shards_are_merged(tmp_path):
    paths = [tmp_path / f"{name}.jsonl" for name in "abc"]
    write(paths[0], record(0), record(2))
    write(paths[1], record(2), record(1))
    assert merged(paths[:2]) == (RUN, [record(0), record(1), record(2)])
    write(paths[2], record(2, score=0.0))
    with pytest.raises(OptionError, match=r"another result of k2: score 0\.0\n.*expected: 1\.0, as"):
        merged(paths)
    write(paths[2], record(3), run=replace(RUN, bundle="sha256:c"))
    with pytest.raises(OptionError, match="another run"):
        merged(paths)


def test_a_merged_file_takes_the_place_of_nothing_else(tmp_path):
    """Who forgets its name gives that of the first shard."""
    path = tmp_path / "1.jsonl"
    require_kept(path, Evaluation(RUN, [record(0)]))
    for older in ([], [record(0)], [record(0, score=0.0), record(1)]):
        write(path, *older)
        require_kept(path, Evaluation(RUN, [record(0), record(1), record(2)]))
    with pytest.raises(OptionError, match=r"1\.jsonl holds 1 results that are in none") as caught:
        require_kept(path, Evaluation(RUN, [record(1), record(2)]))
    assert f"--out NEW.jsonl, and {path}" in caught.value.fix
    with pytest.raises(OptionError, match="another run: bundle"):
        require_kept(path, Evaluation(replace(RUN, bundle="sha256:c"), [record(0), record(1)]))
    path.write_text("notes\n")
    with pytest.raises(DataError, match="no JSON"):
        require_kept(path, Evaluation(RUN, [record(0)]))


HOLD = """
import sys
from pathlib import Path
from tests.runtime.evaluate.test_results import RUN, Results, record
with Results(Path(sys.argv[1]), RUN) as results:
    results.add(record(1))
    print("open", flush=True)
    sys.stdin.read()
"""


def test_two_processes_do_not_write_into_one_file(tmp_path):
    path = tmp_path / "r.jsonl"
    holding = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holding.stdout.readline() == "open\n"
    before = path.read_bytes()
    with pytest.raises(OptionError, match="another process writes into it") as caught:
        Results(path, RUN)
    assert "--out FILE" in caught.value.fix and path.read_bytes() == before
    assert [each.index for each in read_results(path).records] == [1], "it can be read"
    holding.kill()
    holding.communicate()
    with Results(path, RUN) as results:  # the lock ends with its process
        results.add(record(0))
        with pytest.raises(OptionError, match="another process"):
            Results(path, RUN)
    assert [each.index for each in read_results(path).records] == [0, 1]


def test_a_file_that_was_replaced_meanwhile_is_not_written_to(tmp_path, monkeypatch):
    """Between opening and locking, the process that had the lock may put its lines into order, as a new file."""
    path, flock = tmp_path / "r.jsonl", results_module.fcntl.flock
    write(path, record(0))

    def slow(file: object, kind: int) -> None:
        write(path, record(0), record(1))
        flock(file, kind)

    monkeypatch.setattr(results_module.fcntl, "flock", slow)
    with pytest.raises(OptionError, match="another process"):
        Results(path, RUN)
    assert len(read_results(path).records) == 2


def test_a_disk_without_locks_is_an_error(tmp_path, monkeypatch):
    def refuse(file: object, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(results_module.fcntl, "flock", refuse)
    with pytest.raises(OptionError, match="No locks available"):
        Results(tmp_path / "r.jsonl", RUN)


def test_an_error_leaves_the_lines_as_they_came(tmp_path):
    """A full disk has no room for another file; and who goes on puts them into order."""
    path = tmp_path / "r.jsonl"
    with pytest.raises(KeyboardInterrupt), Results(path, RUN) as results:
        for index in (3, 1):
            results.add(record(index))
        raise KeyboardInterrupt
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()[1:]] == [3, 1]
    Results(path, RUN).close()
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()[1:]] == [1, 3]


def test_results_of_other_images_are_refused(tmp_path):
    """An image that could not be read may be mended; one that was answered may not change."""
    path = tmp_path / "r.jsonl"
    with Results(path, RUN) as results:
        results.add(record(0))
    with Results(path, RUN) as results:
        assert [each.index for each in results.pending([item(0), item(1, b"mended")])] == [1]
        with pytest.raises(OptionError, match="'k0' with another image") as caught:
            results.pending([item(0, b"another"), item(1)])
    assert image_digest(b"another") in caught.value.expected
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"another")
    assert image_digest(photo) == image_digest(b"another")


def test_which_questions():
    items = [Item(i, f"k{i}", "ab"[i % 2], b"", "q", "q", ()) for i in range(10)]
    ids = lambda **given: [item.index for item in Selection(**given).of(items)]  # noqa: E731
    assert ids() == list(range(10))
    assert ids(limit=2) == [0, 1, 2, 3]
    assert ids(subsets=("b",)) == ids(subsets=("b", "b")) == [1, 3, 5, 7, 9]
    assert sorted(ids(shard=(1, 3)) + ids(shard=(2, 3)) + ids(shard=(3, 3))) == list(range(10))
    with pytest.raises(OptionError, match="--subset c"):
        ids(subsets=("c",))
    with pytest.raises(OptionError, match="--limit 0"):
        Selection(limit=0)
    assert read_shard("2/4") == (2, 4)
    for text in ("0/4", "5/4", "1", "1/0", "a/b", "-1/2"):
        with pytest.raises(OptionError, match="--shard"):
            read_shard(text)


@pytest.mark.parametrize("workers", [1, 3])
def test_what_fails_ends_it_and_the_results_before_are_kept(workers):
    asked = []

    def ask(number: int) -> int:
        asked.append(number)
        if number == 20:
            raise OptionError("twenty")
        return number

    seen = []
    with pytest.raises(OptionError, match="twenty"):
        for each in in_order(ask, range(100), workers):
            seen.append(each)
    assert seen == list(range(20)) and max(asked) < 40


class AnEngine:
    """An engine that counts nothing but slots."""

    def __init__(self, slots: int) -> None:
        self.slots = slots

    @contextmanager
    def image(self, image: bytes, exif: bool):
        yield image


@pytest.mark.parametrize("slots", [1, 3])
def test_questions_before_one_that_fails_keep_their_answers(tmp_path, slots):
    """Of the same image, too; and without slots, each is in the file before the next is asked."""
    items = [item(index, b"%d" % (index // 5)) for index in range(15)]
    path, lines = tmp_path / "r.jsonl", []

    def ask(engine: object, view: bytes, asked: Item, budget: int | None) -> Record:
        lines.append(path.read_bytes().count(b"\n"))
        if asked.index == 8:
            raise OptionError("eight")
        return replace(record(asked.index), image=image_digest(asked.image))

    task, parts = replace(TASK, ask=ask), []
    for left in (range(8, 15), range(8, 15)):  # and once more
        with pytest.raises(OptionError, match="k8: eight"), Results(path, replace(RUN, questions=15)) as results:
            evaluate(task, items, AnEngine(slots), results, parts.append)
        assert [each.index for each in Results(path, replace(RUN, questions=15)).pending(items)] == list(left)
    assert parts == [pytest.approx(each / 15) for each in range(1, 9)]
    if slots == 1:
        assert lines == [*range(1, 10), 9]


def test_what_is_made_ahead_comes_before_its_error():
    def three():
        yield from (1, 2, 3)
        raise OptionError("four")

    told, seen = ahead(three()), []
    with pytest.raises(OptionError, match="four"):
        for each in told:
            seen.append(each)
    assert seen == [1, 2, 3]
    with pytest.raises(ZeroDivisionError):  # no error of ours: at once
        ahead(1 // each for each in (1, 0))


def test_columns_of_text_are_to_the_left():
    assert table(["", "a"], [["b|c", "1"]])[1:] == ["| --- | ---: |", "| b\\|c | 1 |"]
    assert table(["", "a", "n"], [], texts=2)[1] == "| --- | --- | ---: |"


def test_the_total_is_of_the_papers_subsets():
    records = [record(0), record(1, 0.0, "relative_position"), record(2, 0.0, "OCR")]
    rows = {name: [each.index for each in found] for name, found in counted(TASK, records, lambda each: each).items()}
    assert rows == {"direct_attributes": [0], "relative_position": [1], "OCR": [2], "all": [0, 1]}
    told = summary(TASK, Evaluation(RUN, records))
    assert [row.mean for row in told.scores] == [1.0, 0.0, 0.0, 0.5] and told.run == RUN
    text = markdown(told)
    assert "| all | 2 | 50.0 | 9.5 .. 90.5 | 1.5 |" in text
    assert "3 of 6 questions: not the whole benchmark." in text and "template is not the official one" in text
