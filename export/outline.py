"""What a build says of itself: before the work, during and after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from engines.bundle.kinds import TRACED, kinds
from engines.bundle.precision import COLUMN, Scheme
from engines.bundle.tensors import APART
from engines.sizing.needs import cache_bytes, size, store_bytes, weight_bytes
from export.check import Stage, parity_bytes
from export.checkpoint.config import ModelConfig
from export.checkpoint.folder import Checkpoint
from export.checkpoint.packed import PackedCheckpoint, summary
from export.recipe import Recipe

_LISTED = 20  # unknown keys spelt out


def settings_outline(console: Console, config: ModelConfig) -> None:
    """Print what the settings of a checkpoint say that is not obeyed: keys that nobody here knows, and notes."""
    if config.unknown:
        names = ", ".join(f"{name:.80}" for name in config.unknown[:_LISTED])
        more = f", and {len(config.unknown) - _LISTED} more" if len(config.unknown) > _LISTED else ""
        text = f"config.json: unknown to this project, not obeyed: {names}{more}"
        console.print(text, soft_wrap=True, markup=False, style="yellow")
    notes_outline(console, config.notes)


def notes_outline(console: Console, notes: Iterable[str]) -> None:
    """Print notes, each on a line."""
    for note in notes:
        console.print(note, soft_wrap=True, markup=False, highlight=False)


def outline(console: Console, recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Print what a build is about to write and to leave out, what a request will need, and what the recipe implies."""
    g, c, precision, coding = recipe.geometry, recipe.configuration(), recipe.precision, recipe.coding
    parity_check = parity_bytes(g, precision, coding, recipe.calibrate is not None)
    title = escape(f"{recipe.model} -> {recipe.folder} ({precision})")
    table = Table("part", "files", "weights", title=title)
    for part, weights in weight_bytes(c).items():
        graphs = [f"{part}.onnx", *(f"{part}.{kind}.onnx" for kind in kinds(part, g) if kind != TRACED)]
        table.add_row(part, ", ".join((*graphs, f"{part}.weights")), size(weights))
    console.print(table)
    if dropped := checkpoint.dropped:
        saved = sum(checkpoint.info(name).nbytes for name in dropped if checkpoint.has(name))
        console.print(f"left out, {len(dropped)} tensors or files, {size(saved)} (bundle.json lists them all):")
        for reason in dict.fromkeys(dropped.values()):
            names = [name for name in dropped if dropped[name] == reason]
            more = ", ..." if len(names) > 1 else ""
            console.print(f"  {len(names)} x {reason}: {names[0]:.200}{more}", soft_wrap=True, markup=False)
    cache, pages = (" in int8" if int8 else "" for int8 in (g.int8_cache, g.int8_pages))
    console.print(
        f"memory of a request: cache {size(cache_bytes(c))}{cache} at the full context of {g.context} tokens, "
        f"hi-res pages {size(store_bytes(c))}{pages}; "
        f"of the parity check: {size(parity_check)}"
    )
    if scheme := coding.linear:
        what = "the decoder's linear layers" + (", lm_head" if coding.head == scheme else "")
        projections = not g.lazy_pages and not any("_hd." in name for name in coding.floats)
        what += ", and the pages' projections" if projections else ""
        console.print(
            f"{precision}: {layout_name(scheme)}: {what}; the rest is stored in float16. "
            "ONNX Runtime computes in float32 (float16 is no faster on its CPU), TensorRT in float16",
            soft_wrap=True,
        )
        if precision.e4m3:
            console.print(
                f"{precision}: ONNX Runtime runs it, slowly: it unpacks the weights in every step; it is for TensorRT"
            )
        if g.lazy_pages:
            console.print("k_proj_hd, v_proj_hd stay float16: with --projection lazy a plugin reads them")
    elif precision.widened:
        console.print(
            f"{precision}: weights are stored in {precision.dtype}; "
            f"ONNX Runtime computes in {precision.ort_dtype} (its CPU has no {precision})"
        )
    beside = [
        f"{kind} in {scheme.precision}, {layout_name(scheme)}"
        for kind in APART
        if (scheme := getattr(coding, kind)) and scheme != coding.linear
    ]
    if beside:
        console.print(f"{precision}: {'; '.join(beside)}", soft_wrap=True)
    if isinstance(checkpoint, PackedCheckpoint):
        console.print(summary(checkpoint, precision, coding.floats), soft_wrap=True)


def layout_name(scheme: Scheme) -> str:
    """For people: which values share a scale."""
    if scheme.rows:
        return "one scale for a row"
    return "one scale for a column" if scheme.block == COLUMN else f"in blocks of {scheme.block}"


@contextmanager
def progress_of(part: str, total: int, console: Console) -> Iterator[Callable[[int], None]]:
    """A byte progress bar; the block gets the function that advances it."""
    columns = TextColumn(f"{part}: weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(part, total=total)
        yield lambda size: bar.advance(task, size)


def parity_table(stages: list[Stage], stored: str) -> Table:
    """The stages of the parity check. `stored`: how the bundle stores what it does, see stored_of."""
    table = Table("stage", "largest difference", "limit", title=f"parity with the float32 reference, {stored}")
    for stage in stages:
        table.add_row(stage.name, f"{stage.error:.1e}", f"{stage.limit:.0e}")
    return table
