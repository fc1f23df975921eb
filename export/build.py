"""Checkpoint -> bundle: `python export/build.py --model CHECKPOINT --fp16`."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter

if __package__ in (None, ""):  # run as a script: the packages lie beside this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import export  # noqa: F401  says what is not installed, before anything needs it

import onnx_ir as ir
import torch
from rich.console import Console
from rich.markup import escape

from engines import ort
from engines.bundle.folder import Bundle
from engines.bundle.kinds import ONNXRUNTIME, ONNXRUNTIME_CUDA, PARTS, PLUGIN_FREE, TRACED, kinds
from engines.bundle.manifest import FORMAT, Graph, Manifest, Part, Prompt
from engines.bundle.specs import graph_io
from engines.bundle.writer import BundleWriter, write_bundle
from engines.memory import peak_rss
from engines.progress import print_log
from engines.sizing.fit import assess, require_boards, require_sms
from engines.trt.build import attributes, build_engines, elsewhere
from engines.trt.options import command as engines_command
from export.check import parity, require_memory, stored_of, why_no_second_opinion
from export.checkpoint.config import ModelConfig, read_config
from export.checkpoint.folder import Checkpoint
from export.checkpoint.model_folder import require_model_folder
from export.checkpoint.packed import PackedCheckpoint, open_checkpoint
from export.checkpoint.special_tokens import disagreements
from export.checkpoint.tokenizer import CheckpointTokenizer, read_tokenizer
from export.fit_report import choices_outline, report, report_fitting, room_for
from export.fitting import fitted, fitting
from export.graph.bind import for_onnxruntime, for_plugin_free
from export.graph.quantize import rewrite
from export.graph.trace import trace
from export.options import BuildOptions, SizingRequest, parse_arguments
from export.outline import notes_outline, outline, parity_table, progress_of, settings_outline
from export.recipe import Recipe, settle
from export.weights.calibrate import Calibration, calibrate_on
from export.weights.folding import to_bytes
from export.weights.rounding import Source
from export.weights.stored import stored_weights
from export.weights.write import stored_bytes, write_weights
from plugins import command
from plugins.compiler.kernels import compile_kernels
from plugins.compiler.ptxas import SMS
from plugins.cores import usable_cores
from plugins.registry import kernels_of_model
from plugins.signals import interrupt_when_asked_to_end

KERNELS = "kernels.zip"
SCALES = "scales.npz"
TOKENIZER = "tokenizer.json"


def build(options: BuildOptions, console: Console | None = None) -> Bundle:
    """Make a bundle and check it; nothing is left at its folder unless the check passed.

    Raises a FlexError: CheckpointError, ConfigError, TokenizerError, ExportError, ParityError, BackendError or
    OptionError.
    """
    console = console or Console(quiet=True)
    started, versions = perf_counter(), _versions()
    config = read_settings(options.model)
    settled = settle(options, config)
    if options.fit:
        found = fitting(options, settled, settled.configuration())
        options = fitted(options, found)
        choices_outline(found, console)
        settled = settle(options, config)
    for warning in _warnings(settled):
        console.print(warning, soft_wrap=True, markup=False, style="yellow")
    recipe, tokenizer, checkpoint = read_model(settled)
    settings_outline(console, recipe.config)
    notes_outline(console, _notes(recipe.config, tokenizer))
    outline(console, recipe, checkpoint)
    if recipe.check == "parity":
        require_memory(recipe.geometry, recipe.precision, recipe.coding, recipe.calibrate is not None)
    not_here = elsewhere(recipe.engines) if recipe.engines else None
    calibration = None
    if recipe.calibrate:
        calibration = calibrate_on(recipe.calibrate, recipe.model, recipe.config, checkpoint, recipe.coding, console)
    with write_bundle(recipe.folder) as writer:
        _write(recipe, checkpoint, calibration, tokenizer, versions, writer, console)
        _check(recipe, Bundle(writer.folder, verify=False), checkpoint, console)
        if recipe.engines and not not_here:
            build_engines(writer.folder, recipe.engines, name=recipe.folder, quiet=console.quiet, warned=True)
    if recipe.engines and not_here:
        there = engines_command("BUNDLE", recipe.engines)
        console.print(f"[yellow]no engines yet[/]: {escape(not_here)}", soft_wrap=True)
        text = f"copy {recipe.folder} to the board and run there: {there}"
        console.print(text, soft_wrap=True, markup=False)
    took = f"{perf_counter() - started:.0f} s, peak memory {peak_rss() / 1e9:.2f} GB"
    console.print(f"[bold]{escape(str(recipe.folder))}[/] is ready: {took}")
    return Bundle(recipe.folder, verify=False)


def read_recipe(options: BuildOptions) -> Recipe:
    """What is to be built, as far as settings tell. Raises CheckpointError, ConfigError, OptionError."""
    return settle(options, read_settings(options.model))


def read_settings(model: Path) -> ModelConfig:
    """What a checkpoint's configuration says, and nothing else of it. Raises CheckpointError, ConfigError."""
    require_model_folder(model)
    return read_config(model)


def read_model(settled: Recipe) -> tuple[Recipe, CheckpointTokenizer | None, Checkpoint]:
    """The rest of what is read of a checkpoint before anything is made of it: the recipe confirmed, its tokenizer if it
    has one, and its weights, opened. Whatever would make another model of it is an error here (see `build`)."""
    tokenizer = read_tokenizer(settled.model, settled.geometry.vocab)
    checkpoint = open_checkpoint(settled.model, settled.config)
    return settled.confirmed(checkpoint), tokenizer, checkpoint


def print_sizes(request: SizingRequest, console: Console | None = None) -> bool:
    """Print what a build and a request would need; whether it fits. Reads nothing but the checkpoint's configuration.

    Raises a FlexError: ConfigError, OptionError, or BackendError when the memory to fit into cannot be told.
    """
    recipe = read_recipe(request.options)
    asked = recipe.configuration(request.batch, request.slots)
    if recipe.engines:
        require_sms(asked, recipe.engines.sms)  # what it warns of is said when they are built
    console, name = console or Console(quiet=True), recipe.model.resolve().name
    if request.options.fit:
        found = fitting(request.options, recipe, asked)
        report_fitting(found, name, console)
        assessment = found.assessment
    else:
        assessment = assess(asked, room_for(recipe.backend, recipe.engines, "--plan"))
        report(assessment, name, console)
    settings_outline(console, recipe.config)
    return assessment.fits


def _notes(config: ModelConfig, tokenizer: CheckpointTokenizer | None) -> list[str]:
    """What of the tokenizer and the settings beside it is not obeyed, for people."""
    if tokenizer is None:
        return []
    eos = tokenizer.eos_ids[0] if tokenizer.eos_ids else None
    return [*tokenizer.notes, *disagreements(config.bos_token_id, config.eos_token_ids, tokenizer.bos_id, eos)]


def _warnings(recipe: Recipe) -> list[str]:
    """What to know about the engines; OptionError when a board does not hold them, or cannot run them."""
    asked, engines = recipe.configuration(), recipe.engines
    return require_boards(asked, engines.boards) + require_sms(asked, engines.sms) if engines else []


def _write(
    recipe: Recipe,
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    tokenizer: CheckpointTokenizer | None,
    versions: dict[str, str],
    writer: BundleWriter,
    console: Console,
) -> None:
    """Write every file of the bundle, and the manifest last."""
    config = recipe.config
    source = calibration.folded(checkpoint, recipe.geometry) if calibration else checkpoint
    clips = calibration.clips if calibration else None
    kernels = _write_kernels(recipe, writer, console)
    parts = {part: _write_part(part, recipe, source, clips, writer, console) for part in PARTS}
    if calibration:
        writer.write(SCALES, iter([to_bytes(calibration.scales)]))
    if tokenizer is not None:
        writer.write(TOKENIZER, iter([tokenizer.content]))
    prompt = Prompt(
        config.prompt_template,
        TOKENIZER if tokenizer else None,
        tokenizer.bos_id if tokenizer else config.bos_token_id,
        config.eos_token_ids or (tokenizer.eos_ids if tokenizer else ()),
        turn=config.turn_template,
        system=config.system_prompt,
    )
    writer.finish(
        Manifest(
            format=FORMAT,
            name=recipe.folder.resolve().name,
            precision=recipe.precision.name,
            page_budget=recipe.page_budget,
            geometry=recipe.geometry,
            prompt=prompt,
            parts=parts,
            backend=recipe.backend,
            kernels=kernels,
            files=writer.files,
            versions=versions,
            source=checkpoint.identity(),
            options=recipe.record(calibration.used if calibration else None),
            dropped=checkpoint.dropped,
            scales=SCALES if calibration else None,
            block_size=recipe.coding.linear.block if recipe.coding.linear else None,
            residency=recipe.residency,
        )
    )


def _write_part(
    part: str,
    recipe: Recipe,
    source: Source,
    clips: dict[str, torch.Tensor] | None,
    writer: BundleWriter,
    console: Console,
) -> Part:
    """Network -> traced graph -> its weights -> the graphs of the other kinds, which read the same weights."""
    g, precision, weights = recipe.geometry, recipe.precision, f"{part}.weights"
    dtype, schemes = getattr(torch, precision.dtype), recipe.coding.schemes(g)
    with console.status(f"{part}: tracing"):
        model = trace(part, g, dtype)
    rewrite(model, schemes)
    with progress_of(part, stored_bytes(model), console) as advance:
        write_weights(model, source, dtype, writer, weights, advance, schemes, clips)
    traced, graphs = writer.folder / f"{part}.onnx", {}
    ir.save(model, traced)
    bind = {
        ONNXRUNTIME: lambda model: for_onnxruntime(model, precision),
        ONNXRUNTIME_CUDA: lambda model: for_onnxruntime(model, precision, cuda=True),
        PLUGIN_FREE: lambda model: for_plugin_free(model, g.context),
    }
    for kind in kinds(part, g):
        name = traced.name if kind == TRACED else f"{part}.{kind}.onnx"
        if kind != TRACED:
            ir.save(bind[kind](ir.load(traced)), writer.folder / name)
        writer.add(name)
        graphs[kind] = Graph(name, *graph_io(part, kind, g, precision))
    return Part(weights, graphs, plans={})


def _write_kernels(recipe: Recipe, writer: BundleWriter, console: Console) -> str | None:
    """Compile the plugins' kernels, for the targets or for every GPU there is code for; the file's name."""
    if not recipe.engines or not recipe.engines.plugins:
        return None
    with console.status("compiling kernels"):
        needed = kernels_of_model(attributes(recipe.geometry), recipe.precision.dtype)
        artifacts = compile_kernels(needed, recipe.engines.targets or SMS)
    writer.write(KERNELS, iter([artifacts.to_bytes()]))
    return KERNELS


def _check(recipe: Recipe, bundle: Bundle, checkpoint: Checkpoint, console: Console) -> None:
    if recipe.check == "parity":
        with console.status("parity check"):
            stages = parity(bundle, checkpoint)
        console.print(parity_table(stages, stored_of(bundle)))
        if missing := why_no_second_opinion(checkpoint):
            console.print(f"[yellow]not compared with transformers' own models[/]: {missing}", soft_wrap=True)
    elif recipe.check == "weights":
        with console.status("weight check"):
            count = stored_weights(bundle, checkpoint)
        rounds = recipe.coding.schemes(recipe.geometry) and not isinstance(checkpoint, PackedCheckpoint)
        rounded = " (quantised ones within half a step)" if rounds else ""
        rounded = " times the stored scales" * (recipe.calibrate is not None) + rounded
        console.print(f"weights: {count} tensors equal the checkpoint's{rounded}; the graphs were not run")
    else:
        console.print("[yellow]not checked[/] (--check none)")


def _versions() -> dict[str, str]:
    try:
        own = version("flexattention-deploy")
    except PackageNotFoundError:  # run from a folder that was not installed
        own = "not installed"
    # onnxruntime is asked itself: its package may be called onnxruntime-gpu.
    versions = {"python": platform.python_version(), "flexattention-deploy": own, "onnxruntime": ort.installed()[0]}
    return versions | {name: version(name) for name in ("torch", "onnx", "onnx-ir", "onnxscript")}


def main() -> int:
    """Entry of the command line; returns the exit status. Ctrl-C, SIGTERM and SIGHUP, too, leave nothing half-made."""
    interrupt_when_asked_to_end()
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))  # it knows no quota of a container
    print_log()

    def work() -> int:
        asked, console = parse_arguments(), Console()
        if isinstance(asked, SizingRequest):
            return 0 if print_sizes(asked, console) else 1
        build(asked, console)
        return 0

    return command.run(work, "interrupted; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
