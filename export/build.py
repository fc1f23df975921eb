"""Checkpoint -> bundle: `python export/build.py --model CHECKPOINT --fp16`."""

from __future__ import annotations

import json
import platform
import signal
import sys
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter

if __package__ in (None, ""):  # run as a script: the packages lie beside this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import onnx_ir as ir
import torch
from rich.console import Console

from engines import ort
from engines.bundle.folder import Bundle
from engines.bundle.geometry import Geometry
from engines.bundle.kinds import ONNXRUNTIME, PARTS, PLUGIN_FREE, TRACED, kinds
from engines.bundle.manifest import FORMAT, Graph, Manifest, Part, Prompt
from engines.bundle.precision import PRECISIONS
from engines.bundle.specs import graph_io
from engines.bundle.writer import BundleWriter, write_bundle
from engines.errors import CheckpointError, ExportError, FlexError, OptionError
from engines.memory import available_bytes, peak_rss
from engines.progress import print_log
from engines.sizing.fit import assess, require_boards, require_sms
from engines.trt.build import attributes, build_engines, elsewhere
from engines.trt.options import EngineOptions, command
from export.check import parity
from export.checkpoint.config import ModelConfig, read_config
from export.checkpoint.folder import Checkpoint, dropped_tensors, expected_tensors
from export.checkpoint.packed import PackedCheckpoint, floats_of, open_checkpoint
from export.checkpoint.tokenizer import convert_tokenizer
from export.fit_report import report, room_for
from export.graph.bind import for_onnxruntime, for_plugin_free
from export.graph.trace import trace
from export.options import BuildOptions, SizingRequest, adjusted, configuration, parse_arguments, settled_options
from export.outline import outline, parity_table, progress_of
from export.weights.calibrate import Calibration, calibrate_on
from export.weights.folding import to_bytes
from export.weights.memory import parity_bytes
from export.weights.quantize import Source, quantised_tensors, require_blocks, rewrite
from export.weights.stored import stored_weights
from export.weights.write import stored_bytes, write_weights
from plugins.artifacts import KernelError
from plugins.compile import compile_kernels
from plugins.compiler.ptxas import SMS
from plugins.registry import kernels_of_model

KERNELS = "kernels.zip"
SCALES = "scales.npz"


def build(options: BuildOptions, console: Console | None = None) -> Bundle:
    """Make a bundle and check it; nothing is left at `options.folder` unless the check passed.

    Raises a FlexError: CheckpointError, ConfigError, TokenizerError, ExportError, ParityError, BackendError or
    OptionError.
    """
    console = console or Console(quiet=True)
    started = perf_counter()
    _require_checkpoint(options)
    config = read_config(options.model)
    config = replace(config, geometry=adjusted(config, options))
    g, versions = config.geometry, _versions()
    options = settled_options(options, config)
    if options.scheme and config.packing is None:  # packed ones are checked against their own groups
        require_blocks(g, options.scheme)
    budget = g.pages if options.page_budget is None else options.page_budget
    engines = options.engines
    asked = replace(configuration(options, g), fixed=config.packing is not None)
    warnings = require_boards(asked, engines.boards) + require_sms(asked, engines.sms) if engines else ()
    for warning in warnings:
        console.print(f"[yellow]{warning}[/]", soft_wrap=True)
    checkpoint = open_checkpoint(options.model, config)
    checkpoint.require(expected_tensors(g))
    if isinstance(checkpoint, PackedCheckpoint):
        options = replace(options, floats=floats_of(checkpoint, config))
    dropped = dropped_tensors(checkpoint, g)
    outline(console, options, config, checkpoint, dropped)
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
            build_engines(writer.folder, engines, name=options.folder, quiet=console.quiet)
    if engines and not_here:
        console.print(f"[yellow]no engines yet[/]: {not_here}", soft_wrap=True)
        console.print(f"copy {options.folder} to the board and run there: {command('BUNDLE', engines)}", soft_wrap=True)
    console.print(
        f"[bold]{options.folder}[/] is ready: {perf_counter() - started:.0f} s, peak memory {peak_rss() / 1e9:.2f} GB"
    )
    return Bundle(options.folder, verify=False)


def plan(asked: SizingRequest, console: Console | None = None) -> bool:
    """Print what a build and a request would need; whether it fits. Reads nothing but the checkpoint's configuration.

    Raises a FlexError: ConfigError, OptionError, or BackendError when the memory to fit into cannot be told.
    """
    options = asked.options
    _require_checkpoint(options)
    config = read_config(options.model)
    g = adjusted(config, options)
    options = settled_options(options, replace(config, geometry=g))
    c = replace(configuration(options, g), batch=asked.batch, fixed=config.packing is not None)
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
    with progress_of(part, stored_bytes(model), console) as advance:
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
    engines: EngineOptions, g: Geometry, precision: str, writer: BundleWriter, console: Console
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


def _check(options: BuildOptions, bundle: Bundle, checkpoint: Checkpoint, console: Console) -> None:
    if options.check == "parity":
        with console.status("parity check"):
            stages = parity(bundle, checkpoint)
        console.print(parity_table(stages, options.precision))
    elif options.check == "weights":
        with console.status("weight check"):
            count = stored_weights(bundle, checkpoint)
        rounds = options.scheme and not isinstance(checkpoint, PackedCheckpoint)
        rounded = " (quantised ones within half a step)" if rounds else ""
        rounded = " times the stored scales" * (options.calibrate is not None) + rounded
        console.print(f"weights: {count} tensors equal the checkpoint's{rounded}; the graphs were not run")
    else:
        console.print("[yellow]not checked[/] (--check none)")


def _versions() -> dict[str, str]:
    try:
        own = version("flexattention-deploy")
    except PackageNotFoundError:  # run from a folder that was not installed
        own = "not installed"
    # onnxruntime is asked itself: its package may be called onnxruntime-gpu.
    versions = {
        "python": platform.python_version(),
        "flexattention-deploy": own,
        "onnxruntime": ort.installed()[0],
    }
    return versions | {name: version(name) for name in ("torch", "onnx", "onnx-ir", "onnxscript")}


def main() -> int:
    """Entry of the command line; returns the exit status. An interruption or SIGTERM, too, leaves nothing half-made."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print_log()
    try:
        asked, console = parse_arguments(), Console()
        if isinstance(asked, SizingRequest):
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
