"""The knobs of a build: their defaults, the command line, and what a checkpoint makes of them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace
from pathlib import Path

from engines.bundle.geometry import Geometry
from engines.bundle.kinds import BACKENDS, ONNXRUNTIME
from engines.bundle.precision import BITS, BLOCKS, COLUMN, PRECISIONS, block_name
from engines.errors import OptionError
from engines.sizing.needs import Configuration, default_block
from engines.targets import LEAST_SM
from engines.trt.options import EngineOptions, add_arguments, backend_of, boards_of, options_of, parse_targets
from export.check import STEPS
from export.checkpoint.config import ModelConfig
from export.checkpoint.packed_settings import PRECISION, settled
from export.fit_report import require_one_board
from export.weights.quantize import Scheme, scheme_of

CHECKS = {
    "parity": "run the bundle beside the PyTorch reference",
    "weights": "compare the stored weights with the checkpoint, in little memory",
    "none": "do not check",
}
PROJECTIONS = {
    "eager": "all hi-res pages when the image is encoded",
    "lazy": "a page when a layer first selects it, so that short answers never pay for pages nobody looks at",
}
OWN = "a checkpoint that comes quantised (AWQ, GPTQ) brings its own"
KV = {
    "model": "in the dtype of activations",
    "int8": "in 8 bits, with a scale for each head of each hi-res token: half of float16, a quarter of float32",
}


@dataclass(frozen=True)
class BuildOptions:
    """The knobs of a build and their defaults; recorded in the manifest as used. `floats` is no knob: what a packed
    checkpoint does not pack, as `build` finds it."""

    model: Path = Path("checkpoints/default")
    out: Path | None = None  # None: build/<model>-<precision>
    precision: str | None = None  # None: PRECISION, or that of the integers of a packed checkpoint
    block_size: int | None = None  # int8, int4, fp8: weights that share a scale, or COLUMN; None: default, or packed
    quantize_head: bool = False  # int8, int4 and fp8 alone: lm_head, too
    calibrate: Path | None = None  # int8 and int4 alone: data to choose scales and clips by; None: round to nearest
    page_budget: int | None = None  # None: every page, the official behaviour
    context: int | None = None  # None: the checkpoint's
    projection: str = "eager"
    kv: str = "model"  # of hi-res pages; the cache of tokens stays as it is
    backend: str = ONNXRUNTIME
    check: str = "parity"
    plans: EngineOptions | None = None  # of the TensorRT engines; None: their defaults
    floats: tuple[str, ...] = ()  # int8 and int4 alone: weights of linear layers that are not quantised

    def __post_init__(self) -> None:
        for knob, known in (
            ("precision", (None, *PRECISIONS)),
            ("projection", PROJECTIONS),
            ("kv", KV),
            ("backend", BACKENDS),
            ("check", CHECKS),
        ):
            if getattr(self, knob) not in known:
                names = ", ".join(name for name in known if name)
                raise OptionError(f"{knob} {getattr(self, knob)!r}", expected=f"one of {names}")
        for knob in ("page_budget", "context"):
            value = getattr(self, knob)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise OptionError(f"{knob} {value!r}", expected="an integer, or None")
        precision = self.precision or PRECISION
        quantises = precision in BITS
        sizes = BLOCKS.get(precision, ())
        if isinstance(self.block_size, bool) or self.block_size not in (None, *sizes):
            known = {name: ", ".join(map(block_name, of)) for name, of in BLOCKS.items() if name in (precision, *BITS)}
            raise OptionError(
                f"block_size {self.block_size!r} with {precision}",
                expected="; ".join(f"{name}: {text}" for name, text in known.items()),
                fix=None if quantises else "add --int4 or --int8, or leave out --block-size",
            )
        if self.quantize_head and not quantises:
            raise OptionError(f"quantize_head with {precision}", fix="add --int4 or --int8, or leave it out")
        if self.calibrate is not None and not quantises:
            raise OptionError(f"calibrate with {precision}", fix="add --int4 or --int8, or leave out --calibrate")
        if self.calibrate is not None and (precision == "fp8" or self.block_size == COLUMN):
            raise OptionError(
                f"calibrate with {precision} and one scale for a column",
                expected="--int4 or --int8 in blocks: scales are searched for those",
                fix="leave out --calibrate",
            )
        if self.plans is not None and self.plans.backend != self.backend:
            raise OptionError(
                f"options of {self.plans.backend} engines for the backend {self.backend}",
                fix=f"add --backend {self.plans.backend}, or leave them out",
            )

        if self.projection == "lazy" and self.plans is not None and not self.plans.plugins:
            raise OptionError(
                "--projection lazy with --no-plugins: TensorRT alone cannot tell which pages are new",
                fix="--projection eager, or leave out --no-plugins",
            )

    @property
    def scheme(self) -> Scheme | None:
        """How weights are quantised, if they are."""
        block = default_block(self.precision) if self.block_size is None else self.block_size
        return scheme_of(self.precision, block, self.quantize_head, self.floats)

    @property
    def engines(self) -> EngineOptions | None:
        """The TensorRT engines to build, if any."""
        return None if self.backend == ONNXRUNTIME else self.plans or EngineOptions(self.backend)

    @property
    def folder(self) -> Path:
        """Where the bundle goes."""
        return self.out or Path("build") / f"{self.model.resolve().name}-{self.precision or PRECISION}"


@dataclass(frozen=True)
class SizingRequest:
    """A plan that is asked for instead of a build. batch: rows of a request; ONNX Runtime's builds know no limit."""

    options: BuildOptions = field(default_factory=BuildOptions)
    batch: int = 1


def settled_options(options: BuildOptions, config: ModelConfig) -> BuildOptions:
    """The options with what a packed checkpoint decides; OptionError when they ask for something else."""
    if options.calibrate is not None and config.packing is not None:
        raise OptionError(
            f"--calibrate for a checkpoint that is quantised already ({config.packing.text})", fix="leave it out"
        )
    asked = {knob: getattr(options, knob) for knob in ("precision", "block_size", "quantize_head")}
    return replace(options, **settled(config.packing, config.geometry, **asked))


def adjusted(config: ModelConfig, options: BuildOptions) -> Geometry:
    """The checkpoint's geometry with what the options change; OptionError for what this model does not admit."""
    g = config.geometry
    if options.page_budget is not None and not 0 <= options.page_budget <= g.pages:
        raise OptionError(f"--page-budget {options.page_budget}", expected=f"0 .. {g.pages}, this model's pages")
    context = g.context if options.context is None else options.context
    least = g.image_tokens + 2 * STEPS  # room for a question and an answer
    if not least <= context <= g.context:
        raise OptionError(f"a context of {context} tokens", expected=f"{least} .. {g.context} for this model")
    lazy = options.projection == "lazy"
    if lazy and g.attention_bias:
        raise OptionError("--projection lazy for a model with attention biases", fix="--projection eager")
    return replace(g, context=context, lazy_pages=lazy, int8_pages=options.kv == "int8")


def configuration(options: BuildOptions, g: Geometry) -> Configuration:
    """What a build is planned as; `g` as the options adjust it."""
    engines = options.engines
    return Configuration(
        g,
        options.precision,
        block=options.scheme.block if options.scheme else None,
        head=options.quantize_head,
        batch=engines.batch if engines else 1,
        page_budget=options.page_budget,
        backend=options.backend,
        plugins=engines.plugins if engines else True,
        floats=options.floats,
    )


def parse_arguments(arguments: list[str] | None = None) -> BuildOptions | SizingRequest:
    """Command line -> options, of a plan if --plan is among them; --help shows every default."""
    default = BuildOptions()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=default.model, help="checkpoint folder in the official layout")
    add("--out", type=Path, help="bundle folder to write; build/<model>-<precision> when not given")
    group = parser.add_mutually_exclusive_group()
    for name in PRECISIONS:
        weights = f"{name} weights of the decoder's linear layers, {PRECISIONS[name]} others"
        text = weights if name in BITS else f"{PRECISIONS[name]} weights"
        text += " and activations" + (f" (the default); {OWN}" if name == PRECISION else "")
        text += f"; TensorRT engines for SM {LEAST_SM[name] / 10} and newer" if name in LEAST_SM else ""
        group.add_argument(
            f"--{name}", dest="precision", action="store_const", const=name, help=text, default=argparse.SUPPRESS
        )
    add(
        "--block-size",
        type=_block_size,
        metavar="SIZE",
        help="weights that share a scale: "
        + "; ".join(
            f"--{name}: {', '.join(map(block_name, sizes))} ({block_name(default_block(name))} when not given)"
            for name, sizes in BLOCKS.items()
        )
        + f"; {OWN}",
    )
    add("--quantize-head", action="store_true", help=f"with --{', --'.join(BITS)}: lm_head, too")
    add(
        "--calibrate",
        type=Path,
        metavar="DATA",
        help="with --int8 and --int4 in blocks: choose scales and clips (AWQ) by what these questions make the layers "
        "read: a file as examples/examples.json, or its folder; rounded to nearest when not given",
    )
    add("--page-budget", type=int, help="pages each layer may read at most; every page when not given")
    add("--context", type=int, help="longest sequence in tokens; the checkpoint's when not given")
    add(
        "--projection",
        choices=PROJECTIONS,
        default=default.projection,
        help="of hi-res pages; " + "; ".join(f"{key}: {text}" for key, text in PROJECTIONS.items()),
    )
    add(
        "--kv",
        choices=KV,
        default=default.kv,
        help="how keys and values of hi-res pages are kept; " + "; ".join(f"{key}: {text}" for key, text in KV.items()),
    )
    add("--backend", choices=BACKENDS, help=f"not given: the one of the board in --target, else {default.backend}")
    text = "print what a build and a request need, and whether the board in --target (else this machine) has it"
    add("--plan", action="store_true", help=f"{text}; config.json is enough; exit status 1 when it does not fit")
    add(
        "--check",
        choices=CHECKS,
        default=default.check,
        help="; ".join(f"{key}: {text}" for key, text in CHECKS.items()),
    )
    add_arguments(parser.add_argument_group("TensorRT engines"))
    given = vars(parser.parse_args(arguments))
    planning, batch = given.pop("plan"), given["batch"]
    named = given["target"]
    if named is not None:
        parse_targets(named)  # an unknown name is told first
        if planning:
            require_one_board(boards_of(named))
    given["backend"] = backend = given["backend"] or backend_of(named)
    if planning and backend == ONNXRUNTIME:
        given["batch"] = EngineOptions.batch  # of a build there it would be an error
    plans = options_of(given, backend)
    options = BuildOptions(**given, plans=plans)
    return SizingRequest(options, batch) if planning else options


def _block_size(text: str) -> int:
    return COLUMN if text == block_name(COLUMN) else int(text)
