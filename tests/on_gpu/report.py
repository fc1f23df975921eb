"""Steps run one after the other, each in its time, and the report of them, which is whole after every step."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic

from tests.on_gpu.machine import Machine
from tests.on_gpu.steps import Step, arguments
from tests.paths import ROOT

PASSED, FAILED, LATE, SKIPPED, WAITS, RUNS = "passed", "FAILED", "OUT OF TIME", "skipped", "not reached", "running"
BAD = (FAILED, LATE)
LEAST = 5.0  # seconds: with less there is no use in starting a step
TAIL = 40  # lines of a failure that go into the report


@dataclass
class Result:
    """What became of a step. seconds: it ran. summary: in one line. shown: what goes into the report as it is."""

    name: str
    title: str
    status: str = WAITS
    seconds: float = 0.0
    summary: str = ""
    shown: str = ""


class Report:
    """gpu-report.md and gpu-report.json in the folder `out`, beside them NAME.out and NAME.err of every step."""

    def __init__(self, out: Path, machine: Machine, steps: Sequence[Step], dry: bool) -> None:
        self.out, self.machine, self.dry = out, machine, dry
        self.results = [Result(step.name, step.title) for step in steps]
        out.mkdir(parents=True, exist_ok=True)
        self.write()

    @property
    def failed(self) -> bool:
        """Whether any step failed, or took longer than it may."""
        return any(result.status in BAD for result in self.results)

    def write(self) -> None:
        """Both files, each whole or as it was."""
        record = {"dry_run": self.dry, "machine": asdict(self.machine), "steps": [asdict(r) for r in self.results]}
        for name, text in (("gpu-report.json", json.dumps(record, indent=1)), ("gpu-report.md", self.markdown())):
            part = self.out / f".{name}.part"
            part.write_text(text + "\n")
            part.replace(self.out / name)

    def markdown(self) -> str:
        """The report for people."""
        m = self.machine
        place = f"{m.gpu}, compute capability {m.sm / 10:.1f}" if m.gpu and m.sm else f"No GPU: {m.why}"
        versions = ", ".join(f"{name} {version}" for name, version in m.versions.items())
        lines = ["# What a GPU has shown", "", f"{place}. {versions}."]
        if self.dry:
            lines += ["", "**A dry run: that every step starts. No figure below is one of a GPU.**"]
        lines += ["", "| step | | seconds | |", "| --- | --- | ---: | --- |"]
        for r in self.results:
            lines.append(f"| {r.title} | {r.status} | {r.seconds:.0f} | {r.summary.replace('|', '/')} |")
        for r in self.results:
            if r.shown:
                lines += ["", f"## {r.title}", "", r.shown]
        return "\n".join(lines)


def run_all(
    steps: Sequence[Step],
    machine: Machine,
    out: Path,
    *,
    minutes: float,
    dry: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run every step that this machine can, in order; a failure stops none of the others. When the `minutes` are over
    those that are left are not started, and the one that runs is ended. `say` is told what happens."""
    end, report = monotonic() + 60 * minutes, Report(out, machine, steps, dry)
    for step, result in zip(steps, report.results, strict=True):
        left = end - monotonic()
        if why := step.missing(machine):
            result.status, result.summary = SKIPPED, why
        elif left >= LEAST:
            result.status = RUNS
            report.write()
            say(f"{step.title} ...")
            try:
                _run(step, result, report, min(step.limit, left))
            except KeyboardInterrupt:
                result.status, result.summary = WAITS, "interrupted"
                raise
            finally:
                report.write()
        report.write()
        say(f"{result.status:12} {result.seconds:4.0f} s  {step.title}{': ' if result.summary else ''}{result.summary}")
    return report


def _run(step: Step, result: Result, report: Report, limit: float) -> None:
    """One step, within `limit` seconds."""
    out = report.out
    command = [*step.prefix(report.machine), sys.executable, *arguments(step, out, report.dry)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # they start sooner
    started = monotonic()
    with (out / f"{step.name}.out").open("w") as stdout, (out / f"{step.name}.err").open("w") as stderr:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr, start_new_session=True
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    result.seconds = monotonic() - started
    printed, complaints = ((out / f"{step.name}.{end}").read_text(errors="replace").strip() for end in ("out", "err"))
    if status == 0:
        result.status = SKIPPED if _nothing_ran(printed) else PASSED
        result.summary = "" if step.table else summary(printed)
        result.shown = printed if step.table else ""
        return
    result.status = LATE if status is None else FAILED
    result.summary = f"after {limit:.0f} s" if status is None else f"status {status}, {summary(complaints or printed)}"
    tail = "\n".join([*printed.splitlines()[-TAIL:], *complaints.splitlines()[-TAIL:]])
    result.shown = f"````\n{tail}\n````" if tail else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """A process and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def summary(printed: str) -> str:
    """The last line, and with it what pytest says it has skipped."""
    lines = printed.splitlines()
    skipped = [line for line in lines if line.startswith("skipped: ")]
    return "; ".join(dict.fromkeys([*lines[-1:], *skipped[-1:]])).strip("= ")


def _nothing_ran(printed: str) -> bool:
    """Whether pytest says that it has skipped whatever there was."""
    last = printed.splitlines()[-1:]
    return bool(last and re.search(r"\d+ skipped", last[0]) and not re.search(r"\d+ passed", last[0]))
