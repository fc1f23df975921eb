"""What docs/server.md shows is what happens, and what it names is all there is."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest

from runtime.serve import Settings
from runtime.serve.metrics import Metrics
from tests.paths import ROOT
from tests.runtime.serve.asgi import get

TEXT = (ROOT / "docs/server.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def url(serve, default_bundle) -> str:
    return serve(default_bundle("fp16"))


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_curl_line(url):
    (command,) = re.findall(r"```bash\n(curl .+?)```", TEXT, re.DOTALL)
    assert ADDRESS in command
    done = subprocess.run(["bash", "-c", command.replace(ADDRESS, url)], capture_output=True, text=True, cwd=ROOT)
    assert '"content":"30 and 98"' in done.stdout, done.stdout + done.stderr


def test_the_program_with_openai(url):
    program = next(found for found in re.findall(r"```python\n(.+?)```", TEXT, re.DOTALL) if "OpenAI" in found)
    assert ADDRESS in program
    line = [sys.executable, "-c", program.replace(ADDRESS, url)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"^('.*'|None) read (.+)$", done.stdout, re.MULTILINE)
    assert "".join(eval(text) or "" for text, _ in shown) == "30 and 98"
    assert any(cells.startswith("[[") for _, cells in shown)


def test_the_app_in_an_app(default_bundle):
    program = next(found for found in re.findall(r"```python\n(.+?)```", TEXT, re.DOTALL) if "Mount" in found)
    assert '"build/default-fp16"' in program
    names: dict = {}
    exec(program.replace("build/default-fp16", str(default_bundle("fp16"))), names)
    assert get(names["outer"], "/vision/v1/models").json["data"][0]["id"] == "default-fp16"
    names["engine"].close()


def test_limits_are_the_defaults():
    options = {f"--{each.name.replace('_', '-')}" for each in fields(Settings) if "help" in each.metadata}
    named = set(re.findall(r"`(--[a-z-]+)`", TEXT))
    assert options <= named
    settings = Settings()
    assert (settings.queue, settings.timeout, settings.connections, settings.grace) == (32, 300, 256, 20)
    assert (settings.body_bytes, settings.all_bodies_bytes, settings.header_bytes) == (24 << 20, 256 << 20, 16 << 10)
    assert (settings.pixels, settings.messages, settings.characters) == (64_000_000, 128, 100_000)
    assert (settings.head_timeout, settings.body_timeout, settings.read_timeout) == (10, 30, 30)
    assert settings.view_bytes == 4 << 30


def test_metrics_and_codes_are_named():
    samples = {line.split(" ")[2] for line in Metrics().text().decode().splitlines() if line.startswith("# TYPE flex_")}
    shown = TEXT.replace("..._", "flex_view_cache_")
    for name in {name for name in samples if not name.endswith("_created")}:
        assert f"`{name}`" in shown, name
    sources = "".join(path.read_text() for path in (ROOT / "runtime/serve").glob("*.py"))
    codes = set(re.findall(r'code="([a-z_]+)"', sources)) | set(re.findall(r'\(\d{3}, "([a-z_]+)"\)', sources))
    codes |= set(re.findall(r'_wrong\(.+?, "([a-z_]+)"\)', sources))
    unsaid = {"gone", "http_error", "invalid_header"}  # nobody is told; Starlette raises no other
    assert codes - unsaid <= set(re.findall(r"`([a-z_]+)`", TEXT))
