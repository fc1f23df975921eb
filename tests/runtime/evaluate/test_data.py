"""Data sets as their authors pack them, and what may be wrong with a copy."""

from __future__ import annotations

import json
import shutil

import pytest

from engines.bundle.manifest import PROMPT_TEMPLATE
from engines.errors import DataError
from runtime.evaluate import magnifier, scenes, textvqa, vstar
from runtime.evaluate.task import Record, digest_of
from tests.runtime.evaluate.datasets import (
    VSTAR,
    magnifier_row,
    textvqa_row,
    write_magnifier,
    write_scenes,
    write_textvqa,
    write_vstar,
)

TEN = ["nokia"] * 10


def test_vstar(tmp_path):
    items = vstar.read(write_vstar(tmp_path))
    assert [item.key for item in items] == [f"{subset}/{name}" for subset, name, *_ in VSTAR]
    assert [item.image.suffix for item in items] == [".jpg", ".JPG", ".webp", ".png", ".jpeg"]
    assert [item.references for item in items] == [row[-1] for row in VSTAR]
    assert items[2].prompt == "Was steht da: „Straße“?\nAnswer the question using a single word or phrase."


def test_of_several_images_the_first_suffix_counts(tmp_path):
    """Official: jpg, JPG, webp, png, jpeg. Each comes before those behind it."""
    folder = write_vstar(tmp_path)
    suffixes = ("jpg", "JPG", "webp", "png", "jpeg")
    question = folder / "relative_position" / "rp_1.json"
    question.with_suffix(".jpeg").rename(tmp_path / "image")
    for suffix in reversed(suffixes):
        shutil.copy(tmp_path / "image", question.with_suffix(f".{suffix}"))
        assert vstar.read(folder)[-1].image == question.with_suffix(f".{suffix}")


@pytest.mark.parametrize(
    "name, text, found",
    [
        ("sa_2.json", '{"question": "q", "options": ["a", "b"]', "no JSON"),
        ("sa_2.json", "[]", "holds no question"),
        ("sa_2.json", '{"options": ["a", "b"]}', "has no question"),
        ("sa_2.json", '{"question": " ", "options": ["a", "b"]}', "has question ' '"),
        ("sa_2.json", '{"question": "q", "options": ["a"]}', r"has options \['a'\]"),
        ("sa_2.json", '{"question": "q", "options": ["a", "b", "c", "d", "e"]}', "has options"),
        ("sa_2.json", '{"question": "q", "options": ["a", 3]}', "has options"),
        ("sa_2.json", '{"question": "q", "options": ["a", " "]}', "has an empty option"),
        ("sa_1.jpg", None, r"1 of 5 images are missing: .*sa_1\.jpg"),
        ("sa_1.jpg", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "pointer of Git LFS"),
    ],
)
def test_vstar_that_is_damaged(tmp_path, name, text, found):
    path = write_vstar(tmp_path) / "direct_attributes" / name
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(DataError, match=found) as caught:
        vstar.read(tmp_path)
    assert path.name in str(caught.value)


def test_vstar_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="no subset") as caught:
        vstar.read(tmp_path / "nowhere")
    assert "hf download craigwu/vstar_bench" in caught.value.fix
    (tmp_path / "OCR").mkdir()
    with pytest.raises(DataError, match="OCR holds no questions"):
        vstar.read(tmp_path)


def test_textvqa(tmp_path):
    """The scorer finds questions by image and text: of two alike, the last one's answers count."""
    rows = [
        textvqa_row(0, "abc", "What brand is it?", TEN),
        textvqa_row(1, "abc", "what brand is it?", ["Sony"] * 10),
        textvqa_row(2, "d-e_f", "Who?", ["a\nb"] * 10),
    ]
    items = textvqa.read(write_textvqa(tmp_path / "t", rows))
    assert [item.key for item in items] == ["34602", "34603", "34604"]
    assert [item.references[0] for item in items] == ["Sony", "Sony", "a\nb"]
    assert items[0].prompt == "What brand is it?\nAnswer the question using a single word or phrase."
    records = [Record(0, "34602", "validation", "What brand is it?", "Nokia", 0.0, 1.5, {"image": "abc.jpg"})]
    (row,) = textvqa.answer_files(records, PROMPT_TEMPLATE)["answers.jsonl"].splitlines()
    written = json.loads(row)
    assert (written["question_id"], written["text"]) == ("abc.jpg", "Nokia")
    assert written["prompt"] == (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. USER: <image>\nWhat brand is it?\n"
        "Answer the question using a single word or phrase. ASSISTANT:"
    )
    assert written["prompt"].split("\n")[1].lower() == "what brand is it?"  # how the official scorer finds the question


@pytest.mark.parametrize(
    "change, found",
    [
        ({"answers": TEN[:9]}, "question 1 has answers"),
        ({"answers": None}, "question 1 has answers None"),
        ({"image_id": 3}, "question 1 has image_id 3"),
        ({"image_id": "../secret"}, "has image_id '../secret'"),
        ({"image_id": "a" * 300}, "aaa cannot be looked at: File name too long"),
        ({"question": ""}, "question 1 has question ''"),
        ({"question_id": 34602}, "'34602' comes twice"),
    ],
)
def test_textvqa_that_is_damaged(tmp_path, change, found):
    rows = [textvqa_row(0, "abc", "q", TEN), textvqa_row(1, "abc", "r", TEN)]
    folder = write_textvqa(tmp_path / "t", rows)
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": [rows[0], {**rows[1], **change}]}))
    with pytest.raises(DataError, match=found):
        textvqa.read(folder)


def test_textvqa_whose_images_are_missing(tmp_path):
    rows = [textvqa_row(index, name, f"q{index}", TEN) for index, name in enumerate("abcdef")]
    folder = write_textvqa(tmp_path / "t", rows, missing=("a", "b", "c", "d"))
    with pytest.raises(DataError, match=r"4 of 6 images are missing: .*a\.jpg, .*c\.jpg, \.\.\.\n") as caught:
        textvqa.read(folder)
    assert "train_val_images.zip" in caught.value.fix
    (folder / "TextVQA_0.5.1_val.json").write_text('{"data": 3}')
    with pytest.raises(DataError, match="no list of questions"):
        textvqa.read(folder)


@pytest.mark.parametrize("task", [textvqa, magnifier, scenes])
def test_results_that_lack_what_the_authors_files_hold(task):
    for details in ({}, {"image": 3, "right": [1]}):
        with pytest.raises(DataError, match=r"the result of '7' has (image|right) "):
            task.answer_files([Record(0, "7", "s", "q", "a", 0.0, 1.5, details)], PROMPT_TEMPLATE)


def test_magnifier(tmp_path):
    rows = {
        "q1": magnifier_row("What is it? A. x, B. y, C. z, D. w", "B", ["absent", "IMG_1", "IMG_2"]),
        "q2": magnifier_row("And? A. x, B. y, C. z, D. w", "D", ["IMG_1"]),
    }
    rows["q3"] = magnifier_row("Where? A. x, B. y, C. z, D. w", "E", ["IMG_2"])  # official: no answer is right
    items = magnifier.read(write_magnifier(tmp_path / "m", rows, IMG_2="AAEC\nAwQ=\r\n"))
    assert [(item.key, item.references) for item in items] == [("q1", ("B",)), ("q2", ("D",)), ("q3", ("E",))]
    assert items[0].image is items[1].image and items[0].image[:4] == b"\x89PNG"  # the first that is there
    assert items[2].image == bytes(range(5)), "official: base64 may have line breaks"
    record = Record(0, "q1", "multiple choice", rows["q1"]["instruction"], "The answer is B", 1.0, 0.0, {"right": "B"})
    (row,) = magnifier.answer_files([record], "USER: <image>\n{prompt} ASSISTANT:")["answers.jsonl"].splitlines()
    assert json.loads(row) == {
        "question_id": "q1",
        "prompt": f"USER: <image>\n{items[0].prompt} ASSISTANT:",
        "text": "The answer is B",
        "gt": "B",
        "prased_ans": "B",
        "model_id": "llava-v1.5",
        "metadata": {},
    }


@pytest.mark.parametrize(
    "change, found",
    [
        ({"answer": None}, "has answer None"),
        ({"image_ids": ["IMG_9"]}, r"has image_ids \['IMG_9'\]"),
        ({"image_ids": ["BAD"]}, "'BAD': "),
        ({"image_ids": None}, "has image_ids None"),
        ({"image_ids": [["IMG_1"], {}]}, r"has image_ids \[\['IMG_1'\], \{\}\]"),
        ({"instruction": 1}, "has instruction 1"),
    ],
)
def test_magnifier_that_is_damaged(tmp_path, change, found):
    row = {**magnifier_row("What? A. x, B. y, C. z, D. w", "A", ["IMG_1"]), **change}
    with pytest.raises(DataError, match=found):
        magnifier.read(write_magnifier(tmp_path / "m", {"q1": row}, BAD="no base64 at all!"))


@pytest.mark.parametrize(
    "rows, found",
    [
        ({}, "is no list"),
        ([], "holds no questions"),
        ([{"image": "0.png", "question": "q"}], "question 0 has no answer"),
        ([{"image": "/etc/passwd", "question": "q", "answer": "a"}], "has image '/etc/passwd'"),
        ([{"image": "../0.png", "question": "q", "answer": "a"}], "has image '../0.png'"),
        ([{"image": "1.png", "question": "q", "answer": "a"}], "1 of 1 images are missing"),
    ],
)
def test_scenes_that_are_damaged(tmp_path, rows, found):
    folder = write_scenes(tmp_path / "s", [{"image": "0.png", "question": "q", "answer": "a"}])
    assert scenes.read(folder)[0].subset == "questions"
    (folder / "questions.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=found):
        scenes.read(folder)


def test_the_digest_is_of_what_is_asked(tmp_path):
    rows = [{"image": "0.png", "question": "q", "answer": "a"}, {"image": "1.png", "question": "r", "answer": "b"}]
    first = digest_of(scenes.read(write_scenes(tmp_path / "a", rows)))
    assert digest_of(scenes.read(write_scenes(tmp_path / "b", rows))) == first, "wherever it lies"
    other = [rows[0], {**rows[1], "answer": "c"}]
    assert digest_of(scenes.read(write_scenes(tmp_path / "c", other))) != first
    (tmp_path / "b" / "1.png").write_bytes(b"mended")
    assert digest_of(scenes.read(tmp_path / "b")) == first, "what images hold stands in each result"
