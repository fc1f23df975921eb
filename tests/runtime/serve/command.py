"""The server as people start it, in a process of its own on a free port."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.paths import ROOT

START = 60.0  # seconds


@dataclass
class Server:
    """A running server. url: what it printed, without the slash at its end. log: file of its standard error."""

    process: subprocess.Popen[str]
    url: str
    log: Path
    status: int | None = field(default=None, init=False)

    def end(self, number: int = signal.SIGTERM, seconds: float = 30.0) -> int:
        """Ask it to end; returns its exit status."""
        self.process.send_signal(number)
        self.status = self.process.wait(seconds)
        return self.status


def start(bundle: Path, *arguments: object, log: Path, **environment: str) -> Server:
    """`python -m runtime.serve BUNDLE --port 0 ARGUMENTS`, once it answers. Who starts it must end it."""
    line = [sys.executable, "-m", "runtime.serve", str(bundle), "--port", "0", *map(str, arguments)]
    with log.open("w") as errors:
        process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env={**os.environ, **environment}
        )
    assert process.stdout is not None
    with selectors.DefaultSelector() as waiting:
        waiting.register(process.stdout, selectors.EVENT_READ)
        deadline = time.monotonic() + START
        while not waiting.select(max(0.0, deadline - time.monotonic())):
            process.kill()
            raise AssertionError(f"no word from the server within {START} s: {log.read_text()}")
    said = process.stdout.readline()
    assert said.startswith("http://"), f"{said}{log.read_text()}"
    return Server(process, said.split()[0].rstrip("/"), log)


@contextmanager
def serving(bundle: Path, *arguments: object, log: Path, **environment: str) -> Iterator[Server]:
    """A server for a block."""
    server = start(bundle, *arguments, log=log, **environment)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
        assert server.process.stdout is not None
        server.process.stdout.close()
