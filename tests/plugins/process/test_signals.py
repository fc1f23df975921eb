"""A command that is asked to end cleans up: once, and not where the signal is ignored."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from plugins.signals import interrupt_when_asked_to_end
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[2] == "nohup" else signal.SIG_DFL)
interrupt_when_asked_to_end()
marker = Path(sys.argv[1])
marker.touch()
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    if sys.argv[2] == "twice":
        for number in (signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
    time.sleep(0.1)
    marker.unlink()
    print("cleaned up")
"""


def start(marker: Path, how: str = "") -> subprocess.Popen:
    line = [sys.executable, "-c", PROGRAM, str(marker), how]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("number", "how"),
    [
        (signal.SIGTERM, ""),
        (signal.SIGHUP, ""),
        (signal.SIGTERM, "twice"),
        (signal.SIGHUP, "twice"),
    ],
)
def test_asked_to_end(tmp_path, number, how):
    process = start(tmp_path / "marker", how)
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert said == "cleaned up\n" and process.returncode == 0 and not (tmp_path / "marker").exists()


def test_what_is_ignored_stays_ignored(tmp_path):
    process = start(tmp_path / "marker", "nohup")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "cleaned up\n"
