"""The knobs of a build: their defaults, and the command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from engines.backend import Opening
from engines.bundle.kinds import BACKENDS, ONNXRUNTIME, PLUGINS_ALONE
from engines.bundle.manifest import Manifest
from engines.bundle.precision import COLUMN, DEFAULT, PRECISIONS, Precision, block_name, precision_named
from engines.bundle.tensors import APART, MODEL, can_be_coded, sizes_of_blocks
from engines.checks import is_integer, require_integer
from engines.errors import OptionError
from engines.residency import RESIDENCIES
from engines.trt.options import EngineOptions, add_arguments, backend_of, boards_of, options_of, parse_targets
from export.fit_report import require_one_board

QUANTISING = [each for each in PRECISIONS.values() if each.quantises]

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
KV = {  # of hi-res pages, and of the cache of ordinary tokens
    "model": "in the dtype of activations",
    "int8": "in 8 bits, with a scale for each head of each token: half of float16, a quarter of float32",
}
HELP_OF_APART = {  # by the options of APART
    "head": "lm_head: in the dtype of activations, in 8 bits with a scale for each token, or in 4 bits in blocks; "
    "of as many bits as the linear layers, in their blocks",
    "vision": "linear layers of vision tower and projector: in the dtype of activations, in 8 bits with a scale for "
    "each output, or in 4 bits in blocks",
    "embeddings": "the table of tokens: in the dtype of activations, or in 8 bits with a scale for each token, of "
    "which only what is read is unpacked (TensorRT has no such gather)",
}


@dataclass(frozen=True)
class BuildOptions:
    """The knobs of a build as they were given, and their defaults. OptionError for what no checkpoint admits."""

    model: Path = Path("checkpoints/default")
    out: Path | None = None  # None: build/<model>-<precision>
    precision: str | None = None  # a key of PRECISIONS; None: DEFAULT, or that of the integers of a packed checkpoint
    block_size: int | None = None  # int8, int4, fp8: weights that share a scale, or COLUMN; None: default, or packed
    quantize_head: bool = False  # int8, int4 and fp8 alone: lm_head, too, as the linear layers are
    head: str = MODEL  # lm_head: one of APART["head"]
    vision: str = MODEL  # linear layers of the vision tower and the projector
    embeddings: str = MODEL
    calibrate: Path | None = None  # int8 and int4 alone: data to choose scales and clips by; None: round to nearest
    page_budget: int | None = None  # None: every page, the official behaviour
    context: int | None = None  # None: the checkpoint's
    projection: str = "eager"
    page_slots: int | None = None  # pages of a layer that are kept, projected lazily; None: all
    kv: str = "model"  # of hi-res pages
    kv_cache: str = "model"  # of ordinary tokens
    backend: str = ONNXRUNTIME
    residency: str = Manifest.residency  # that the bundle opens with, unless it is told otherwise
    check: str = "parity"
    engines: EngineOptions | None = None  # of TensorRT; None: their defaults
    fit: bool = False  # what is left at its default is chosen so that it fits the board, or this machine

    def __post_init__(self) -> None:
        precision = DEFAULT if self.precision is None else precision_named(self.precision)
        for knob, known in (
            *APART.items(),
            ("projection", PROJECTIONS),
            ("kv", KV),
            ("kv_cache", KV),
            ("backend", BACKENDS),
            ("residency", RESIDENCIES),
            ("check", CHECKS),
        ):
            if getattr(self, knob) not in known:
                raise OptionError(f"{knob} {getattr(self, knob)!r}", expected=f"one of {', '.join(known)}")
        knobs = ("page_budget", "every page"), ("context", "the checkpoint's"), ("page_slots", "all pages")
        for knob, none in knobs:
            require_integer(getattr(self, knob), f"{knob} {getattr(self, knob)!r}", none=none)
        if self.page_slots is not None and self.projection != "lazy":
            raise OptionError(
                f"page_slots {self.page_slots} with projection {self.projection}, which projects all pages at once",
                fix="add --projection lazy, or leave out --page-slots",
            )
        size = self.block_size
        sizes = sizes_of_blocks(precision, self.head, self.vision)
        if size is not None and not (is_integer(size) and size in sizes):
            having = [f"--{each}" for each in QUANTISING if size in each.block_sizes]
            raise OptionError(
                f"block_size {block_name(size) if is_integer(size) else repr(size)} with {precision}",
                expected="; ".join(f"{each}: {_sizes(each)}" for each in QUANTISING),
                fix=f"{' or '.join(having)}, or leave out --block-size" if having else "leave out --block-size",
            )
        if self.quantize_head and not precision.quantises:
            raise OptionError(f"quantize_head with {precision}", fix="add --int4 or --int8, or leave it out")
        if self.quantize_head and self.head != MODEL:
            raise OptionError(f"quantize_head with head {self.head!r}", fix="leave out one of them")
        for knob in APART:
            value, takes = getattr(self, knob), [each for each in PRECISIONS.values() if can_be_coded(knob, each)]
            if value != MODEL and precision not in takes:
                raise OptionError(
                    f"{knob} {value} with {precision}",
                    expected=f"one of {', '.join(map(str, takes))}",
                    fix=f"add --{takes[0]} in place of --{precision}, or leave out --{knob}",
                )
        if self.calibrate is not None and not precision.quantises:
            raise OptionError(f"calibrate with {precision}", fix="add --int4 or --int8, or leave out --calibrate")
        if self.calibrate is not None and not precision.calibrates(precision.block_size(size, self.backend)):
            raise OptionError(
                f"calibrate with {precision} and one scale for a column",
                expected="--int4 or --int8 in blocks: scales are searched for those",
                fix="leave out --calibrate",
            )
        if self.engines is not None and self.engines.backend != self.backend:
            raise OptionError(
                f"options of {self.engines.backend} engines for the backend {self.backend}",
                fix=f"add --backend {self.engines.backend}, or leave them out",
            )
        if self.engines is not None and not self.engines.plugins:
            asked = {"lazy_pages": self.projection == "lazy", "int8_cache": self.kv_cache == "int8"}
            for choice, (option, why) in PLUGINS_ALONE.items():
                if asked[choice]:
                    raise OptionError(
                        f"{option} with --no-plugins: TensorRT alone {why}", fix=f"leave out {option}, or --no-plugins"
                    )


@dataclass(frozen=True)
class SizingRequest:
    """What --plan asks instead of a build. batch: rows of a request; ONNX Runtime's builds know no limit. slots: of
    engines.backend.Opening, when the bundle runs."""

    options: BuildOptions = field(default_factory=BuildOptions)
    batch: int = 1
    slots: int = Opening.slots


def parse_arguments(arguments: list[str] | None = None) -> BuildOptions | SizingRequest:
    """Command line -> options of a build, or with --plan a request for its sizes; --help shows every default."""
    default = BuildOptions()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=default.model, help="checkpoint folder in the official layout")
    add("--out", type=Path, help="bundle folder to write; build/<model>-<precision> when not given")
    group = parser.add_mutually_exclusive_group()
    for name, each in PRECISIONS.items():
        weights = f"{name} weights of the decoder's linear layers, {each.dtype} others"
        text = weights if each.quantises else f"{each.dtype} weights"
        text += " and activations" + (f" (the default); {OWN}" if each == DEFAULT else "")
        text += f"; TensorRT engines for SM {each.least_sm / 10} and newer" if each.least_sm else ""
        group.add_argument(
            f"--{name}", dest="precision", action="store_const", const=name, help=text, default=argparse.SUPPRESS
        )
    add(
        "--block-size",
        type=block_size,
        metavar="SIZE",
        help="weights that share a scale: "
        + "; ".join(f"--{each}: {_sizes(each)} ({_default_sizes(each)} when not given)" for each in QUANTISING)
        + f"; {OWN}",
    )
    text = f"with --{', --'.join(map(str, QUANTISING))}: lm_head as the linear layers"
    add("--quantize-head", action="store_true", help=text)
    for knob, what in HELP_OF_APART.items():
        add(f"--{knob}", choices=APART[knob], default=getattr(default, knob), help=what)
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
        "--page-slots",
        type=int,
        metavar="K",
        help="with --projection lazy: room for K pages in each layer, where the one selected longest ago makes room; a "
        "step that selects more is an error, one with a page budget of K selects no more; all pages when not given",
    )
    add(
        "--kv",
        choices=KV,
        default=default.kv,
        help="how keys and values of hi-res pages are kept, and of nothing else; "
        + "; ".join(f"{key}: {text}" for key, text in KV.items()),
    )
    add(
        "--kv-cache",
        choices=KV,
        default=default.kv_cache,
        help="the same of ordinary tokens, which are the low-res image, questions and answers: the cache of a request",
    )
    add("--backend", choices=BACKENDS, help=f"not given: the one of the board in --target, else {default.backend}")
    text = "print what a build and a request need, and whether the board in --target (else this machine) has it"
    add("--plan", action="store_true", help=f"{text}; config.json is enough; exit status 1 when it does not fit")
    text = "choose what is left at its default so that the board in --target (else this machine) holds it; with --plan "
    add("--fit", action="store_true", help=text + "say what each choice gives and costs, else build it")
    text = "with --plan: requests that share decode steps (an option of the runtime), each about an image of its own; "
    add(
        "--slots",
        type=int,
        default=SizingRequest.slots,
        help=text + "TensorRT engines for N slots are built by --batch N",
    )
    add(
        "--residency",
        choices=RESIDENCIES,
        default=default.residency,
        help="how the bundle opens when whoever runs it does not say: what encodes images is in memory all = always, "
        "shared = while it does",
    )
    add(
        "--check",
        choices=CHECKS,
        default=default.check,
        help="; ".join(f"{key}: {text}" for key, text in CHECKS.items()),
    )
    add_arguments(parser.add_argument_group("TensorRT engines"))
    given = vars(parser.parse_args(arguments))
    sizing, batch, slots = given.pop("plan"), given["batch"], given.pop("slots")
    if slots != SizingRequest.slots and not sizing:
        raise OptionError(
            f"--slots {slots} without --plan",
            expected="--slots where memory is asked about: slots are opened when a bundle runs",
            fix=f"leave it out; engines of TensorRT have {slots} slots when they are built with --batch {slots}",
        )
    named = given["target"]
    if named is not None:
        parse_targets(named)  # an unknown name is told first
        if sizing or given["fit"]:
            require_one_board(boards_of(named), "--plan" if sizing else "--fit")
    given["backend"] = backend = given["backend"] or backend_of(named)
    if sizing and backend == ONNXRUNTIME:
        given["batch"] = EngineOptions.batch  # of a build there it would be an error
    engines = options_of(given, backend)
    options = BuildOptions(**given, engines=engines)
    return SizingRequest(options, batch, slots) if sizing else options


def _sizes(precision: Precision) -> str:
    return ", ".join(map(block_name, precision.block_sizes))


def _default_sizes(precision: Precision) -> str:
    sizes = [block_name(precision.block_size())]
    sizes += [f"{block_name(COLUMN)}, and no other, with {backend}" for backend in precision.columns_alone]
    return "; ".join(sizes)


def block_size(text: str) -> int:
    """A block size as the command line has it. ValueError, which argparse tells, for other words."""
    return COLUMN if text == block_name(COLUMN) else int(text)
