"""What can be made smaller, as data, and which of it a configuration needs in order to fit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

from engines.bundle.kinds import ONNXRUNTIME
from engines.bundle.precision import COLUMN, INT4, INT8, Precision
from engines.bundle.tensors import fitting_blocks, quantised_tensors
from engines.residency import SHARED
from engines.sizing.needs import Configuration

ROOM = 256  # tokens of a question and its answer: no smaller context is proposed

# A configuration with a choice made; None where there is no such choice.
Change = Callable[[Configuration], Configuration | None]


@dataclass(frozen=True)
class Quality:
    """What a choice alone does to the official runs, whose weights are random and the hardest to round: a row of
    docs/figures.md, Precisions. tokens: equal ones. iou: of the selected pages in the worst layer."""

    row: str
    tokens: str
    iou: str

    def __str__(self) -> str:
        return f"{self.tokens} official tokens, IoU {self.iou} ({self.row})"


@dataclass(frozen=True)
class Choice:
    """A way to need less. knob: the option that makes it, a field of the options of a build, or of the runtime. costs:
    in quality or time, for people."""

    knob: str
    change: Change
    costs: str | Quality


def fits_with(
    c: Configuration,
    lacks: Callable[[Configuration], int],
    serves: Callable[[Precision], bool],
    kept: Collection[str] = (),
) -> tuple[Choice, ...]:
    """The choices with which `c` fits, each of them needed: without any one it would not. Those that leave least
    lacking if it does not fit with all there are, either (ask `lacks` again).

    lacks: bytes that a configuration is too large, 0 if it fits. serves: whether there is what a precision needs. kept:
    knobs to leave alone.

    They are made in the order of CHOICES until all fits, those that give nothing left out, and again from the first
    for as long as that helps: some give only beside others. Then they are taken back, the last of CHOICES first, where
    others have made them needless: what costs most quality is what is spared first.
    """
    chosen: tuple[Choice, ...] = ()
    tried = None
    while tried != chosen:
        tried = chosen
        for choice in CHOICES:
            lacking = lacks(made(c, chosen))
            if not lacking:
                break
            more = _in_order((*chosen, choice))
            allowed = choice not in chosen and choice.knob not in kept
            if allowed and serves(made(c, more).precision) and lacks(made(c, more)) < lacking:
                chosen = more
    for choice in reversed(chosen):
        others = without(chosen, choice)
        if lacks(made(c, others)) <= lacks(made(c, chosen)):
            chosen = others
    return chosen


def made(c: Configuration, choices: Iterable[Choice]) -> Configuration:
    """`c` with these choices made."""
    for choice in choices:
        c = choice.change(c) or c
    return c


def without(choices: Iterable[Choice], one: Choice) -> tuple[Choice, ...]:
    """All of them but one."""
    return tuple(each for each in choices if each is not one)


def _in_order(choices: Iterable[Choice]) -> tuple[Choice, ...]:
    return tuple(sorted(choices, key=CHOICES.index))


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
        if not c.geometry.image_tokens + ROOM <= tokens < c.geometry.context:
            return None
        return replace(c, geometry=replace(c.geometry, context=tokens))

    return change


def _precision(precision: Precision) -> Change:
    """In the default blocks, or the largest that divide this model's weights."""

    def change(c: Configuration) -> Configuration | None:
        if c.fixed or precision not in c.precision.smaller:
            return None
        block = c.block if c.block in precision.block_sizes else None
        size = precision.block_size(block, c.backend)
        fitting = fitting_blocks(quantised_tensors(c.geometry, c.head, c.floats).values())
        if size != COLUMN and size not in fitting:
            if not fitting:
                return None
            block = fitting[-1]
        return replace(c, precision=precision, block=block)

    return change


# From what costs least to what costs most: time, then quality. The page budget and lazy projection are not among them:
# they save reading and computing, not memory.
CHOICES = (
    Choice("residency", _residency, "opening vision and page projection again for every new image"),
    Choice("kv", _int8_pages, Quality("fp32, kv int8", "65 of 65", "0.997")),
    Choice("kv_cache", _int8_cache, Quality("fp32, kv cache int8", "64 of 65", "0.980")),
    *(Choice("context", _context(tokens), "shorter questions, answers, conversations") for tokens in (1536, 1024)),
    Choice("precision", _precision(INT8), Quality("int8, columns", "57 of 65", "0.899")),
    Choice("precision", _precision(INT4), Quality("int4, blocks of 16", "34 of 65", "0.623")),
)
