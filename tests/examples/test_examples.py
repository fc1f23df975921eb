"""The scripts in examples/, run as a user runs them, on the default model."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.paths import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(default_bundle):
    """run(script, *arguments) -> the finished process, which used the default model's bundle."""

    def start(script: str, *arguments: object) -> subprocess.CompletedProcess:
        line = [sys.executable, EXAMPLES / script, *arguments, "--bundle", default_bundle("fp16")]
        return subprocess.run([*map(str, line)], capture_output=True, text=True, cwd=ROOT, timeout=60)

    return start


def test_ask(run):
    result = run("ask.py")
    answer, stats = result.stdout.splitlines()
    assert answer == "69 and 65" and "pages read per layer" in stats and not result.stderr


def test_ask_says_what_is_wrong(run):
    result = run("ask.py", "nowhere.png", "what number is in the red star?")
    assert result.returncode == 1 and "nowhere.png does not exist" in result.stderr
    assert "expected:" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_a_missing_bundle_is_told(script):
    line = [sys.executable, EXAMPLES / script, "examples", "read the number.", "--bundle", "nowhere"]
    result = subprocess.run([*map(str, line)], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 1 and "no bundle folder nowhere" in result.stderr and "Traceback" not in result.stderr


def test_many_questions(run):
    """The image is encoded for the first question alone."""
    lines = run("many_questions.py").stdout.splitlines()
    assert [line.rsplit("? ", 1)[1] for line in lines[::2]] == ["69", "65", "yes"]
    vision, reused = ([int(re.search(of, line)[1]) for line in lines[1::2]] for of in (r"vision (\d+)", r"(\d+) of"))
    assert vision[0] > 0 and vision[1:] == [0, 0] and reused[0] == 0 and min(reused[1:]) > 100


def test_camera(default_bundle, tmp_path):
    """The newest frame, whatever else there is; a frame cut off in the middle; and the next one, which is whole."""
    tower, poster = ((EXAMPLES / name).read_bytes() for name in ("tower.png", "poster.png"))
    for seconds, (name, data) in enumerate({"old.png": poster, "new.png": tower, "notes.txt": b"not a frame"}.items()):
        (tmp_path / name).write_bytes(data)
        os.utime(tmp_path / name, (seconds, seconds))
    line = [sys.executable, EXAMPLES / "camera.py", tmp_path, "read the number on the green triangle.", "--frames", "3"]
    line += ["--bundle", default_bundle("fp16")]
    with subprocess.Popen([*map(str, line)], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert re.fullmatch(r"new\.png: 85 \(\d+ ms\)\n", process.stdout.readline())
            (tmp_path / "cut.part").write_bytes(poster[: len(poster) // 2])
            (tmp_path / "cut.part").rename(tmp_path / "cut.png")
            assert process.stdout.readline().startswith("cut.png: ")
            (tmp_path / "whole.part").write_bytes(tower)
            (tmp_path / "whole.part").rename(tmp_path / "whole.png")
            assert process.stdout.readline().startswith("whole.png: 85 ")
            assert process.wait(30) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_they_stay_short(script):
    assert len((EXAMPLES / script).read_text().splitlines()) < 40
