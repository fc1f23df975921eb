"""The knobs of TensorRT engines: defaults, checks, command line."""

from __future__ import annotations

import re
import shlex
from argparse import BooleanOptionalAction
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.bundle.kinds import ONNXRUNTIME, TENSORRT, TENSORRT_RTX
from engines.bundle.rebuild import engine_words
from engines.checks import require_integer
from engines.errors import FlexError, OptionError
from engines.sizing.needs import MAX_BATCH
from engines.targets import TARGETS, target
from plugins.compiler.ptxas import SMS

BACKENDS_WITH_ENGINES = (TENSORRT, TENSORRT_RTX)
RTX_SMS = {80: "A100", 86: "RTX 30", 89: "RTX 40", 120: "RTX 50", 121: "DGX Spark"}
RTX_DEFAULT = (86, 89, 120)  # several in one engine cost almost nothing
KNOBS = ("plugins", "workspace", "optimization_level", "batch", "layers_per_engine", "timing_cache", "keep_log")
NONE = {"workspace": "TensorRT's own limit", "layers_per_engine": "one engine"}  # what None means, for people
MAX_LAYERS = 512


@dataclass(frozen=True)
class EngineOptions:
    """The knobs of TensorRT engines and their defaults; recorded in the manifest as used.

    plugins: the decoder runs this project's kernels; without, TensorRT's own. targets: SMs (86 is 8.6) to build for;
    None: RTX 30, 40 and 50, or with `tensorrt` the GPU of this machine, the only one it can build for. workspace: MiB
    of scratch memory an engine may use, None = TensorRT's limit. batch: rows of a step at most, one for each slot at
    run time. layers_per_engine: consecutive layers of the decoder that become an engine, None = all; the fewer, the
    less memory the builder takes. boards: of engines.targets, which the engines must fit.
    """

    backend: str
    plugins: bool = True
    targets: tuple[int, ...] | None = None
    workspace: int | None = None
    optimization_level: int = 3
    batch: int = 1
    layers_per_engine: int | None = None
    timing_cache: bool = True
    keep_log: bool = False
    boards: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS_WITH_ENGINES:
            raise OptionError(f"backend {self.backend!r}", expected=f"one of {', '.join(BACKENDS_WITH_ENGINES)}")
        for knob, low, high in (
            ("workspace", 1, 1 << 20),
            ("optimization_level", 0, 5),
            ("batch", 1, MAX_BATCH),
            ("layers_per_engine", 1, MAX_LAYERS),
        ):
            value, none = getattr(self, knob), NONE.get(knob)
            object.__setattr__(self, knob, require_integer(value, f"{knob} {value!r}", low, high, none=none))
        if self.targets is not None:
            targets = tuple(require_integer(sm, f"target {sm!r}", 1, 999) for sm in self.targets)
            object.__setattr__(self, "targets", targets)
            _check_targets(self.backend, targets)

    @property
    def sms(self) -> tuple[int, ...]:
        """The SMs to build for as far as options alone tell: none when it is up to the GPU of the machine."""
        return self.targets or (RTX_DEFAULT if self.backend == TENSORRT_RTX else ())


def parse_targets(text: str) -> tuple[int, ...]:
    """ "sm_86,sm_89" (or 86, or 8.6, or boards) -> (86, 89); boards of one SM count once. OptionError for the rest."""
    targets, boards = [], boards_of(text)
    for part in text.split(","):
        if part.strip() in boards:
            continue
        match = re.fullmatch(r"\s*(?:sm_?)?(\d{2,3}|(\d{1,2})\.(\d))\s*", part, re.IGNORECASE)
        if not match:
            known = f"a board: {', '.join(TARGETS)}; or compute capabilities with commas between: sm_86,sm_89"
            raise OptionError(f"unknown target {part.strip()!r}", expected=known)
        targets.append(int(match[1].replace(".", "")))
    return (*targets, *(sm for sm in dict.fromkeys(target(name).sm for name in boards) if sm not in targets))


def boards_of(text: str) -> tuple[str, ...]:
    """The boards among what --target names, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip() in TARGETS))


def backend_of(text: str | None) -> str:
    """The backend that --target asks for without --backend: of its first board, ONNX Runtime without a board."""
    boards = boards_of(text or "")
    return target(boards[0]).backend if boards else ONNXRUNTIME


def _check_targets(backend: str, targets: Sequence[int]) -> None:
    known = RTX_SMS if backend == TENSORRT_RTX else dict.fromkeys(SMS, "")
    exist = ", ".join(f"sm_{sm} {name}".rstrip() for sm, name in known.items())
    if not targets or len(set(targets)) < len(targets):
        raise OptionError(f"targets {', '.join(f'sm_{sm}' for sm in targets)}", expected=f"some of {exist}, each once")
    odd = [sm for sm in targets if sm not in known]
    if odd:
        on_board = backend == TENSORRT_RTX and odd[0] in SMS
        fix = "use --backend tensorrt, and build on the board itself: python -m engines.build BUNDLE --backend tensorrt"
        raise OptionError(
            f"target sm_{odd[0]}, which {backend} does not have",
            expected=f"some of {exist}",
            fix=fix if on_board else "correct --target",
        )


def command(bundle: Path | str, options: EngineOptions) -> str:
    """The command that builds these engines."""
    default = asdict(EngineOptions(options.backend))
    changed = {knob: value for knob, value in asdict(options).items() if value != default[knob]}
    if options.backend == TENSORRT:  # it builds for the machine it runs on, and no other
        changed |= {"targets": None}
    words = ["python -m engines.build", shlex.quote(str(bundle)), "--backend", options.backend]
    return " ".join(words + engine_words(changed))


def recorded(record: object, backend: str) -> EngineOptions:
    """The options that a manifest has recorded for a backend's engines; the defaults where it holds none, or none that
    these options can be."""
    given = {key: value for key, value in record.items() if key in KNOBS} if isinstance(record, dict) else {}
    targets = record.get("targets") if isinstance(record, dict) else None
    try:
        return EngineOptions(backend, targets=tuple(targets) if targets else None, **given)
    except (FlexError, TypeError):
        return EngineOptions(backend)


def add_arguments(parser: Any) -> None:
    """The knobs of EngineOptions, but for the backend, with their defaults."""
    default, add = EngineOptions(TENSORRT_RTX), parser.add_argument
    text = "the decoder runs this project's kernels; without, TensorRT's own"
    add("--plugins", action=BooleanOptionalAction, default=default.plugins, help=text)
    usual = ",".join(f"sm_{sm}" for sm in RTX_DEFAULT)
    text = (
        f"GPUs to build for, such as sm_86,sm_89, or boards, which the engines must then fit: {', '.join(TARGETS)}; "
        f"not given: tensorrt-rtx {usual}, tensorrt this machine's"
    )
    add("--target", metavar="NAMES", help=text)
    add("--workspace", type=int, metavar="MIB", help="scratch memory an engine may use; TensorRT's limit if not given")
    add("--optimization-level", type=int, default=default.optimization_level, help="0 (fast build) .. 5 (fast engine)")
    add(
        "--batch",
        type=int,
        default=default.batch,
        help="rows of a decode step, at most: what slots need at run time, one each",
    )
    add(
        "--layers-per-engine",
        type=int,
        metavar="N",
        help="build the decoder as engines of N consecutive layers, one after the other, in less memory; python -m "
        "engines.build that is cut short goes on where it was; one engine if not given",
    )
    add("--timing-cache", action=BooleanOptionalAction, default=default.timing_cache, help="reuse kernel timings")
    add("--keep-log", action="store_true", help="keep the builder's log beside the bundle though nothing failed")


def options_of(arguments: dict[str, Any], backend: str) -> EngineOptions | None:
    """Takes the arguments of `add_arguments` out of the parsed ones; None for a backend without engines.

    OptionError if one is given for such a backend: nothing is accepted and then ignored.
    """
    if backend in BACKENDS_WITH_ENGINES:
        return engine_options(arguments, backend)
    named = arguments.pop("target")
    knobs = {name: arguments.pop(name) for name in KNOBS}
    default = EngineOptions(TENSORRT_RTX)
    odd = [name for name in KNOBS if knobs[name] != getattr(default, name)] + (["target"] if named else [])
    if odd:
        raise OptionError(
            f"--{odd[0].replace('_', '-')} with --backend {backend}",
            fix=f"add --backend {' or '.join(BACKENDS_WITH_ENGINES)}",
        )
    return None


def engine_options(arguments: dict[str, Any], backend: str) -> EngineOptions:
    """The same for a backend that has engines, one of BACKENDS_WITH_ENGINES."""
    named = arguments.pop("target")
    knobs = {name: arguments.pop(name) for name in KNOBS}
    if named is None:
        return EngineOptions(backend, **knobs)
    return EngineOptions(backend, targets=parse_targets(str(named)), boards=boards_of(str(named)), **knobs)
