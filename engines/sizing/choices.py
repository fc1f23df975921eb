"""What can be made smaller, as data, and which of it a configuration needs in order to fit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

from engines.bundle.kinds import ONNXRUNTIME
from engines.bundle.pages import equally_long
from engines.bundle.precision import COLUMN, INT4, INT8, Precision
from engines.bundle.tensors import MODEL, can_be_coded, fitting_blocks, sizes_of_blocks
from engines.residency import SHARED
from engines.sizing.needs import Configuration

LEAST_TEXT = 256  # tokens of a question and its answer: no smaller context is proposed

# A configuration with a choice made; None where there is no such choice.
Change = Callable[[Configuration], Configuration | None]


class Held(NamedTuple):
    """A configuration against what there is. lacks: bytes that it is too large, 0 if it fits. takes: bytes in all."""

    lacks: int
    takes: int


@dataclass(frozen=True)
class Quality:
    """The official runs of a bundle with a choice and with what else `row` names, whose weights are random and the
    hardest to round: a row of docs/figures.md, Precisions. tokens: equal ones. iou: of the selected pages in the worst
    layer."""

    row: str
    tokens: str
    iou: str

    def __str__(self) -> str:
        return f"{self.tokens} official tokens stay, IoU of pages {self.iou} (measured: {self.row})"


@dataclass(frozen=True)
class Choice:
    """A way to need less. knob: the option that makes it, a field of the options of a build, or of its engines. costs:
    what else it does, for people: "costs ..." of time and use, or what was measured of answers."""

    knob: str
    change: Change
    costs: str | Quality


def fits_with(
    c: Configuration,
    held: Callable[[Configuration], Held],
    serves: Callable[[Precision], bool],
    kept: Collection[str] = (),
) -> tuple[Choice, ...]:
    """The choices with which `c` fits, each of them needed: without any one it would not. Those that leave least
    lacking if it does not fit with all there are, either (ask `held` again).

    held: what a configuration is, held against what there is. serves: whether there is what a precision needs. kept:
    knobs to leave alone.

    They are made in the order of CHOICES until all fits, and with them what costs less than the last of them. Then they
    are taken back from the last, where others make them needless: what costs most is what is spared first.
    """
    held = cache(held)
    open_ = [choice for choice in CHOICES if choice.knob not in kept]

    def grown(chosen: tuple[Choice, ...], among: Collection[Choice], enough: bool) -> tuple[Choice, ...]:
        """With those that give something, again from the first while that helps: some are only beside others. enough:
        stop where all fits; else those that take nothing come, too: they may give something once others are gone."""
        before = None
        while before != chosen:
            before = chosen
            for choice in among:
                now = held(made(c, chosen))
                if enough and not now.lacks:
                    return chosen
                other = made(c, more := in_order((*chosen, choice)))
                gives = held(other) < now if enough else held(other) <= now
                if choice not in chosen and serves(other.precision) and gives:
                    chosen = more
        return chosen

    chosen = grown((), open_, enough=True)
    if chosen and not held(made(c, chosen)).lacks:
        chosen = grown(chosen, open_[: open_.index(chosen[-1])], enough=False)
    for choice in reversed(chosen):
        others = without(chosen, choice)
        if held(made(c, others)).lacks <= held(made(c, chosen)).lacks:
            chosen = others
    return chosen


def made(c: Configuration, choices: Iterable[Choice]) -> Configuration:
    """`c` with these choices made, those that there are only beside others after these."""
    waiting = tuple(choices)
    while waiting:
        later: tuple[Choice, ...] = ()
        for choice in waiting:
            other = choice.change(c)
            later, c = (later, other) if other is not None else ((*later, choice), c)
        if len(later) == len(waiting):
            break
        waiting = later
    return c


def without(choices: Iterable[Choice], one: Choice) -> tuple[Choice, ...]:
    """All of them but one."""
    return tuple(each for each in choices if each is not one)


def in_order(choices: Iterable[Choice]) -> tuple[Choice, ...]:
    """As CHOICES has them."""
    return tuple(sorted(choices, key=CHOICES.index))


def _engines(count: int) -> Change:
    """The decoder in so many engines of about one size."""

    def change(c: Configuration) -> Configuration | None:
        layers = -(-c.geometry.layers // count)
        if c.backend == ONNXRUNTIME or layers >= (c.layers_per_engine or c.geometry.layers):
            return None
        return replace(c, layers_per_engine=layers)

    return change


def _residency(c: Configuration) -> Configuration | None:
    return replace(c, residency=SHARED)


def _int8_pages(c: Configuration) -> Configuration | None:
    return replace(c, geometry=replace(c.geometry, int8_pages=True))


def _int8_cache(c: Configuration) -> Configuration | None:
    """Which TensorRT has with this project's plugins alone (engines.bundle.kinds.PLUGINS_ALONE)."""
    can = c.plugins or c.backend == ONNXRUNTIME
    return replace(c, geometry=replace(c.geometry, int8_cache=True)) if can else None


def _context(tokens: int) -> Change:
    def change(c: Configuration) -> Configuration | None:
        if not c.geometry.image_tokens + LEAST_TEXT <= tokens < c.geometry.context:
            return None
        return replace(c, geometry=replace(c.geometry, context=tokens))

    return change


def _page_slots(count: int) -> Change:
    """For pages that are projected lazily, which TensorRT does with this project's plugins alone."""

    def change(c: Configuration) -> Configuration | None:
        g = c.geometry
        able = (c.plugins or c.backend == ONNXRUNTIME) and not g.attention_bias and equally_long(g)
        if not able or count >= g.stored_pages:
            return None
        return replace(c, geometry=replace(g, lazy_pages=True, page_slots=count))

    return change


def _precision(precision: Precision) -> Change:
    def change(c: Configuration) -> Configuration | None:
        if c.fixed or precision not in c.precision.smaller:
            return None
        return _in_blocks(in_precision(c, precision, c.block))

    return change


def in_precision(c: Configuration, precision: Precision, block: int | None) -> Configuration:
    """`c` in another precision, in these blocks if it has them; a head that is stored as its linear layers stays so."""
    head = precision.name if c.head == c.precision.name and precision.quantises else c.head
    sizes = sizes_of_blocks(precision, head, c.vision)
    return replace(c, precision=precision, block=block if block in sizes else None, head=head)


def _apart(kind: str, precision: Precision) -> Change:
    """What may be stored in codes of its own, in these; kind: a key of engines.bundle.tensors.APART."""

    def change(c: Configuration) -> Configuration | None:
        now = getattr(c, kind)
        barred = c.geometry.tied_embeddings and kind != "vision"
        barred |= kind == "embeddings" and c.backend != ONNXRUNTIME  # TensorRT-RTX 1.7 builds no gather of int8
        if barred or not can_be_coded(kind, c.precision) or now not in (MODEL, INT8.name) or now == precision.name:
            return None
        coded: dict[str, Any] = {kind: precision.name}
        return _in_blocks(replace(c, **coded))

    return change


def _in_blocks(c: Configuration) -> Configuration | None:
    """In the largest blocks that divide the weights, if those that it has do not; None if none does."""
    g, schemes = c.geometry, c.coding.schemes(c.geometry)
    shapes = {name: shape for name, shape in c.coding.tensors(g).items() if schemes[name].block != COLUMN}
    if not any(k % schemes[name].span(k) for name, (_, k) in shapes.items()):
        return c
    fitting = fitting_blocks(shapes.values())
    return replace(c, block=fitting[-1]) if fitting else None


# From what costs least to what costs most: time, then quality, then answers. The page budget and lazy projection alone
# are not among them: they save reading and computing, not memory.
CHOICES = (
    *(
        Choice("layers_per_engine", _engines(count), "an engine's launches more in each step: not measured")
        for count in (2, 4, 8)
    ),
    Choice("residency", _residency, "opening vision and page projection again for every new image"),
    Choice("kv", _int8_pages, Quality("fp32, kv int8", "65 of 65", "0.997")),
    Choice("head", _apart("head", INT8), Quality("int8, blocks of 16, head int8", "57 of 65", "0.933")),
    Choice("embeddings", _apart("embeddings", INT8), Quality("fp16, embeddings int8", "64 of 65", "0.985")),
    Choice("kv_cache", _int8_cache, Quality("fp32, kv cache int8", "64 of 65", "0.980")),
    Choice("vision", _apart("vision", INT8), Quality("int8, blocks of 16, vision int8", "54 of 65", "0.883")),
    *(
        Choice("context", _context(tokens), "shorter questions, answers, conversations")
        for tokens in (1792, 1536, 1280, 1024)
    ),
    Choice("head", _apart("head", INT4), Quality("int8, blocks of 16, head int4", "48 of 65", "0.933")),
    Choice("precision", _precision(INT8), Quality("int8, columns", "57 of 65", "0.899")),
    Choice("precision", _precision(INT4), Quality("int4, blocks of 16", "34 of 65", "0.623")),
    *(
        Choice("page_slots", _page_slots(count), f"an error where a layer selects more than {count} pages in a step")
        for count in (48, 24)
    ),
)
