"""`python -m runtime`: the streamed answer, the picture, errors without tracebacks."""

from __future__ import annotations

import base64
import contextlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime import Engine, OptionError, Options
from runtime.__main__ import parse_arguments
from runtime.terminal.show import DIM, draw_selection
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


def shell(script: str, bundle: Path, photo: Path, **env: str) -> subprocess.CompletedProcess:
    """A line of bash in which `ask` is a question that is answered with five tokens."""
    ask = f"ask() {{ {sys.executable} -m runtime {bundle} {photo} '{QUESTION}' --max-new-tokens 5 \"$@\"; }}"
    line = ["bash", "-c", f"{ask}; {script}"]
    return subprocess.run(line, capture_output=True, cwd=ROOT, env=os.environ | env, timeout=120)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("script", "status", "said"),
    [
        ("ask | true; exit ${PIPESTATUS[0]}", 141, b""),
        ("ask --help | true; exit ${PIPESTATUS[0]}", 141, b""),
        ("ask >/dev/full", 1, b"error: standard output cannot be written: No space left on device\n"),
        ("ask >&-", 0, b"STATS"),
        ("ask >&- <&-", 0, b"STATS"),
        ("ask 2>&-", 0, b""),
        ("ask 2>/dev/full", 0, b""),
        ("ask --top-k 5 2>&-", 1, b""),
        ("ask --top-k 5 2>/dev/full", 1, b""),
        ("ask --top-k 5 >/dev/full", 1, b"error: top_k with temperature=0"),
    ],
)
def test_standard_streams_of_any_kind(random_model, photo, script, status, said, unbuffered):
    """A reader that leaves, a full disk, a closed stream: no traceback, and a status that says what became of it. With
    Python's buffer and without: what could not be written is then not kept."""
    if "/dev/full" in script and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    _, bundle = random_model("engine", GEOMETRY, tokenizer=True)
    result = shell(script, bundle, photo, PYTHONUNBUFFERED=unbuffered)
    assert result.returncode == status, result.stderr
    assert b"pages read" in result.stderr if said == b"STATS" else result.stderr.startswith(said)
    assert b"Traceback" not in result.stderr and b"Exception" not in result.stderr
    answered = "2>" in script and status == 0  # then there is the answer, and nothing that belongs to the other stream
    answer = Engine(bundle).generate(photo, QUESTION, max_new_tokens=5).text.encode() + b"\n"
    assert result.stdout == (answer if answered else b"")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_what_a_terminal_cannot_show_is_escaped(random_model, photo, encoding, tmp_path):
    """An answer, and an error, with characters that the encoding does not have."""
    program = """
import sys
from plugins.command import run
from engines.errors import OptionError
def work():
    print("caf\u00e9 \u2605")
    raise OptionError("no \u2605")
sys.exit(run(work))
"""
    line = [sys.executable, "-c", program]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    result = subprocess.run(line, capture_output=True, cwd=ROOT, env=environment, timeout=60)
    star = "\u2605" if encoding == "utf-8" else "\\u2605"
    coffee = "caf\\xe9" if encoding == "ascii" else "caf\u00e9"
    assert result.stdout == f"{coffee} {star}\n".encode(encoding) and result.returncode == 1
    assert result.stderr == f"error: no {star}\n".encode(encoding)


def test_a_photo_is_turned_upright_and_drawn_so(random_model, photo, tmp_path):
    """Held as a phone holds it: the same answer as the plain photo, and panels in its shape; not with --no-exif."""
    _, bundle = random_model("engine", GEOMETRY, tokenizer=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    phone = tmp_path / "phone.png"
    Image.fromarray(PHOTO).transpose(Image.Transpose.ROTATE_90).save(phone, exif=exif)
    pictures = {}
    for name, options in (("photo", [photo]), ("phone", [phone]), ("stored", [phone, "--no-exif"])):
        source, *rest = options
        show = tmp_path / f"{name}-shown.png"
        result = command(bundle, source, QUESTION, "--max-new-tokens", 3, "--show", show, *rest)
        assert result.returncode == 0, result.stderr
        pictures[name] = result.stdout, show.read_bytes()
    assert pictures["photo"] == pictures["phone"] != pictures["stored"]


def test_special_tokens_of_a_question(random_model, photo):
    """Text, unless they are asked for."""
    _, bundle = random_model("engine", GEOMETRY, tokenizer=True)
    asked = (
        command(bundle, photo, "look: <image> what?", "--max-new-tokens", 5),
        command(bundle, photo, "look: <image> what?", "--max-new-tokens", 5, "--special-tokens"),
    )
    engine = Engine(bundle)
    for result, special in zip(asked, (False, True), strict=True):
        expected = engine.generate(photo, "look: <image> what?", max_new_tokens=5, special_tokens=special)
        assert result.stdout.decode() == f"{expected.text}\n"
    assert asked[0].stdout != asked[1].stdout
    assert b"2 images" in command(bundle, photo, "<image><image>", "--special-tokens").stderr


def test_a_picture_that_cannot_be_written(random_model, photo, tmp_path):
    _, bundle = random_model("engine", GEOMETRY, tokenizer=True)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/null")
    for name in ("pipe.png", "device.png", "film.mpg"):
        result = command(bundle, photo, QUESTION, "--show", tmp_path / name)
        assert result.returncode == 1 and b"error: --show" in result.stderr and not result.stdout


ABSURD = [
    "nan",
    "inf",
    "-inf",
    "1e400",
    "-1",
    "1" + "0" * 30,
    "-1" + "0" * 30,
    "9" * 5000,
    "",
    "x",
    "0x10",
    "1_0",
    "\u0667",
]


@pytest.mark.parametrize(
    "option", ["--max-new-tokens", "--temperature", "--top-k", "--top-p", "--seed", "--page-budget"]
)
def test_absurd_numbers(option):
    """Argparse's own status 2 for what is no number; an OptionError, or a number, for the rest. Nothing else."""
    for value in ABSURD:
        try:
            given = parse_arguments(["bundle", "image", "question", f"{option}={value}"])
        except SystemExit as error:
            assert error.code == 2
            continue
        named = option.removeprefix("--").replace("-", "_")
        with contextlib.suppress(OptionError):
            found = getattr(Options.parse({"temperature": 1.0, named: getattr(given, named)}), named)
            assert found == getattr(given, named) and math.isfinite(found)


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


def piped(data: bytes, *arguments: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "runtime", *map(str, arguments)]
    return subprocess.run(line, input=data, capture_output=True, cwd=ROOT, timeout=120)


def test_images_from_everywhere(random_model, photo, tmp_path):
    """A path, standard input, a data: URL, base64: the same answer, printed alone; options before the question."""
    _, bundle = random_model("engine", GEOMETRY, tokenizer=True)
    data = photo.read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    expected = Engine(bundle).generate(photo, QUESTION, max_new_tokens=5).text.encode() + b"\n"
    for source, given in ((photo, b""), ("-", data), (url, b""), (url.partition(",")[2], b"")):
        result = piped(given, bundle, source, "--max-new-tokens", 5, QUESTION)
        assert (result.returncode, result.stdout) == (0, expected), result.stderr
    odd = tmp_path / "photo[1].png"  # a file of this name is no pattern
    odd.write_bytes(data)
    result = piped(b"", bundle, odd, QUESTION, "--max-new-tokens", 5)
    assert (result.returncode, result.stdout) == (0, expected), result.stderr
    for given in (b"", b"hello"):
        result = piped(given, bundle, "-", QUESTION)
        assert result.returncode == 1 and b"error: standard input: " in result.stderr


def test_several_images_and_questions(random_model, tmp_path):
    """A line for each; what cannot be read is told, and the others go on. Hidden files and folders are none of it."""
    _, bundle = random_model("engine", GEOMETRY, tokenizer=True)
    engine, questions = Engine(bundle), (QUESTION, "and\twhere?")
    (tmp_path / "deep" / "er.png").mkdir(parents=True)
    names = ("a.png", "b.png", "deep/c.png", ".hidden.png")
    for index, name in enumerate(names):
        Image.fromarray(PHOTO).rotate(90 * index).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no image")
    result = command(bundle, tmp_path / "**" / "*.png", *questions, "--max-new-tokens", 5)
    rows = [line.split("\t") for line in result.stdout.decode().split("\n")[:-1]]
    assert [row[:2] for row in rows] == [
        [str(tmp_path / name), text.replace("\t", "\\t")] for name in names[:3] for text in questions
    ]
    for name, text, answer in rows:
        expected = engine.generate(name, text.replace("\\t", "\t"), max_new_tokens=5).text
        unescaped = re.sub(r"\\(.)", lambda found: {"t": "\t", "n": "\n", "r": "\r"}.get(found[1], found[1]), answer)
        assert unescaped == expected
    assert result.returncode == 1 and result.stderr.count(b"error:") == 1, result.stderr
    assert b"broken.png is not an image" in result.stderr and b"6 answers" in result.stderr
    (tmp_path / "broken.png").unlink()
    one = command(bundle, tmp_path / "a*.png", QUESTION, "--max-new-tokens", 5)  # a pattern has the form of a pattern
    assert one.returncode == 0 and one.stdout.startswith(f"{tmp_path / 'a.png'}\t{QUESTION}\t".encode())
    two = command(bundle, "none", *questions, "--max-new-tokens", 5)
    assert two.returncode == 0 and [line.split(b"\t")[0] for line in two.stdout.split(b"\n")[:-1]] == [b"none", b"none"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere/*.png", QUESTION], b"no file matches nowhere/*.png"),
        (["PHOTO", QUESTION, "again?", "--show", "x.png"], b"--show with several answers"),
        (["PATTERN", QUESTION, "--show", "x.png"], b"--show with several answers"),
        (["PHOTO", "--show", "x.png"], b"type /show after an answer"),
        (["PATTERN"], b"2 images and no QUESTION"),
        (["-"], b"save it to a file"),
        (["https://example.com/photo.jpg", QUESTION], b"download it first"),
        (["PHOTO", QUESTION, "again?", "--top-k", "5"], b"temperature"),
        (["PHOTO", QUESTION, "--show", "x" * 5000 + ".png"], b"cannot be written"),
    ],
)
def test_what_does_not_go_together(random_model, photo, arguments, text):
    _, bundle = random_model("engine", GEOMETRY, tokenizer=True)
    (photo.parent / "photo2.png").write_bytes(photo.read_bytes())
    names = {"PHOTO": str(photo), "PATTERN": str(photo.parent / "*.png")}
    result = command(bundle, *(names.get(each, each) for each in arguments))
    assert result.returncode == 1 and text in result.stderr and b"Traceback" not in result.stderr
    assert not result.stdout and not (ROOT / "x.png").exists()


def test_a_question_may_stand_anywhere():
    for line in (
        ["bundle", "image", "what?", "--seed", "1"],
        ["bundle", "image", "--seed", "1", "what?"],
        ["--seed", "1", "bundle", "image", "what?"],
        ["bundle", "--seed", "1", "image", "--", "what?"],
    ):
        given = parse_arguments(line)
        assert (str(given.bundle), given.image, given.question) == ("bundle", "image", ["what?"]), line
    assert parse_arguments(["bundle", "image"]).question == []
    assert parse_arguments(["bundle", "image", "a", "--seed", "1", "b"]).question == ["a", "b"]
