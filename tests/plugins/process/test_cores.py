"""How many cores a process may use: affinity, and the quotas of control groups of both versions."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from plugins import cores
from plugins.cores import usable_cores
from tests.geometries import tiny
from tests.paths import ROOT


@pytest.fixture
def of_64(monkeypatch, tmp_path):
    """of_64(files) -> the cores that a process sees on a machine of 64 whose file system has these files."""
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda process: set(range(64)))

    def count(files: dict[str, str]) -> int:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return usable_cores(tmp_path)

    return count


V2, V1 = "proc/self/cgroup", "11:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64),
        ({V2: "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
        ({V2: "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({V2: "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),  # rounded up
        ({V2: "0::/\n", "sys/fs/cgroup/cpu.max": "5000 100000\n"}, 1),  # a twentieth of a core is one
        ({V2: "0::/\n", "sys/fs/cgroup/cpu.max": "9900000 100000\n"}, 64),  # more time than there are cores
        ({V2: "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000", "sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3),
        ({V2: "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "1 1", "sys/fs/cgroup/a/cpu.max": "300000 100000"}, 1),
        ({V2: "0::/host/path\n", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4),  # a container without its own view
        ({V2: "0::/../../x\n", "sys/fs/cgroup/x/cpu.max": "500000 100000", "x/cpu.max": "100000 100000"}, 5),
        ({V2: "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense"}, 64),
        ({V2: "0::/\n", "sys/fs/cgroup/cpu.max": "100000 0"}, 64),
        ({V2: "\n:::\nx\n"}, 64),
        (
            {
                V2: V1,
                "sys/fs/cgroup/cpu,cpuacct/docker/ab/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/ab/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                V2: V1,
                "sys/fs/cgroup/cpu,cpuacct/docker/ab/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/ab/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "700000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            7,
        ),
    ],
)
def test_quotas(of_64, files, expected):
    assert of_64(files) == expected


def test_affinity_counts_too(monkeypatch, tmp_path):
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda process: {3})
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / V2).write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("800000 100000")
    assert usable_cores(tmp_path) == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_a_process_on_one_core_starts_no_threads(random_model):
    """What is counted is what ONNX Runtime starts."""
    _, bundle = random_model("tiny", tiny())
    program = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        f"from runtime import Engine; engine = Engine({str(bundle)!r})\n"
        "print(len(os.listdir('/proc/self/task')))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.stdout.strip() == "1", run.stdout + run.stderr
