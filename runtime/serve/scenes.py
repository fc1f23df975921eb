"""New scenes of the default model, drawn by its own generator in a process of its own: that one needs torch, and this
package lies below it."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import tempfile
import threading
from contextlib import suppress
from typing import IO, Any

from engines.errors import BackendError
from flexattention_deploy import folder_of
from plugins import child

_log = logging.getLogger(__name__)

GENERATOR = "export.default_model.draw"
NEEDS = ("torch",)  # beside the package export
SEEDS = 2**32  # a scene's seed is below
SECONDS = 60.0  # for one scene, the start of the process included: torch alone takes some on a small board


class Scenes:
    """The generator: started with the first scene, and again when it has died; ended by `close`, or with us.

    Several threads may ask at the same time; one scene is drawn at a time.
    """

    def __init__(self, module: str = GENERATOR, seconds: float = SECONDS) -> None:
        """`module`: what is run, as export/default_model/draw.py speaks. `seconds`: one scene may take at most."""
        self._module, self._seconds = module, seconds
        self._process: subprocess.Popen[str] | None = None
        self._complaints: IO[str] | None = None  # its standard error
        self._closed = False
        self._lock = threading.Lock()

    @staticmethod
    def available() -> bool:
        """Whether the generator and what it imports are installed."""
        if folder_of("export") != child.ROOT / "export":
            return False
        return all(importlib.util.find_spec(name) is not None for name in NEEDS)

    def draw(self, seed: int) -> dict[str, Any]:
        """The scene of a seed 0 .. SEEDS - 1: "seed", "image" (a data URL of a PNG) and "questions", each with
        "question" and "answer". The same seed is the same scene. Takes seconds at first, then milliseconds.

        BackendError when the generator does not answer; the next call starts a new one.
        """
        if not 0 <= seed < SEEDS:
            raise ValueError(f"seed {seed}: 0 .. {SEEDS - 1}")
        with self._lock:
            line = self._ask(json.dumps({"seed": seed}))
        scene: dict[str, Any] = json.loads(line)
        scene["image"] = f"data:image/png;base64,{scene['image']}"
        return scene

    def close(self) -> None:
        """End the generator, also one that draws; calling it twice is allowed. No scene is drawn afterwards."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()  # it holds nothing that needs an orderly end
        with self._lock:
            self._end()

    def _ask(self, request: str) -> str:
        """The generator's line for ours; a dead one is started again, once. Raises BackendError."""
        for _ in range(2):
            if self._closed:
                break
            process, is_new = self._running()
            watch = threading.Timer(self._seconds, process.kill)
            watch.start()
            try:
                assert process.stdin is not None and process.stdout is not None  # both are pipes
                process.stdin.write(request + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:  # it died before it could read
                line = ""
            finally:
                watch.cancel()
            if line.endswith("\n"):
                return line
            why = self._end()
            _log.warning("the generator of scenes ended: %s", why)
            if is_new:  # one that was just started would end the same way again
                raise BackendError(
                    f"the generator of scenes ended: {why}",
                    expected=f"a scene within {self._seconds:.0f} s",
                    fix=f"see what it says: echo '{request}' | python -m {self._module}",
                )
        raise BackendError("the generator of scenes is closed", fix="start the server again")

    def _running(self) -> tuple[subprocess.Popen[str], bool]:
        """The process, and whether it was started just now."""
        if self._process is not None and self._process.poll() is None:
            return self._process, False
        self._end()
        self._complaints = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            child.python(self._module),
            env=child.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            start_new_session=True,  # Ctrl-C is for the server, which then closes this
        )
        return self._process, True

    def _end(self) -> str:
        """Forget the process; returns the last line of what it had to say, or how it ended."""
        process, complaints = self._process, self._complaints
        self._process = self._complaints = None
        if process is None or complaints is None:
            return "not started"
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(OSError):  # what was not written to it is lost, as it should be
                pipe.close()
        with complaints:
            complaints.seek(0)
            lines = complaints.read().strip().splitlines()
        return lines[-1] if lines else f"exit status {process.returncode}"
