"""The file of results: what it goes on from, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from engines.errors import DataError, OptionError
from runtime.evaluate.report import counted, markdown, summary
from runtime.evaluate.results import Results, Run, merged, read_results, require_kept, write_results
from runtime.evaluate.run import Selection, in_order, read_shard
from runtime.evaluate.task import Item, Record
from runtime.evaluate.vstar import TASK

RUN = Run("vstar", "sha256:d", 6, "sha256:b", "name", "fp16", "<image>{prompt}", "onnxruntime", "cpu", 81)


def record(index: int, score: float = 1.0, subset: str = "direct_attributes") -> Record:
    """A result, with characters that are no ASCII, and half of one."""
    return Record(index, f"k{index}", subset, "was?\n„\ud800“", "Straße", score, 1.5, {"losses": [0.25, 1.0]})


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
    write_results(path, RUN, [record(0), record(1)])
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
    write_results(other, RUN, map(record, range(6)))
    for indices in ((1, 4), (0, 2, 3), (5,)):
        with Results(path, RUN) as results:
            for index in indices:
                results.add(record(index))
            results.settle()
    assert path.read_bytes() == other.read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "change",
    [{"bundle": "sha256:c"}, {"data": "sha256:e"}, {"page_budget": 4}, {"backend": "tensorrt"}, {"task": "scenes"}],
)
def test_results_of_another_run_are_refused(tmp_path, change):
    path = tmp_path / "r.jsonl"
    write_results(path, RUN, [record(0)])
    before = path.read_bytes()
    ((name, value),) = change.items()
    with pytest.raises(OptionError, match=f"results of another run: {name} {getattr(RUN, name)}") as caught:
        Results(path, replace(RUN, **change))
    assert caught.value.expected == f"{name} {value}" and "--out" in caught.value.fix
    assert path.read_bytes() == before


def test_one_process_writes_a_file(tmp_path):
    """Two would write over each other's lines; nor does one that was refused leave anything."""
    path, whole = tmp_path / "r.jsonl", tmp_path / "w.jsonl"
    write_results(whole, RUN, [record(0), record(1)])
    with Results(path, RUN) as results:
        results.add(record(1))
        for run in (RUN, replace(RUN, bundle="sha256:c")):
            with pytest.raises(OptionError, match="another process writes it"):
                Results(path, run)
        assert read_results(path) == (RUN, [record(1)]), "who reads may"
        results.add(record(0))
        results.settle()
    with Results(path, RUN) as results:
        assert results.records == [record(0), record(1)]
    assert path.read_bytes() == whole.read_bytes()


def test_a_run_that_answered_nothing_is_in_nobodys_way(tmp_path):
    """As one with a page budget above the bundle's, which ends before its first answer."""
    path, whole = tmp_path / "r.jsonl", tmp_path / "w.jsonl"
    write_results(whole, RUN, [record(0)])
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
        (2, None, "line 3: question 0"),  # twice
        (1, {"score": 1.5}, r"line 2: score 1\.5, 1\.5 pages"),
        (1, {"score": -1}, "line 2: score -1"),
        (1, {"score": 10**400}, "line 2: score 1000"),
        (1, {"pages_read": 82}, "line 2: score 1.0, 82 pages"),
        (1, {"pages_read": 10**400}, "line 2: score"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, line, text, found):
    path = tmp_path / "r.jsonl"
    write_results(path, RUN, [record(0), record(1)])
    lines = path.read_text().splitlines(keepends=True)
    if isinstance(text, dict):
        text = json.dumps({**json.loads(lines[line]), **text}) + "\n"
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


def test_shards_are_merged(tmp_path):
    paths = [tmp_path / f"{name}.jsonl" for name in "abc"]
    write_results(paths[0], RUN, [record(0), record(2)])
    write_results(paths[1], RUN, [record(2), record(1)])
    assert merged(paths[:2]) == (RUN, [record(0), record(1), record(2)])
    write_results(paths[2], RUN, [record(2, score=0.0)])
    with pytest.raises(OptionError, match=r"another result of k2: score 0\.0\n.*expected: 1\.0, as"):
        merged(paths)
    write_results(paths[2], replace(RUN, bundle="sha256:c"), [record(3)])
    with pytest.raises(OptionError, match="another run"):
        merged(paths)


def test_a_merged_file_takes_the_place_of_nothing_else(tmp_path):
    """Who forgets its name gives that of the first shard."""
    path = tmp_path / "1.jsonl"
    require_kept(path, RUN, [record(0)])
    for older in ([], [record(0)], [record(0, score=0.0), record(1)]):
        write_results(path, RUN, older)
        require_kept(path, RUN, [record(0), record(1), record(2)])
    with pytest.raises(OptionError, match=r"1\.jsonl holds 1 results that are in none") as caught:
        require_kept(path, RUN, [record(1), record(2)])
    assert f"merge NEW.jsonl {path}" in caught.value.fix
    with pytest.raises(OptionError, match="another run: bundle"):
        require_kept(path, replace(RUN, bundle="sha256:c"), [record(0), record(1)])
    path.write_text("notes\n")
    with pytest.raises(DataError, match="no JSON"):
        require_kept(path, RUN, [record(0)])


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

    found = []
    with pytest.raises(OptionError, match="twenty"):
        found.extend(in_order(ask, iter(range(100)), workers))
    seen = []
    with pytest.raises(OptionError):
        for each in in_order(ask, range(100), workers):
            seen.append(each)
    assert seen == list(range(20)) and max(asked) < 40


def test_the_total_is_of_the_papers_subsets():
    records = [record(0), record(1, 0.0, "relative_position"), record(2, 0.0, "OCR")]
    rows = {name: [each.index for each in found] for name, found in counted(TASK, records).items()}
    assert rows == {"direct_attributes": [0], "relative_position": [1], "OCR": [2], "all": [0, 1]}
    told = summary(TASK, RUN, records)
    assert [row["mean"] for row in told["scores"]] == [1.0, 0.0, 0.0, 0.5]
    assert json.loads(json.dumps(told))["bundle"] == "sha256:b"
    text = markdown(told)
    assert "| all | 2 | 50.0 | 9.5 .. 90.5 | 1.5 |" in text
    assert "3 of 6 questions: not the whole benchmark." in text and "template is not the official one" in text
