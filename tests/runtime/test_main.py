"""`python -m runtime`: the streamed answer, the picture, errors without tracebacks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime import Engine
from runtime.show import DIM, draw_selection
from tests.paths import ROOT
from tests.runtime.questions import GEOMETRY, PHOTO, QUESTION


@pytest.fixture
def photo(tmp_path) -> Path:
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def command(*arguments: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "runtime", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, cwd=ROOT)


def test_answer_and_picture(random_model, photo, tmp_path):
    _, bundle = random_model("engine", GEOMETRY, tokenizer=True)
    picture = tmp_path / "selection.png"
    result = command(bundle, photo, QUESTION, "--max-new-tokens", 5, "--show", picture)
    expected = Engine(bundle).generate(photo, QUESTION, max_new_tokens=5).text
    assert result.returncode == 0, result.stderr
    assert result.stdout.decode() == expected + "\n"
    assert b"pages read" in result.stderr
    with Image.open(picture) as image:
        assert image.width > PHOTO.shape[1] and image.mode == "RGB"


@pytest.mark.parametrize(
    ("image", "options", "text"),
    [
        ("nowhere.png", [], b"does not exist"),
        ("none", ["--show", "x.png"], b"--show without an image"),
        ("PHOTO", ["--show", "/nowhere/x.png"], b"mkdir -p"),
        ("PHOTO", ["--show", "/tmp"], b"a file name"),
        ("PHOTO", ["--show", "x.foo"], b"a picture"),
        ("PHOTO", ["--show", "x"], b"no suffix"),
        ("PHOTO", ["--top-k", "5"], b"temperature"),
    ],
)
def test_errors_are_messages(random_model, photo, image, options, text):
    _, bundle = random_model("engine", GEOMETRY, tokenizer=True)
    result = command(bundle, photo if image == "PHOTO" else image, QUESTION, *options)
    assert result.returncode == 1 and text in result.stderr and b"Traceback" not in result.stderr


def test_panels_light_the_pages_that_were_read():
    image = Image.new("RGB", (300, 200), (200, 200, 200))  # padded to 300 x 300: 50 pixels above and below
    cells = np.zeros((1, 3, 3, 3), bool)
    cells[0, :2, 1, 1] = True  # the middle page: both reading layers
    cells[0, 0, 1, 2] = True  # to its right: one of two
    cells[0, 2, 0, 0] = True  # the last layer's selection is never read
    sheet = np.asarray(draw_selection(image, cells, ["word"]))
    assert draw_selection(image, np.zeros((64, 3, 3, 3), bool), ["word"] * 64).width < 2000  # 64 panels, smaller
    flat = {tuple(color) for color in sheet.reshape(-1, 3).tolist()}
    dark = int(200 * DIM)
    assert (dark, dark, dark) in flat and (200, 200, 200) in flat  # not read; the original panel
    strong, weak = ([round(200 * (1 - a) + page * a) for page in (255, 96, 0)] for a in (0.6, 0.3))
    area = {
        name: (np.abs(sheet.astype(int) - color).max(-1) <= 1).sum() for name, color in (("s", strong), ("w", weak))
    }
    assert area["s"] == pytest.approx(107 * 107, rel=0.05)  # a third of the panel's 320 pixels squared
    assert area["w"] == pytest.approx(107 * 107, rel=0.05)
