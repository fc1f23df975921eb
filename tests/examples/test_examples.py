"""The scripts in examples/, run as a user runs them, on the default model."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys

import httpx
import pytest

from runtime import Engine
from tests.paths import ROOT
from tests.runtime.serve.command import serving

EXAMPLES = ROOT / "examples"
QUESTION = "what numbers are in the red star and the cyan circle?"


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
    assert answer == "30 and 98" and "pages read per layer" in stats and not result.stderr


def test_ask_says_what_is_wrong(run):
    result = run("ask.py", "nowhere.png", "what number is in the red star?")
    assert result.returncode == 1 and "nowhere.png does not exist" in result.stderr
    assert "expected:" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("script", sorted({path.name for path in EXAMPLES.glob("*.py")} - {"openai_client.py"}))
def test_a_missing_bundle_is_told(script):
    asked = [] if script == "app.py" else ["examples", "read the number."]
    line = [sys.executable, EXAMPLES / script, *asked, "--bundle", "nowhere"]
    result = subprocess.run([*map(str, line)], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 1 and "no bundle folder nowhere" in result.stderr and "Traceback" not in result.stderr


def test_many_questions(run):
    """The image is encoded for the first question alone."""
    lines = run("many_questions.py").stdout.splitlines()
    assert [line.rsplit("? ", 1)[1] for line in lines[::2]] == ["30", "98", "yes"]
    vision, reused = ([int(re.search(of, line)[1]) for line in lines[1::2]] for of in (r"vision (\d+)", r"(\d+) of"))
    assert vision[0] > 0 and vision[1:] == [0, 0] and reused[0] == 0 and min(reused[1:]) > 100


def test_score(run):
    """The right answer is the likeliest, and one of another kind the least."""
    result = run("score.py")
    assert not result.stderr
    assert [line.rsplit(": ", 1)[1] for line in result.stdout.splitlines()][::3] == ["30 and 98", "yes"]
    asked = run("score.py", "examples/tower.png", "read the number on the green triangle.", "55", "22", "25")
    means = [float(line.split()[0]) for line in asked.stdout.splitlines()]
    assert asked.stdout.splitlines()[0].endswith(": 22") and means == sorted(means, reverse=True) and means[0] < 0


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
            assert re.fullmatch(r"new\.png: 22 \(\d+ ms\)\n", process.stdout.readline())
            (tmp_path / "cut.part").write_bytes(poster[: len(poster) // 2])
            (tmp_path / "cut.part").rename(tmp_path / "cut.png")
            assert process.stdout.readline().startswith("cut.png: ")
            (tmp_path / "whole.part").write_bytes(tower)
            (tmp_path / "whole.part").rename(tmp_path / "whole.png")
            assert process.stdout.readline().startswith("whole.png: 22 ")
            assert process.wait(30) == 0
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(default_bundle, tmp_path_factory):
    with serving(default_bundle("fp16"), log=tmp_path_factory.mktemp("server") / "log") as running:
        yield running.url


def test_openai_client(server, default_bundle):
    line = [sys.executable, EXAMPLES / "openai_client.py", "--url", f"{server}/v1"]
    result = subprocess.run([*map(str, line)], capture_output=True, text=True, cwd=ROOT, timeout=60)
    answer, pages = result.stdout.splitlines()
    assert answer == "30 and 98" and result.returncode == 0, result.stderr
    answered = Engine(default_bundle("fp16")).generate(EXAMPLES / "poster.png", QUESTION)
    read = ["/".join(map(str, token)) for token in answered.stats.pages_read]
    assert pages == f"pages that the layers read for each token: {', '.join(read)}"


def test_openai_client_says_what_is_wrong(server):
    for arguments, text in ((["nowhere.png"], "nowhere.png"), (["--url", "http://127.0.0.1:9/v1"], "Connection error")):
        line = [sys.executable, EXAMPLES / "openai_client.py", "--url", f"{server}/v1", *arguments]
        result = subprocess.run([*map(str, line)], capture_output=True, text=True, cwd=ROOT, timeout=60)
        assert result.returncode == 1 and text in result.stderr and "Traceback" not in result.stderr


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl(server):
    line, environment = ["sh", str(EXAMPLES / "curl.sh")], os.environ | {"FLEX_URL": server}
    result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60)
    assert json.loads(result.stdout)["choices"][0]["message"]["content"] == "30 and 98", result.stderr


def test_app(default_bundle):
    """A route of its own, the API below another, and no answer but a message for what is no picture."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, EXAMPLES / "app.py", "--bundle", default_bundle("fp16"), "--port", port]
    poster, url = (EXAMPLES / "poster.png").read_bytes(), f"http://127.0.0.1:{port}"
    with subprocess.Popen([*map(str, line)], stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            while "running on" not in process.stderr.readline():
                assert process.poll() is None
            for shape, answer in (("red star", "30\n"), ("cyan circle", "98\n")):
                assert httpx.post(f"{url}/number", params={"shape": shape}, content=poster).text == answer
            refused = httpx.post(f"{url}/number", content=b"no picture")
            assert refused.status_code == 400 and "not an image" in refused.text
            assert httpx.get(f"{url}/vlm/v1/models").json()["data"][0]["id"]
            process.terminate()
            process.wait(30)
        finally:
            process.kill()


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.*") if path.suffix in (".py", ".sh")))
def test_they_stay_short(script):
    assert len((EXAMPLES / script).read_text().splitlines()) < 40
