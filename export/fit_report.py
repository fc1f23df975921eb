"""What sizing looks like on the command line: `python export/build.py --plan`."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engines.bundle.kinds import ONNXRUNTIME, TENSORRT
from engines.bundle.tensors import APART, stored_as
from engines.errors import OptionError
from engines.sizing.choices import CHOICES
from engines.sizing.fit import (
    Assessment,
    Room,
    advice,
    builder_advice,
    builder_verdict,
    changes,
    room_of,
    this_machine,
    verdict,
)
from engines.sizing.fitting import Fitting
from engines.sizing.needs import SHARE_OF_BANDWIDTH, Configuration, size
from engines.targets import TARGETS, target
from engines.trt.options import EngineOptions

SEEN = 10_000_000  # bytes: less of the builder is not worth a word


def require_one_board(boards: tuple[str, ...], asking: str) -> None:
    """OptionError unless there is one: sizes are held against one memory. asking: the option that does."""
    if len(boards) != 1:
        found = f"the boards {', '.join(boards)}" if boards else "compute capabilities"
        raise OptionError(f"{asking} for {found}", expected=f"one board: {', '.join(TARGETS)}")


def room_for(backend: str, engines: EngineOptions | None, asking: str) -> Room:
    """The memory to fit into: of the board that is named, else of this machine; `asking`: the option that asks.
    OptionError, BackendError."""
    if engines is None or engines.targets is None:
        return this_machine(backend)
    require_one_board(engines.boards, asking)
    return room_of(target(engines.boards[0]))


def report(a: Assessment, model: str, console: Console) -> None:
    """Print an assessment: what is needed, whether it fits, how fast it may decode, and what fits instead."""
    c = a.configuration
    _sizes(a, model, console)
    if a.fits:
        _fits(a, console)
    elif a.runs:
        _say(console, f"[yellow]the engines fit, their builder does not[/]: {builder_verdict(a)}")
        _say(console, f"  fix: {builder_advice(a)}")
    else:
        _say(console, f"[red]does not fit[/]: {verdict(a)}")
        _say(console, f"  fix: {advice(a)}")
        if _limited(c) or c.geometry.lazy_pages:
            possible = any(choice.knob == "page_slots" and choice.change(c) for choice in CHOICES)
            slots = "; page slots do: --projection lazy --page-slots K" if possible else ""
            _say(console, f"  a page budget and lazy projection save reading and computing, not memory{slots}")


def report_fitting(f: Fitting, model: str, console: Console) -> None:
    """Print what --fit has found: its sizes, what each choice gives and costs; else what is missing."""
    _sizes(f.assessment, model, console)
    if f.assessment.fits:
        _fits(f.assessment, console)
        choices_outline(f, console)
        words = changes(f.asked, f.assessment.configuration)
        words = f", or with {escape(words)} in place of --fit" if words else ""
        _say(console, f"build it: the same command without --plan{words}")
        return
    _say(console, f"[red]does not fit[/]: {lacking(f)}")
    known = f.assessment.room.name in TARGETS
    none = "no larger board known here holds it, either" if known else "free memory, or name a board: --target NAME"
    larger = f"add --target {f.larger} --fit" if f.larger else none
    _say(console, f"  fix: {larger}" + (" (the smallest board that holds it)" if f.larger else ""))


def choices_outline(f: Fitting, console: Console) -> None:
    """Print each choice of a fitting configuration, with what it gives and costs."""
    if not f.gains:
        _say(console, "--fit: nothing needs to be chosen")
        return
    _say(console, "chosen by --fit, all of it needed; what each choice gives beside the others, and what else it does:")
    for gain in f.gains:
        given = [size(gain.request)] if gain.request > 0 else []
        given += [f"{size(gain.builder)} of the builder"] if gain.builder > SEEN and f.assessment.builds_here else []
        rate = SHARE_OF_BANDWIDTH * (gain.faster or 0)
        given += [f"{rate:.1f} tokens/s"] if rate >= 0.05 else []
        costs = gain.choice.costs
        told = f"costs {costs}" if isinstance(costs, str) else str(costs)
        _say(console, f"  {escape(gain.words)}: {', '.join(given)}; {escape(told)}")


def lacking(f: Fitting) -> str:
    """What is missing where no configuration fits."""
    a, usable = f.assessment, f.assessment.room.usable
    missing = [f"a request needs {size(a.total)}, {size(a.total - usable)} more than there is"] * (not a.runs)
    if not a.builds:
        missing.append(f"the builder needs {size(a.builder)}, {size(a.builder - usable)} more than there is")
    words = changes(f.asked, a.configuration)
    return f"has {size(usable)}: {'; '.join(missing)}" + (f" (with {words})" if words else "")


def _fits(a: Assessment, console: Console) -> None:
    _say(console, f"[green]fits[/]: {verdict(a)}")


def _sizes(a: Assessment, model: str, console: Console) -> None:
    """What is needed, and how fast it may decode."""
    c, room = a.configuration, a.room
    title = escape(_title(c, model, room.name))
    table = Table(box=None, show_header=False, title=title, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for need in a.needs:
        table.add_row(need.name, size(need.bytes) if need.bytes else "none", need.how)
    reserved = f", {size(room.memory)} less {size(room.reserved)} for the system" if room.reserved else ""
    table.add_row("[bold]request[/]", f"[bold]{size(a.total)}[/]", f"has {size(room.usable)}{reserved}")
    if c.backend != ONNXRUNTIME:
        place = "on the board" if a.builds_here else "on any machine"
        if c.backend == TENSORRT and not room.integrated:
            place = "main memory, beside the card"
        weights = "mapped weights apart"
        if c.backend == TENSORRT and room.copies:
            weights = "weights copied"  # by TensorRT before MAPS_WEIGHTS
        layers = f", {c.layers_per_engine} layers an engine" if c.layers_per_engine else ""
        table.add_row("builder", size(a.builder), f"{place}, part by part{layers}, {weights}")
    console.print(table)
    _say(console, f"decode: {_speed(a)}")
    if c.slots > 1 and c.backend != ONNXRUNTIME:
        _say(console, f"slots: the engines must be built with --batch {max(c.batch, c.slots)}, a row for each slot")


def _title(c: Configuration, model: str, place: str) -> str:
    page_budget = f", page budget {c.page_budget}" if _limited(c) else ""
    stored = stored_as(c.precision, c.geometry, {kind: getattr(c, kind) for kind in APART})
    kept = f", residency {c.residency}" if c.residency != Configuration.residency else ""
    kept += f", {c.geometry.page_slots} page slots" if c.geometry.page_slots is not None else ""
    return f"{model}, {stored}{kept}, {c.backend}{page_budget}, on {place}"


def _limited(c: Configuration) -> bool:
    return c.page_budget is not None and c.page_budget < c.geometry.pages


def _speed(a: Assessment) -> str:
    if a.speed is None:
        return "no prediction, the bandwidth of this memory is not known"
    c, (slow, fast) = a.configuration, a.speed
    together = f" of all {c.rows} rows together" if c.rows > 1 else ""
    short = min(c.geometry.context, c.geometry.image_tokens + 64)
    share, bandwidth = SHARE_OF_BANDWIDTH, a.room.bandwidth
    return (
        f"{share * slow:.1f} ({c.geometry.context} tokens, {c.pages_read} pages) .. {share * fast:.1f} "
        f"({short} tokens, no page) tokens/s{together} predicted: bytes read at {share:.0%} of {bandwidth} GB/s, "
        f"as on an H100\n  at most {slow:.1f} .. {fast:.1f}, at all of {bandwidth} GB/s; not measured here"
    )


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False)
