"""`python -m runtime.evaluate`: from a data folder to tables, on the default model's scenes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from engines.errors import DataError, FlexError, OptionError
from export.build import BuildOptions, build
from export.default_model.evaluate import AT_ONCE, measure, scenes_with_questions, write
from runtime import Engine
from runtime.evaluate import __main__ as command_module
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

SCENES, SEED = 3, 11
NOBODY_SAYS = "10"  # the answer that is expected to counts of the first scene: some are wrong, however good the model


@pytest.fixture(scope="module")
def asked():
    """Scenes with the questions that stand alone: files of this kind have no conversations."""
    made = scenes_with_questions(SCENES, SEED)
    first = [replace(each, answer=NOBODY_SAYS) if each.kind == "count" else each for each in made[0][1]]
    made[0] = made[0][0], first
    return [(scene, [question for question in questions if not question.history]) for scene, questions in made]


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
    assert told["answered"] == told["run"]["questions"] == sum(map(len, tally.right.values()))
    scores = {row["subset"]: row["mean"] for row in told["scores"]}
    right = [each for of_kind in tally.right.values() for each in of_kind]
    assert scores == pytest.approx(
        {kind: np.mean(each) for kind, each in tally.right.items() if each} | {"all": np.mean(right)}
    )
    assert told["scores"][-1]["pages_read"] == pytest.approx(np.mean(tally.pages), abs=1e-3)
    assert 0.5 < scores["all"] < 1
    assert told["run"]["bundle"] == json.loads(whole.read_text().splitlines()[0])["bundle"]


def test_what_is_written_beside_the_results(whole):
    table, answers = whole.with_suffix(".md").read_text(), whole.with_name("whole.answers.jsonl").read_text()
    assert "| one | 6 |" in table and "Wilson score interval" in table and "sha256:" in table
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
        evaluate("scenes", "--data", data, default_bundle("fp16"), "--out", out, "--shard", f"{index}/2")
    merged = tmp_path / "merged.jsonl"
    capsys.readouterr()
    evaluate("merge", "--out", merged, *reversed(shards))
    assert capsys.readouterr().out == whole.with_suffix(".md").read_text() + "\n"
    assert merged.read_bytes() == whole.read_bytes()
    assert merged.with_suffix(".json").read_text() == whole.with_suffix(".json").read_text()
    with pytest.raises(SystemExit):  # without --out the first shard would be written over
        evaluate("merge", *shards)
    parts = tmp_path / "parts.jsonl"
    for given in (("--subset", "count"), ("--limit", 2), ()):
        evaluate("scenes", "--data", data, default_bundle("fp16"), "--out", parts, *given)
        told = json.loads(parts.with_suffix(".json").read_text())
        answered = {"--subset": 6, "--limit": 20}.get(str(given[0]) if given else "", told["run"]["questions"])
        assert told["answered"] == answered
    assert parts.read_bytes() == whole.read_bytes()


def test_slots_give_the_same_answers(data, whole, default_bundle, tmp_path):
    """The pages of a token may differ by one whose score is as near the threshold as rows of a batch are rounded."""
    out = tmp_path / "slots.jsonl"
    evaluate("scenes", "--data", data, default_bundle("fp16"), "--out", out, "--slots", 4)
    alone, together = ([json.loads(line) for line in path.read_text().splitlines()] for path in (whole, out))
    pages = [[row.pop("pages_read") for row in rows[1:]] for rows in (alone, together)]
    assert alone == together
    assert np.abs(np.subtract(*pages)).max() < 0.1


def test_a_shard_has_a_file_of_its_own(data, default_bundle, tmp_path, monkeypatch):
    """What the command names its files, and merges."""
    monkeypatch.chdir(tmp_path)
    bundle = default_bundle("fp16")
    for shard in ("1/20", "2/20"):
        evaluate("scenes", "--data", data, bundle, "--shard", shard)
    shards = [Path(f"scenes-{bundle.name}-{index}of20.jsonl") for index in (1, 2)]
    evaluate("merge", "--out", "all.jsonl", *shards)
    assert len(Path("all.jsonl").read_text().splitlines()) == sum(len(s.read_text().splitlines()) for s in shards) - 1
    assert json.loads(Path("all.json").read_text())["answered"] == 4


def test_others_are_compared_with_a_baseline(data, whole, default_bundle, tmp_path, capsys):
    """With hi-res off, by a page budget of none, questions change; with all pages none does."""
    same, blind = tmp_path / "same.jsonl", tmp_path / "blind.jsonl"
    evaluate("scenes", "--data", data, default_bundle("fp16"), "--out", blind, "--page-budget", 0)
    same.write_bytes(whole.read_bytes())
    out = tmp_path / "c.json"
    capsys.readouterr()
    evaluate("scenes", "--data", data, "--compare", whole, same, blind, "--out", out)
    text, told = capsys.readouterr().out, json.loads(out.read_text())
    records = [[json.loads(line) for line in path.read_text().splitlines()[1:]] for path in (whole, blind)]
    pairs = list(zip(*records, strict=True))
    worse = sum(a["score"] > b["score"] for a, b in pairs)
    better = sum(a["score"] < b["score"] for a, b in pairs)
    other_answers = sum(a["answer"] != b["answer"] for a, b in pairs)
    assert (told["name"], told["count"]) == ("whole", len(pairs))
    first, second = told["others"]
    assert (first["name"], first["changed"], first["whole"]["p"]) == ("same", [], 1.0)
    row = second["differences"][-1]
    assert (row["subset"], row["count"], row["worse"], row["better"]) == ("all", len(pairs), worse, better)
    assert row == second["whole"] and worse > 5 and row["p"] < 0.05 and row["other_answers"] == other_answers
    changed = [each["key"] for each in second["changed"]]
    assert changed == [a["key"] for a, b in pairs if a["score"] != b["score"]]
    assert out.with_suffix(".md").read_text() in text and "McNemar's exact test" in text
    assert "at most 0 pages a layer" in text and f"| {changed[0]} |" in text
    score = json.loads(whole.with_suffix(".json").read_text())["scores"][-1]
    cells = f"{100 * score['mean']:.1f} | {100 * score['low']:.1f} .. {100 * score['high']:.1f}"
    assert text.splitlines()[2:6] == [
        "| against whole | score | 95 % interval | worse | better | p | other answers |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| whole | {cells} |  |  |  |  |",
        f"| same | {cells} | 0 | 0 | 1 | 0 |",
    ]


def test_only_what_all_have_answered_is_compared(data, whole, tmp_path, capsys):
    part = tmp_path / "part.jsonl"
    part.write_text("".join(whole.read_text().splitlines(keepends=True)[:5]))
    evaluate("scenes", "--data", data, "--compare", whole, whole, part, "--out", tmp_path / "c.json")
    told = json.loads((tmp_path / "c.json").read_text())
    assert told["count"] == 4 == told["score"]["count"]
    assert f"4 of {told['run']['questions']} questions" in capsys.readouterr().out
    names = [told["name"], *(other["name"] for other in told["others"])]
    assert names[-1] == "part" and len(set(names)) == 3, "one file came twice"
    given = ("--subset", "count", "--out", tmp_path / "d.json")
    with pytest.raises(OptionError, match="no question that all have answered"):
        evaluate("scenes", "--data", data, "--compare", whole, part, *given)


def test_pictures_of_where_each_looked(data, shared, default_bundle, tmp_path, monkeypatch):
    """Of bundles of one name, too; of which one is open at a time."""
    built = BuildOptions(out=shared / "default-one-page", precision="fp16", page_budget=1)
    bundles = [tmp_path / side / "7b" for side in "ab"]
    for link, bundle in zip(bundles, (default_bundle("fp16"), once(built.out, lambda _: build(built))), strict=True):
        shutil.copytree(bundle, link)
    open_now = []

    class OneAtATime(Engine):
        def __enter__(self) -> Engine:
            assert not open_now, "two bundles may not fit"
            open_now.append(self)
            return super().__enter__()

        def __exit__(self, *error: object) -> None:
            open_now.remove(self)
            super().__exit__(*error)

    monkeypatch.setattr(command_module, "Engine", OneAtATime)
    out, folder = tmp_path / "c.json", tmp_path / "pictures"
    evaluate("scenes", "--data", data, "--compare", *bundles, "--out", out, "--pictures", folder, "--slots", 4)
    told = json.loads(out.read_text())
    (other,) = told["others"]
    assert told["run"]["bundle"] != other["run"]["bundle"]
    assert other["whole"]["p"] < 0.05 and other["run"]["page_budget"] == 1
    written = sorted(folder.glob("*.png"))
    assert 5 < len(written) == min(PICTURES, len(other["changed"]))
    assert written[0].stem == f"{other['changed'][0]['index']:05d}"
    for path in written:
        with PIL.Image.open(path) as image:
            assert min(image.size) > 100
    for side in (told, other):
        assert side["name"] == f"7b-{side['run']['bundle'].removeprefix('sha256:')[:8]}"
        assert (tmp_path / f"c-{side['name']}.jsonl").is_file(), "results to go on from"


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
    (folder / "2.png").write_bytes(good[:200])  # a download that was cut off
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
        (("--compare", "a.jsonl"), r"--compare a\.jsonl"),
        (("--compare", "a" * 300, "b" * 300), "File name too long"),
        (("BUNDLE", "--out", "a" * 300 + ".jsonl"), "File name too long"),
        (("--compare", "a.jsonl", "b.jsonl", "--out", "c.jsonl"), r"--out c\.jsonl"),
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


def test_results_of_other_questions_are_not_compared(data, whole, default_bundle, tmp_path):
    rows = [{"image": "0.png", "question": "is there a red circle?", "answer": "no"}]
    folder, out = write_scenes(tmp_path / "s", rows), tmp_path / "r.jsonl"
    evaluate("scenes", "--data", folder, default_bundle("fp16"), "--out", out)
    for compared in ((whole, out), (out, whole), (out, out)):  # two of other questions than --data has, too
        with pytest.raises(OptionError, match=r"r\.jsonl holds results of other questions: data sha256:"):
            evaluate("scenes", "--data", data, "--compare", *compared, "--out", tmp_path / "c.json")
    with pytest.raises(OptionError, match="another run: data"):
        evaluate("scenes", "--data", data, default_bundle("fp16"), "--out", out)


def test_results_of_another_task_are_not_compared(whole, tmp_path):
    vstar = write_vstar(tmp_path / "vstar")
    with pytest.raises(OptionError, match=r"whole\.jsonl holds results of the task 'scenes'") as caught:
        evaluate("vstar", "--data", vstar, "--compare", whole, whole, "--out", tmp_path / "c.json")
    assert caught.value.expected == "vstar" and not (tmp_path / "c.json").exists()


def test_results_of_other_images_are_not_compared(data, whole, tmp_path):
    lines = [json.loads(line) for line in whole.read_text().splitlines()]
    other, out = tmp_path / "other.jsonl", tmp_path / "c.json"
    lines[3]["image"] = "0" * 16
    other.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(OptionError, match=f"{lines[3]['key']!r} of other is about another image"):
        evaluate("scenes", "--data", data, "--compare", whole, other, "--out", out)


def test_what_is_not_merged(whole, tmp_path):
    lines = whole.read_bytes().splitlines(keepends=True)
    shards = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    for index, path in enumerate(shards):
        path.write_bytes(lines[0] + b"".join(lines[1 + index :: 2]))
    before = shards[0].read_bytes()
    with pytest.raises(OptionError, match="in none of the files to merge"):
        evaluate("merge", "--out", *shards)
    assert shards[0].read_bytes() == before and len(list(tmp_path.iterdir())) == 2
    assert evaluate("merge", "--out", shards[0], *shards) == 0
    assert shards[0].read_bytes() == whole.read_bytes()


def test_names_of_what_is_compared(whole, tmp_path):
    """Each has one of its own; results of bundles are kept by them."""
    for name in ("a/b", "c d/b"):
        (tmp_path / name).mkdir(parents=True)
    one, two = tmp_path / "a/b", tmp_path / "c d"
    assert names_of([one, two]) == ["b", "c_d"]
    letters = json.loads(whole.read_text().splitlines()[0])["bundle"][7:15]
    other = tmp_path / "whole.jsonl"
    lines = whole.read_text()
    other.write_text(lines.replace(letters, "0" * 8))
    assert names_of([whole, other, one]) == [f"whole-{letters}", "whole-00000000", "b"]
    assert names_of([whole, one, whole]) == [f"whole-{letters}-1", "b", f"whole-{letters}-3"]


def test_results_of_an_unknown_task_are_not_merged(whole, tmp_path):
    head, *rest = whole.read_text().splitlines(keepends=True)
    one = tmp_path / "one.jsonl"
    one.write_text("".join([json.dumps(json.loads(head) | {"task": "mars"}) + "\n", *rest]))
    with pytest.raises(DataError, match="task 'mars'") as caught:
        evaluate("merge", "--out", tmp_path / "all.jsonl", one)
    assert "vstar, textvqa" in caught.value.expected and not (tmp_path / "all.jsonl").exists()


def test_without_scipy_it_says_what_to_install(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['scipy'] = None")
    line = [sys.executable, "-m", "runtime.evaluate", "--help"]
    failed = subprocess.run(
        line, cwd=ROOT, env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""}, capture_output=True, text=True
    )
    assert failed.returncode == 1 and "pip install '.[evaluate]'" in failed.stderr
    assert "Traceback" not in failed.stderr
