"""A Ray cluster of this machine alone, told what to run as people do: `serve deploy`, `serve run`, Ray's REST."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from tests.paths import ROOT

START = 90.0  # seconds that anything may take to start on a busy machine
_BIN = Path(sys.executable).parent


@dataclass
class Cluster:
    """A running cluster. url: of what it serves, without a slash. environment: of its commands. leader: process id of
    the session of all its processes."""

    port: int
    dashboard: int
    gcs: int
    environment: dict[str, str]
    leader: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self, *line: object, seconds: float = START) -> str:
        """Run one of Ray's commands; returns what it printed."""
        done = subprocess.run(
            [str(_BIN / str(line[0])), *map(str, line[1:])], cwd=ROOT, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    def rest(self, path: str, content: object = None) -> Any:
        """What Ray's dashboard says; `content`: PUT it there."""
        data = None if content is None else json.dumps(content).encode()
        asked = Request(f"http://127.0.0.1:{self.dashboard}{path}", data, method="GET" if data is None else "PUT")
        asked.add_header("Content-Type", "application/json")
        with urlopen(asked, timeout=30) as reply:
            text = reply.read()
        return json.loads(text) if text else None

    def replicas(self, application: str = "flexattention", deployment: str = "Replica") -> dict[str, int]:
        """Process ids of the running replicas, by their names."""
        there = self.application(application).get("deployments", {}).get(deployment, {}).get("replicas", ())
        return {each["replica_id"]: each["pid"] for each in there if each["state"] == "RUNNING"}

    def application(self, name: str = "flexattention") -> dict[str, Any]:
        """What Ray Serve says of an application."""
        found: dict[str, Any] = self.rest("/api/serve/applications/")["applications"].get(name, {})
        return found

    def until(self, reached: Callable[[], object], seconds: float = START) -> float:
        """Wait; returns the seconds it took."""
        begun = time.monotonic()
        while not reached():
            state = self.application()
            assert time.monotonic() < begun + seconds and state.get("status") != "DEPLOY_FAILED", state
            time.sleep(0.1)
        return time.monotonic() - begun


@contextmanager
def running(**variables: str) -> Iterator[Cluster]:
    """A cluster of two cores for a block. Nothing of it is written outside a folder of its own. variables: of its
    environment."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets below it: their paths must be short
    port, dashboard, gcs, agent = _free_ports(4)
    environment = {
        **os.environ,
        **variables,
        "HOME": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_ADDRESS": f"127.0.0.1:{gcs}",
        "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Every 10 s otherwise, on which tests would wait.
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    }
    # In a session of its own: so all its processes are known, and nobody else's cluster is ended with it.
    process = subprocess.Popen(
        [
            str(_BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={folder / 'ray'}",
            f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
            "--object-store-memory=100000000", "--disable-usage-stats",
        ],
        cwd=ROOT, env={**environment, "RAY_ADDRESS": ""}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    cluster = Cluster(port, dashboard, gcs, environment, process.pid)
    try:
        deadline = time.monotonic() + START
        while not _answers(cluster):
            assert process.poll() is None and time.monotonic() < deadline, "no cluster"
            time.sleep(0.2)
        yield cluster
    finally:
        while left := processes_of(process.pid):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.poll()
            time.sleep(0.1)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def processes_of(leader: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                found.append(int(path.parent.name))
    return found


def _answers(cluster: Cluster) -> bool:
    try:
        cluster.rest("/api/serve/applications/")
    except OSError:
        return False
    return True


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
