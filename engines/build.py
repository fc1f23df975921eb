"""Bundle -> TensorRT engines, on the machine that will run them: `python -m engines.build BUNDLE --backend tensorrt`.

Needs the backend; no torch, no onnx, no Triton. What export/build.py prepared is all it takes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engines.progress import print_log
from engines.trt.build import build_engines
from engines.trt.options import BACKENDS_WITH_ENGINES, add_arguments, engine_options
from plugins.command import run
from plugins.signals import interrupt_when_asked_to_end


def main(arguments: list[str] | None = None) -> int:
    """Entry of the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m engines.build", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="folder that export/build.py wrote")
    parser.add_argument("--backend", choices=BACKENDS_WITH_ENGINES, required=True)
    parser.add_argument("--default", action="store_true", help="the runtime opens these engines unless told otherwise")
    add_arguments(parser)
    given = vars(parser.parse_args(arguments))
    interrupt_when_asked_to_end()
    print_log()
    bundle, default, backend = given.pop("bundle"), given.pop("default"), given.pop("backend")

    def work() -> None:
        build_engines(bundle, engine_options(given, backend), make_default=default)
        print(f"{bundle} has engines for {backend}")

    return run(work, "interrupted; the bundle is as it was")


if __name__ == "__main__":
    sys.exit(main())
