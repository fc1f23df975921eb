"""The command line: `bash scripts/gpu.sh`, which is `python -m tests.on_gpu`."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from engines.errors import BackendError, OptionError
from plugins.command import run
from plugins.signals import interrupt_when_asked_to_end
from tests.on_gpu.machine import look_from_outside
from tests.on_gpu.report import run_all
from tests.on_gpu.steps import STEPS
from tests.paths import ROOT

MINUTES = 8.0
OUT = ROOT / "build" / "gpu"


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser("scripts/gpu.sh", description="Everything a GPU can prove, in a few minutes.")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all steps together, default {MINUTES:g}")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the report, default build/gpu")
    names = ",".join(step.name for step in STEPS)
    parser.add_argument("--only", metavar="STEP,...", default=names, help=f"some of {names}")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU: shows that every step starts")
    parser.add_argument("--pack", type=Path, metavar="ARCHIVE", help="write what to carry to a machine with a GPU")
    here = ".".join(platform.python_version_tuple()[:2])
    parser.add_argument("--python", default=here, help=f"--pack: of that machine, default {here}")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Entry of the command line; returns the exit status: 1 when any step failed, or there is no GPU."""
    options = parse(given)

    def work() -> int:
        interrupt_when_asked_to_end()
        if options.pack:
            from tests.on_gpu.pack import pack  # it builds bundles, which the others need not know how to

            print(pack(options.pack, options.python, lambda text: print(text, flush=True)))
            return 0
        chosen = options.only.split(",")
        if unknown := set(chosen) - {step.name for step in STEPS}:
            raise OptionError(
                f"--only {','.join(sorted(unknown))}", expected=f"some of {','.join(step.name for step in STEPS)}"
            )
        machine = look_from_outside()
        if machine.gpu is None and not options.dry_run:
            raise BackendError(f"no GPU: {machine.why}", expected="an NVIDIA GPU", fix="--dry-run shows the steps")
        report = run_all(
            [step for step in STEPS if step.name in chosen],
            machine,
            options.out.resolve(),
            minutes=options.minutes,
            dry=options.dry_run,
            say=lambda text: print(text, flush=True),
        )
        print(f"{options.out / 'gpu-report.md'}")
        return int(report.failed)

    return run(work, "interrupted; the report holds what was done so far")


if __name__ == "__main__":
    sys.exit(main())
