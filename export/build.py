"""Checkpoint -> bundle: `python export/build.py --model CHECKPOINT --fp16`."""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter

if __package__ in (None, ""):  # run as a script: the packages lie beside this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import onnx_ir as ir
import onnxruntime
import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from engines.bind import for_onnxruntime, for_plugin_free
from engines.bundle import Bundle, BundleWriter, write_bundle
from engines.errors import CheckpointError, ExportError, FlexError, OptionError
from engines.fit import assess, require_boards, require_sms
from engines.geometry import Geometry
from engines.manifest import (
    BACKENDS,
    BITS,
    BLOCKS,
    COLUMN,
    FORMAT,
    ONNXRUNTIME,
    PARTS,
    PLUGIN_FREE,
    PRECISIONS,
    TRACED,
    Graph,
    Manifest,
    Part,
    Prompt,
    block_name,
    graph_io,
    kinds,
)
from engines.memory import available_bytes, peak_rss
from engines.plan import Configuration, cache_bytes, default_block, size, store_bytes, weight_bytes
from engines.targets import LEAST_SM
from engines.trt_build import attributes, build_plans, elsewhere
from engines.trt_options import (
    PlanOptions,
    add_arguments,
    backend_of,
    boards_of,
    command,
    options_of,
    parse_targets,
)
from export.calibrate import Calibration, calibrate_on
from export.check import STEPS, Stage, parity
from export.checkpoint import Checkpoint, dropped_tensors, expected_tensors
from export.config import ModelConfig, read_config
from export.folding import to_bytes
from export.memory import parity_bytes
from export.packed import PackedCheckpoint, floats_of, open_checkpoint, summary
from export.packing import PRECISION, settled
from export.plan import report, require_one_board, room_for
from export.quantize import Scheme, Source, quantised_tensors, require_blocks, rewrite, scheme_of
from export.stored import stored_weights
from export.tokenizer import convert_tokenizer
from export.trace import trace
from export.weights import stored_bytes, write_weights
from plugins.artifacts import KernelError
from plugins.compile import SMS, compile_kernels
from plugins.registry import kernels_of_model

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
KERNELS = "kernels.zip"
SCALES = "scales.npz"


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
    plans: PlanOptions | None = None  # of the TensorRT engines; None: their defaults
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
    def engines(self) -> PlanOptions | None:
        """The TensorRT engines to build, if any."""
        return None if self.backend == ONNXRUNTIME else self.plans or PlanOptions(self.backend)

    @property
    def folder(self) -> Path:
        """Where the bundle goes."""
        return self.out or Path("build") / f"{self.model.resolve().name}-{self.precision or PRECISION}"


@dataclass(frozen=True)
class Planning:
    """A plan that is asked for instead of a build. batch: rows of a request; ONNX Runtime's builds know no limit."""

    options: BuildOptions = field(default_factory=BuildOptions)
    batch: int = 1


def build(options: BuildOptions, console: Console | None = None) -> Bundle:
    """Make a bundle and check it; nothing is left at `options.folder` unless the check passed.

    Raises a FlexError: CheckpointError, ConfigError, TokenizerError, ExportError, ParityError, BackendError or
    OptionError.
    """
    console = console or Console(quiet=True)
    started = perf_counter()
    _require_checkpoint(options)
    config = read_config(options.model)
    config = replace(config, geometry=_adjusted(config, options))
    g, versions = config.geometry, _versions()
    options = _settled(options, config)
    if options.scheme and config.packing is None:  # packed ones are checked against their own groups
        require_blocks(g, options.scheme)
    budget = g.pages if options.page_budget is None else options.page_budget
    engines = options.engines
    asked = replace(_configuration(options, g), fixed=config.packing is not None)
    warnings = require_boards(asked, engines.boards) + require_sms(asked, engines.sms) if engines else ()
    for warning in warnings:
        console.print(f"[yellow]{warning}[/]", soft_wrap=True)
    checkpoint = open_checkpoint(options.model, config)
    checkpoint.require(expected_tensors(g))
    if isinstance(checkpoint, PackedCheckpoint):
        options = replace(options, floats=floats_of(checkpoint, config))
    dropped = dropped_tensors(checkpoint, g)
    _print_plan(console, options, config, checkpoint, dropped)
    _require_memory(options, config)
    not_here = elsewhere(engines) if engines else None
    source, calibration = checkpoint, None
    if options.calibrate is not None:
        calibration = calibrate_on(options.calibrate, options.model, config, checkpoint, options.scheme, console)
        source = calibration.folded(checkpoint, g)

    with write_bundle(options.folder) as writer:
        kernels = _write_kernels(engines, g, options.precision, writer, console) if engines else None
        parts = {part: _write_part(part, g, source, options, writer, console, calibration) for part in PARTS}
        if calibration:
            writer.write(SCALES, iter([to_bytes(calibration.scales)]))
        tokenizer = convert_tokenizer(options.model, writer.folder)
        if tokenizer is not None:
            writer.add(tokenizer.file)
        prompt = Prompt(
            config.prompt_template,
            tokenizer.file if tokenizer else None,
            tokenizer.bos_id if tokenizer else config.bos_token_id,
            config.eos_token_ids or (tokenizer.eos_ids if tokenizer else ()),
        )
        writer.finish(
            Manifest(
                format=FORMAT,
                name=options.folder.resolve().name,
                precision=options.precision,
                page_budget=budget,
                geometry=g,
                prompt=prompt,
                parts=parts,
                backend=options.backend,
                kernels=kernels,
                files=writer.files,
                versions=versions,
                source=checkpoint.identity(),
                options=_as_used(options, budget, g.context, calibration),
                dropped=dropped,
                scales=SCALES if calibration else None,
                block_size=options.scheme.block if options.scheme else None,
            )
        )
        _check(options, Bundle(writer.folder, verify=False), checkpoint, console)
        if engines and not not_here:
            build_plans(writer.folder, engines, name=options.folder, quiet=console.quiet)
    if engines and not_here:
        console.print(f"[yellow]no engines yet[/]: {not_here}", soft_wrap=True)
        console.print(f"copy {options.folder} to the board and run there: {command('BUNDLE', engines)}", soft_wrap=True)
    console.print(
        f"[bold]{options.folder}[/] is ready: {perf_counter() - started:.0f} s, peak memory {peak_rss() / 1e9:.2f} GB"
    )
    return Bundle(options.folder, verify=False)


def plan(asked: Planning, console: Console | None = None) -> bool:
    """Print what a build and a request would need; whether it fits. Reads nothing but the checkpoint's configuration.

    Raises a FlexError: ConfigError, OptionError, or BackendError when the memory to fit into cannot be told.
    """
    options = asked.options
    _require_checkpoint(options)
    config = read_config(options.model)
    g = _adjusted(config, options)
    options = _settled(options, replace(config, geometry=g))
    c = replace(_configuration(options, g), batch=asked.batch, fixed=config.packing is not None)
    assessment = assess(c, room_for(options.backend, options.engines))
    report(assessment, options.model.resolve().name, console or Console(quiet=True))
    return assessment.fits


def _require_checkpoint(options: BuildOptions) -> None:
    if not options.model.is_dir():
        raise CheckpointError(
            f"no checkpoint folder {options.model}",
            expected="a folder with config.json and weights in the official layout",
            fix="name one with --model, or run this in the project's folder, where the default model lies",
        )


def _settled(options: BuildOptions, config: ModelConfig) -> BuildOptions:
    """The options with what a packed checkpoint decides; OptionError when they ask for something else."""
    if options.calibrate is not None and config.packing is not None:
        raise OptionError(
            f"--calibrate for a checkpoint that is quantised already ({config.packing.text})", fix="leave it out"
        )
    asked = {knob: getattr(options, knob) for knob in ("precision", "block_size", "quantize_head")}
    return replace(options, **settled(config.packing, config.geometry, **asked))


def _adjusted(config: ModelConfig, options: BuildOptions) -> Geometry:
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


def _require_memory(options: BuildOptions, config: ModelConfig) -> None:
    calibrated = options.calibrate is not None
    needed = parity_bytes(config.geometry, options.precision, options.scheme, calibrated)
    available = available_bytes()
    if options.check == "parity" and needed > available:
        raise OptionError(
            f"the parity check needs {needed / 1e9:.1f} GB of memory, this machine has {available / 1e9:.1f} GB free",
            fix="add --check weights: compares every stored tensor with the checkpoint instead, in under 1 GB",
        )


def _write_part(
    part: str,
    g: Geometry,
    checkpoint: Source,
    options: BuildOptions,
    writer: BundleWriter,
    console: Console,
    calibration: Calibration | None,
) -> Part:
    precision, scheme, weights = options.precision, options.scheme, f"{part}.weights"
    dtype = getattr(torch, PRECISIONS[precision])
    with console.status(f"{part}: tracing"):
        model = trace(part, g, dtype)
    if scheme:
        rewrite(model, quantised_tensors(g, scheme), scheme)
    with _progress(part, stored_bytes(model), console) as advance:
        write_weights(
            model, checkpoint, dtype, writer, weights, advance, scheme, calibration.clips if calibration else None
        )
    traced, graphs = writer.folder / f"{part}.onnx", {}
    ir.save(model, traced)
    bind = {
        ONNXRUNTIME: lambda model: for_onnxruntime(model, precision),
        PLUGIN_FREE: lambda model: for_plugin_free(model, g.context),
    }
    for kind in kinds(part, g):
        name = traced.name if kind == TRACED else f"{part}.{kind}.onnx"
        if kind != TRACED:
            ir.save(bind[kind](ir.load(traced)), writer.folder / name)
        writer.add(name)
        graphs[kind] = Graph(name, *graph_io(part, kind, g, precision))
    return Part(weights, graphs, plans={})


def _write_kernels(
    engines: PlanOptions, g: Geometry, precision: str, writer: BundleWriter, console: Console
) -> str | None:
    """Compile the plugins' kernels, for the targets or for every GPU there is code for; the file's name."""
    if not engines.plugins:
        return None
    with console.status("compiling kernels"):
        try:
            needed = kernels_of_model(attributes(g), PRECISIONS[precision])
            artifacts = compile_kernels(needed, engines.targets or SMS)
        except KernelError as error:
            raise ExportError(error.found, expected=error.expected, fix=error.fix) from error
    writer.write(KERNELS, iter([artifacts.to_bytes()]))
    return KERNELS


def _as_used(options: BuildOptions, budget: int, context: int, calibration: Calibration | None) -> dict[str, object]:
    """The knobs as this build used them; of folders only their names, which say nothing about this machine."""
    used = {**asdict(options), "page_budget": budget, "context": context, "out": options.folder}
    used["block_size"] = options.scheme.block if options.scheme else None
    used["floats"] = list(options.floats)
    used["calibration"] = calibration.used if calibration else None
    del used["plans"]
    if options.engines:
        used[options.backend] = json.loads(json.dumps(asdict(options.engines)))  # tuples as the manifest reads them
    return {key: value.resolve().name if isinstance(value, Path) else value for key, value in used.items()}


class _progress:
    """A byte progress bar; the block gets the function that advances it."""

    def __init__(self, part: str, total: int, console: Console) -> None:
        columns = TextColumn(f"{part}: weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task(part, total=total)

    def __enter__(self) -> Callable[[int], None]:
        self._bar.start()
        return lambda size: self._bar.advance(self._task, size)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _check(options: BuildOptions, bundle: Bundle, checkpoint: Checkpoint, console: Console) -> None:
    if options.check == "parity":
        with console.status("parity check"):
            stages = parity(bundle, checkpoint)
        console.print(_report(stages, options.precision))
    elif options.check == "weights":
        with console.status("weight check"):
            count = stored_weights(bundle, checkpoint)
        rounds = options.scheme and not isinstance(checkpoint, PackedCheckpoint)
        rounded = " (quantised ones within half a step)" if rounds else ""
        rounded = " times the stored scales" * (options.calibrate is not None) + rounded
        console.print(f"weights: {count} tensors equal the checkpoint's{rounded}; the graphs were not run")
    else:
        console.print("[yellow]not checked[/] (--check none)")


def _report(stages: list[Stage], precision: str) -> Table:
    table = Table("stage", "largest difference", "limit", title=f"parity with the float32 reference, {precision}")
    for stage in stages:
        table.add_row(stage.name, f"{stage.error:.1e}", f"{stage.limit:.0e}")
    return table


def _print_plan(
    console: Console, options: BuildOptions, config: ModelConfig, checkpoint: Checkpoint, dropped: dict[str, str]
) -> None:
    g, c = config.geometry, _configuration(options, config.geometry)
    parity_check = parity_bytes(g, options.precision, options.scheme, options.calibrate is not None)
    table = Table("part", "files", "weights", title=f"{options.model} -> {options.folder} ({options.precision})")
    for part, weights in weight_bytes(c).items():
        graphs = [f"{part}.onnx", *(f"{part}.{kind}.onnx" for kind in kinds(part, g) if kind != TRACED)]
        table.add_row(part, ", ".join((*graphs, f"{part}.weights")), size(weights))
    console.print(table)
    if dropped:
        saved = sum(checkpoint.info(name).nbytes for name in dropped)
        console.print(f"left out, {len(dropped)} tensors of {size(saved)} (bundle.json lists them all):")
        for reason in dict.fromkeys(dropped.values()):
            names = [name for name in dropped if dropped[name] == reason]
            console.print(
                f"  {len(names)} x {reason}: {names[0]}" + (", ..." if len(names) > 1 else ""), soft_wrap=True
            )
    console.print(
        f"memory of a request: cache {size(cache_bytes(c))} at the full context of {g.context} tokens, "
        f"hi-res pages {size(store_bytes(c))}; "
        f"of the parity check: {size(parity_check)}"
    )
    if options.scheme:
        what = "the decoder's linear layers" + (", lm_head" if options.scheme.head else "")
        projections = not g.lazy_pages and not any("_hd." in name for name in options.floats)
        what += ", and the pages' projections" if projections else ""
        block = options.scheme.block
        layout = "one scale for a column" if block == COLUMN else f"in blocks of {block}"
        console.print(
            f"{options.precision}: {layout}: {what}; the rest is stored in float16. "
            "ONNX Runtime computes in float32 (float16 is no faster on its CPU), TensorRT in float16",
            soft_wrap=True,
        )
        if options.precision == "fp8":
            console.print("fp8: ONNX Runtime runs it, slowly: it unpacks the weights in every step; it is for TensorRT")
        if g.lazy_pages:
            console.print("k_proj_hd, v_proj_hd stay float16: with --projection lazy a plugin reads them")
    if isinstance(checkpoint, PackedCheckpoint):
        console.print(summary(checkpoint, options.precision, options.floats), soft_wrap=True)
    if options.precision == "bf16":
        console.print("bf16: weights are stored in bfloat16; ONNX Runtime computes in float32 (its CPU has no bf16)")


def _configuration(options: BuildOptions, g: Geometry) -> Configuration:
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


def _versions() -> dict[str, str]:
    try:
        own = version("flexattention-deploy")
    except PackageNotFoundError:  # run from a folder that was not installed
        own = "not installed"
    # onnxruntime is asked itself: its package may be called onnxruntime-gpu.
    versions = {
        "python": platform.python_version(),
        "flexattention-deploy": own,
        "onnxruntime": onnxruntime.__version__,
    }
    return versions | {name: version(name) for name in ("torch", "onnx", "onnx-ir", "onnxscript")}


def parse_arguments(arguments: list[str] | None = None) -> BuildOptions | Planning:
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
        given["batch"] = PlanOptions.batch  # of a build there it would be an error
    plans = options_of(given, backend)
    options = BuildOptions(**given, plans=plans)
    return Planning(options, batch) if planning else options


def _block_size(text: str) -> int:
    return COLUMN if text == block_name(COLUMN) else int(text)


def main() -> int:
    """Entry of the command line; returns the exit status. An interruption or SIGTERM, too, leaves nothing half-made."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        asked, console = parse_arguments(), Console()
        if isinstance(asked, Planning):
            return 0 if plan(asked, console) else 1
        build(asked, console)
    except FlexError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
