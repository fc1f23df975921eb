"""The data sets in their authors' layouts, with pictures and questions of ours."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import PIL.Image

TURNED = 6  # an EXIF orientation: viewers turn the picture, the official code does not
# subset, name, suffixes of the images beside it, size, question, options
VSTAR = (
    ("direct_attributes", "sa_1", ("jpg",), (140, 90), "What is the colour of the dog?", ("red", "a red one", "blue")),
    ("direct_attributes", "sa_2", ("JPG",), (80, 150), "What is it made of?", ("tin", "t")),
    ("direct_attributes", "sa_3", ("webp",), (100, 100), "Was steht da: „Straße“?", ("Straße", "街", "é", "🙂 ok")),
    ("direct_attributes", "sa_4", ("png", "jpeg"), (64, 64), "is it a circle?", ("a", "b", "c", "d")),
    ("relative_position", "rp_1", ("jpeg",), (90, 40), "Is it left or right?", ("left of it", "left", "left of it!")),
)


def picture(seed: int, size: tuple[int, int]) -> PIL.Image.Image:
    """A picture of that width and height."""
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def write_vstar(folder: Path) -> Path:
    """V* Bench, of the questions of VSTAR. Of two images the one that counts is of another seed."""
    for index, (subset, name, suffixes, size, question, options) in enumerate(VSTAR):
        (folder / subset).mkdir(parents=True, exist_ok=True)
        row = {"target_object": ["x"], "bbox": [[0, 0, 1, 1]], "question": question, "options": options}
        (folder / subset / f"{name}.json").write_text(json.dumps(row))
        for place, suffix in enumerate(suffixes):
            made = picture(index + 100 * place, size)
            exif = made.getexif()
            exif[0x0112] = TURNED
            made.save(folder / subset / f"{name}.{suffix}", exif=exif)
    (folder / "test_questions.jsonl").write_text("{}\n")  # the others there are on the Hub
    (folder / "README.md").write_text("V*\n")
    return folder


def textvqa_row(index: int, image: str, question: str, answers: list[str]) -> dict[str, object]:
    """A question as TextVQA has it, with what is not read."""
    return {
        "question": question,
        "image_id": image,
        "image_classes": ["Book"],
        "flickr_original_url": "https://example.org/1.jpg",
        "image_width": 64,
        "question_tokens": question.lower().split(),
        "answers": answers,
        "question_id": 34602 + index,
        "set_name": "val",
    }


def write_textvqa(folder: Path, rows: list[dict[str, object]], missing: tuple[str, ...] = ()) -> Path:
    """TextVQA, with a picture for each image that is not `missing`."""
    (folder / "train_images").mkdir(parents=True)
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"dataset_type": "val", "data": rows}))
    for index, name in enumerate(dict.fromkeys(str(row["image_id"]) for row in rows)):
        if name not in missing:
            picture(index, (64, 80)).save(folder / "train_images" / f"{name}.jpg")
    return folder


def magnifier_row(instruction: str, answer: str, images: list[str]) -> dict[str, object]:
    """A question as MagnifierBench has it."""
    return {"instruction": instruction, "answer": answer, "image_ids": images, "rel_ins_ids": []}


def write_magnifier(folder: Path, rows: dict[str, dict[str, object]], **images: str) -> Path:
    """MagnifierBench, with the picture "IMG_1" and others, in base64."""
    folder.mkdir(parents=True)
    png = io.BytesIO()
    picture(7, (90, 60)).save(png, "PNG")
    pictures = {"IMG_1": base64.b64encode(png.getvalue()).decode(), **images}
    (folder / "images.json").write_text(json.dumps(pictures))
    content = {"meta": {"version": "0.0.1"}, "data": rows}
    (folder / "data_instructions.json").write_text(json.dumps(content))
    return folder


def write_scenes(folder: Path, rows: list[dict[str, str]]) -> Path:
    """A folder of questions with one answer each."""
    folder.mkdir(parents=True)
    (folder / "questions.json").write_text(json.dumps(rows))
    for index, name in enumerate(dict.fromkeys(row["image"] for row in rows)):
        picture(index, (60, 60)).save(folder / name)
    return folder
