"""`python -m runtime.evaluate`: from a data folder to tables, on the default model's scenes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from engines.errors import FlexError, OptionError
from export.build import BuildOptions, build
from export.default_model.evaluate import AT_ONCE, measure, scenes_with_questions, write
from runtime import Engine
from runtime.evaluate.__main__ import PICTURES, names_of, parse_arguments, run
from tests.conftest import once
from tests.paths import ROOT
from tests.runtime.evaluate.datasets import (
    magnifier_row,
    textvqa_row,
    write_magnifier,
    write_scenes,
    write_textvqa,
    write_vstar,
)

SCENES, SEED = 3, 7


@pytest.fixture(scope="module")
def asked():
    return scenes_with_questions(SCENES, SEED)


@pytest.fixture(scope="module")
def data(asked, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write(folder, asked)
    return folder


@pytest.fixture(scope="module")
def whole(data, default_bundle, tmp_path_factory) -> Path:
    """A run without interruption."""
    out = tmp_path_factory.mktemp("whole") / "whole.jsonl"
    evaluate("scenes", "--data", data, default_bundle("fp16"), "--out", out)
    return out


def evaluate(*arguments: object) -> int:
    """The command, in this process."""
    return run(parse_arguments([*map(str, arguments), *([] if arguments[0] == "merge" else ["--threads", "1"])]))


def test_the_numbers_are_those_of_the_default_models_evaluation(asked, whole, default_bundle):
    with Engine(default_bundle("fp16"), **AT_ONCE) as engine:
        tally = measure(engine, asked, None, "as shipped")
    told = json.loads(whole.with_suffix(".json").read_text())
    assert told["answered"] == told["questions"] == sum(map(len, tally.right.values()))
    scores = {row["subset"]: row["mean"] for row in told["scores"]}
    right = [each for of_kind in tally.right.values() for each in of_kind]
    assert scores == pytest.approx(
        {kind: np.mean(each) for kind, each in tally.right.items()} | {"all": np.mean(right)}
    )
    assert told["scores"][-1]["pages_read"] == pytest.approx(np.mean(tally.pages), abs=1e-3)
    assert 0.5 < scores["all"] < 1
    assert told["bundle"] == json.loads(whole.read_text().splitlines()[0])["bundle"]


def test_what_is_written_beside_the_results(whole):
    table, answers = whole.with_suffix(".md").read_text(), whole.with_name("whole.answers.jsonl").read_text()
    assert "| one | 9 |" in table and "Wilson score interval" in table and "sha256:" in table
    first = json.loads(answers.splitlines()[0])
    assert first.keys() == {"question", "answer", "right"}
    assert {path.name for path in whole.parent.iterdir()} == {
        "whole.jsonl", "whole.json", "whole.md", "whole.answers.jsonl"
    }  # fmt: skip


def test_a_killed_run_goes_on_where_it_was(data, whole, default_bundle, tmp_path):
    out = tmp_path / "killed.jsonl"
    command = [sys.executable, "-m", "runtime.evaluate", "scenes", "--data", data, default_bundle("fp16"), "--out", out]
    process = subprocess.Popen([*map(str, command), "--threads", "1"], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and (not out.exists() or out.read_bytes().count(b"\n") < 3):
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = out.read_bytes()
    assert whole.read_bytes().startswith(done[: done.rindex(b"\n") + 1]) and done.count(b"\n") >= 3
    out.write_bytes(done + b'{"index": 2')  # in the middle of a line
    assert evaluate("scenes", "--data", data, default_bundle("fp16"), "--out", out) == 0
    assert out.read_bytes() == whole.read_bytes()
    before = out.stat().st_mtime_ns
    assert evaluate("scenes", "--data", data, default_bundle("fp16"), "--out", out) == 0, "nothing is left to do"
    assert out.stat().st_mtime_ns == before


def test_shards_and_parts_make_the_same_file(data, whole, default_bundle, tmp_path, capsys):
    shards = [tmp_path / f"{index}.jsonl" for index in (1, 2)]
    for index, out in enumerate(shards, 1):
        given = ("--out", out, "--shard", f"{index}/2", "--slots", 4)
        evaluate("scenes", "--data", data, default_bundle("fp16"), *given)
    merged = tmp_path / "merged.jsonl"
    capsys.readouterr()
    evaluate("merge", merged, *reversed(shards))
    assert capsys.readouterr().out == whole.with_suffix(".md").read_text() + "\n"
    assert merged.read_bytes() == whole.read_bytes()
    assert merged.with_suffix(".json").read_text() == whole.with_suffix(".json").read_text()
    parts = tmp_path / "parts.jsonl"
    for given in (("--subset", "count"), ("--limit", 2), ()):
        evaluate("scenes", "--data", data, default_bundle("fp16"), "--out", parts, *given)
        told = json.loads(parts.with_suffix(".json").read_text())
        assert told["answered"] == {"--subset": 3, "--limit": 8}.get(str(given[0]) if given else "", told["questions"])
    assert parts.read_bytes() == whole.read_bytes()


def test_two_bundles_are_compared(data, whole, default_bundle, tmp_path, capsys):
    """With hi-res off, by a page budget of none, questions change; and pictures show where each looked."""
    blind = tmp_path / "blind.jsonl"
    evaluate("scenes", "--data", data, default_bundle("fp16"), "--out", blind, "--page-budget", 0)
    out = tmp_path / "c.json"
    capsys.readouterr()
    evaluate("scenes", "--data", data, "--compare", whole, blind, "--out", out)
    text, told = capsys.readouterr().out, json.loads(out.read_text())
    records = [[json.loads(line) for line in path.read_text().splitlines()[1:]] for path in (whole, blind)]
    pairs = list(zip(*records, strict=True))
    lost = sum(a["score"] > b["score"] for a, b in pairs)
    gained = sum(a["score"] < b["score"] for a, b in pairs)
    row = told["scores"][-1]
    assert (row["subset"], row["count"], row["lost"], row["gained"]) == ("all", len(pairs), lost, gained)
    assert lost > 5 and row["p"] < 0.05
    changed = [each["key"] for each in told["changed"]]
    assert changed == [a["key"] for a, b in pairs if a["score"] != b["score"]]
    assert told["other_answers"] == sum(a["answer"] != b["answer"] for a, b in pairs)
    assert out.with_suffix(".md").read_text() in text and "McNemar's exact test" in text
    assert "at most 0 pages a layer" in text and f"| {changed[0]} |" in text


def test_pictures_of_where_each_looked(data, shared, default_bundle, tmp_path, capsys):
    built = BuildOptions(out=shared / "default-one-page", precision="fp16", page_budget=1)
    bundles = default_bundle("fp16"), once(built.out, lambda _: build(built))
    out, folder = tmp_path / "c.json", tmp_path / "pictures"
    evaluate("scenes", "--data", data, "--compare", *bundles, "--out", out, "--pictures", folder, "--slots", 4)
    told = json.loads(out.read_text())
    assert told["first"]["bundle"] != told["second"]["bundle"]
    assert told["scores"][-1]["p"] < 0.05 and told["second"]["page_budget"] == 1
    written = sorted(folder.glob("*.png"))
    assert 5 < len(written) == min(PICTURES, len(told["changed"]))
    for path in written:
        with PIL.Image.open(path) as image:
            assert min(image.size) > 100
    assert (tmp_path / f"scenes-{bundles[1].name}.jsonl").is_file(), "results to go on from"


def test_other_benchmarks_run(default_bundle, tmp_path, capsys):
    """The default model knows nothing of them: what is tested is the way."""
    textvqa = write_textvqa(tmp_path / "t", [textvqa_row(0, "a", "what number is in the red square?", ["7"] * 10)])
    magnifier = write_magnifier(tmp_path / "m", {"q": magnifier_row("what? A. 1, B. 2, C. 3, D. 4", "B", ["IMG_1"])})
    for name, folder in (("textvqa", textvqa), ("magnifier", magnifier)):
        out = tmp_path / f"{name}.jsonl"
        evaluate(name, "--data", folder, default_bundle("fp16"), "--out", out, "--slots", 2)
        (answer,) = map(json.loads, out.with_name(f"{name}.answers.jsonl").read_text().splitlines())
        (row,) = [json.loads(line) for line in out.read_text().splitlines()[1:]]
        assert answer["text"] == row["answer"] and answer["prompt"].startswith("<image>\nwhat")
        cut = row["details"]["finish_reason"] == "length"  # its context has no room for the official 512
        assert ("1 answers were cut off" in out.with_suffix(".md").read_text()) == cut
    assert "Student's t" in (tmp_path / "textvqa.md").read_text()


def test_an_image_that_cannot_be_read_names_its_question(data, default_bundle, tmp_path):
    """What was answered before stays, and when the image is mended it goes on."""
    rows = [{"image": f"{index}.png", "question": "is there a red circle?", "answer": "no"} for index in range(4)]
    folder, out = write_scenes(tmp_path / "s", rows), tmp_path / "r.jsonl"
    good = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(good[:200] + b"\0" * (len(good) - 200))  # of the same size
    arguments = ("scenes", "--data", folder, default_bundle("fp16"), "--out", out)
    with pytest.raises(FlexError, match=r"^2 2\.png: .*cannot be decoded"):
        evaluate(*arguments)
    assert out.read_bytes().count(b"\n") == 3
    (folder / "2.png").write_bytes(good)
    evaluate(*arguments)
    assert out.read_bytes().count(b"\n") == 5


@pytest.mark.parametrize(
    "arguments, found",
    [
        ((), "no BUNDLE"),
        (("BUNDLE", "--compare", "a", "b"), "a BUNDLE and --compare"),
        (("BUNDLE", "--pictures", "p"), "--pictures"),
        (("--compare", "a.jsonl", "b.jsonl", "--pictures", "p"), "--pictures"),
        (("--compare", "a.jsonl", "b.jsonl"), r"a\.jsonl is missing"),
        (("BUNDLE", "--out", "r.json"), "--out r.json"),
        (("BUNDLE", "--shard", "3/2"), "--shard '3/2'"),
        (("BUNDLE", "--limit", "0"), "--limit 0"),
        (("BUNDLE", "--subset", "three"), "--subset three"),
        (("BUNDLE", "--page-budget", "500"), "page_budget=500"),
        (("BUNDLE", "--shard", "400/500"), "has no results"),
    ],
)
def test_what_does_not_go_together(data, default_bundle, tmp_path, monkeypatch, arguments, found):
    monkeypatch.chdir(tmp_path)
    given = [str(default_bundle("fp16")) if each == "BUNDLE" else each for each in arguments]
    with pytest.raises(FlexError, match=found):
        evaluate("scenes", "--data", data, *given)


def test_results_of_another_data_set_are_not_compared(data, whole, default_bundle, tmp_path):
    rows = [{"image": "0.png", "question": "is there a red circle?", "answer": "no"}]
    folder, out = write_scenes(tmp_path / "s", rows), tmp_path / "r.jsonl"
    evaluate("scenes", "--data", folder, default_bundle("fp16"), "--out", out)
    with pytest.raises(OptionError, match="results of data sha256:"):
        evaluate("scenes", "--data", data, "--compare", whole, out, "--out", tmp_path / "c.json")
    with pytest.raises(OptionError, match="another run: data"):
        evaluate("scenes", "--data", data, default_bundle("fp16"), "--out", out)
    with pytest.raises(OptionError, match="results of data sha256:"):  # of both the same, but not --data's
        evaluate("scenes", "--data", folder, "--compare", whole, whole, "--out", tmp_path / "c.json")
    vstar = write_vstar(tmp_path / "v")
    with pytest.raises(OptionError, match="results of task scenes") as caught:
        evaluate("vstar", "--data", vstar, "--compare", whole, whole, "--out", tmp_path / "c.json")
    assert caught.value.expected.startswith("task vstar") and not list(tmp_path.glob("c.*"))


def test_bundles_of_one_name_have_results_each(tmp_path):
    """`build/a` in two folders: the results of one would be refused as those of another run."""
    folders = [tmp_path / each / "b" for each in ("old", "new one")]
    for folder in folders:
        folder.mkdir(parents=True)
    assert names_of(*folders) == ["old-b", "new_one-b"]
    assert names_of(folders[0], folders[0]) == ["b", "b"]
    assert names_of(folders[0], tmp_path) == ["b", tmp_path.name]


def test_what_is_not_merged(whole, tmp_path):
    lines = whole.read_bytes().splitlines(keepends=True)
    shards = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    for index, path in enumerate(shards):
        path.write_bytes(lines[0] + b"".join(lines[1 + index :: 2]))
    before = shards[0].read_bytes()
    with pytest.raises(OptionError, match="in none of the files to merge"):
        evaluate("merge", *shards)
    assert shards[0].read_bytes() == before and len(list(tmp_path.iterdir())) == 2
    assert evaluate("merge", shards[0], *shards) == 0
    assert shards[0].read_bytes() == whole.read_bytes()
    other = tmp_path / "other.jsonl"
    other.write_bytes(lines[0].replace(b'"scenes"', b'"seens"', 1) + lines[1])
    with pytest.raises(FlexError, match="holds results of 'seens'"):
        evaluate("merge", tmp_path / "m.jsonl", other)


def test_without_scipy_it_says_what_to_install(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['scipy'] = None")
    line = [sys.executable, "-m", "runtime.evaluate", "--help"]
    failed = subprocess.run(
        line, cwd=ROOT, env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""}, capture_output=True, text=True
    )
    assert failed.returncode == 1 and "pip install '.[evaluate]'" in failed.stderr
    assert "Traceback" not in failed.stderr
