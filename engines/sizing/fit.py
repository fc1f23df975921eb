"""Whether a configuration fits a board, and what would: engines/sizing/needs.py says what it needs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

from engines.bundle.kinds import ONNXRUNTIME, TENSORRT
from engines.bundle.precision import COLUMN, FP32, INT8, Precision, block_name
from engines.bundle.tensors import APART, MODEL
from engines.errors import BackendError, OptionError
from engines.memory import available_bytes
from engines.residency import SHARED
from engines.sizing.builder import MAPS_WEIGHTS, largest_build
from engines.sizing.choices import LEAST_TEXT, Choice, Held, fits_with, in_precision, made
from engines.sizing.machine import look_at
from engines.sizing.needs import Configuration, Need, needs, size, speed
from engines.targets import TARGETS, Target, target

if TYPE_CHECKING:
    from engines.cuda import Cuda

# Assumed, on the high side: what is not there for a request.
SYSTEM_RESERVE = 1_500_000_000  # of a board that shares its memory: carve-outs, Linux, a desktop
DISPLAY_RESERVE = 500_000_000  # of a card's own memory

# The command that builds the bundle anew as another configuration, where there is a bundle; where one is only being
# built, what to add to its command is told.
Again = Callable[[Configuration], str]


@dataclass(frozen=True)
class Room:
    """Memory to fit into, bytes. reserved: for others. bandwidth: GB/s, None when unknown. integrated: one memory for
    host and device. precisions: of weights it serves besides float32, by name, None when unknown. copies: whether some
    TensorRT for it copies the weights it builds from."""

    name: str
    memory: int
    reserved: int = 0
    bandwidth: int | None = None
    integrated: bool = True
    precisions: tuple[str, ...] | None = None
    copies: bool = False

    @property
    def usable(self) -> int:
        """Bytes that are left."""
        return self.memory - self.reserved

    def serves(self, precision: Precision) -> bool:
        """Whether it has what a precision needs, as far as that is known."""
        return self.precisions is None or precision == FP32 or precision.name in self.precisions


@dataclass(frozen=True)
class Assessment:
    """A configuration against a room.

    needs: of a request. builder: bytes of the largest engine build, 0 for a backend without. builds_here: whether they
    are this room's to give; engines of TensorRT are built on the board, of TensorRT-RTX anywhere. speed: tokens per
    second at most, (slowest, fastest) step, None when the bandwidth is unknown. proposal: the nearest configuration
    that fits, or that only needs another place to build, when this one does not fit. larger: the smallest target of
    the same kind where this one fits.
    """

    configuration: Configuration
    room: Room
    needs: tuple[Need, ...]
    builder: int
    builds_here: bool
    speed: tuple[float, float] | None
    proposal: Assessment | None
    larger: str | None

    @property
    def total(self) -> int:
        """Bytes a request needs."""
        return sum(need.bytes for need in self.needs)

    @property
    def runs(self) -> bool:
        """Whether a request fits."""
        return self.total <= self.room.usable

    @property
    def builds(self) -> bool:
        """Whether the builder fits, as far as that is this room's affair."""
        return not self.builds_here or self.builder <= self.room.usable

    @property
    def fits(self) -> bool:
        """Whether all does."""
        return self.runs and self.builds

    @property
    def lacks(self) -> int:
        """Bytes that a request and the builder are too large, together."""
        builder = self.builder - self.room.usable if self.builds_here else 0
        return max(0, self.total - self.room.usable) + max(0, builder)


def room_of(board: Target) -> Room:
    """The memory of a target."""
    reserved = SYSTEM_RESERVE if board.integrated else DISPLAY_RESERVE
    return Room(board.name, board.memory, reserved, board.bandwidth, board.integrated, board.precisions, _copies(board))


def _copies(board: Target) -> bool:
    """Of what one installs oneself the newest is there: only what comes with a board is old."""
    return any(each.jetpack and each.tensorrt_version < MAPS_WEIGHTS for each in board.software)


def this_machine(backend: str, cuda: Cuda | None = None) -> Room:
    """The memory of this machine: of its GPU for TensorRT, what is free for ONNX Runtime on the CPU.

    `cuda`: to look at something else than its first GPU. BackendError when there is none.
    """
    if backend == ONNXRUNTIME:
        return Room("this machine", available_bytes())
    try:
        found = look_at(cuda)
    except BackendError as error:
        fix = "name a board, such as --target orin-nx-16"
        raise BackendError(
            f"the memory of this machine's GPU: {error.found}", expected=error.expected, fix=fix
        ) from error
    board = found.target
    reserved = SYSTEM_RESERVE if found.integrated else DISPLAY_RESERVE
    room = Room(f"this machine's {found.name}", found.memory, reserved, integrated=found.integrated)
    if board is None:
        return room
    return replace(room, bandwidth=board.bandwidth, precisions=board.precisions, copies=_copies(board))


def assess(c: Configuration, room: Room) -> Assessment:
    """Whether `c` fits, and what would. OptionError when the target does not serve the precision."""
    require_served(c, room)
    found = measured(c, room)
    if found.fits:
        return found
    fitting = next((b.name for b in larger_than(room) if measured(c, room_of(b)).fits), None)
    return replace(found, proposal=_nearest(found) or _by_choices(found), larger=fitting)


def choices_for(c: Configuration, room: Room, kept: Collection[str] = ()) -> tuple[Choice, ...]:
    """See fits_with."""

    def held(other: Configuration) -> Held:
        found = measured(other, room)
        return Held(found.lacks, found.total + found.builder * found.builds_here)

    return fits_with(c, held, room.serves, kept)


def _by_choices(found: Assessment) -> Assessment | None:
    """With as many choices as it takes."""
    other = measured(made(found.configuration, choices_for(found.configuration, found.room)), found.room)
    return other if other.fits else None


def require_served(c: Configuration, room: Room) -> None:
    """OptionError when the target does not serve the precision."""
    if not room.serves(c.precision):
        served = ", ".join((FP32.name, *(room.precisions or ())))
        raise OptionError(f"precision {c.precision} on {room.name}", expected=f"one of {served}")


def larger_than(room: Room) -> list[Target]:
    """Targets of the same kind as a target with more memory, the smallest first; none for this machine."""
    alike = [board for board in TARGETS.values() if board.integrated == room.integrated and room.name in TARGETS]
    return [b for b in sorted(alike, key=lambda b: b.memory) if b.memory > room.memory]


def require_boards(c: Configuration, boards: tuple[str, ...], again: Again | None = None) -> list[str]:
    """OptionError, with the nearest configuration that fits, when a request does not fit one of `boards`; what to do on
    boards where only the builder does not fit, or where parts must take turns in memory. again: see Again."""
    warnings = []
    for name in boards:
        found = assess(c, room_of(target(name)))
        if not found.runs:
            turns = measured(replace(c, residency=SHARED), found.room)
            if not turns.runs:
                raise OptionError(f"{name} {verdict(found)}", fix=advice(found, again))
            warnings.append(f"{name} {verdict(found)}: run it there with --residency {SHARED}, which {verdict(turns)}")
            found = replace(turns, proposal=found.proposal, larger=found.larger)
        if not found.builds:
            warnings.append(f"{name}: {builder_verdict(found)}; {builder_advice(found, again)}")
    return warnings


def require_sms(c: Configuration, sms: Sequence[int], again: Again | None = None) -> list[str]:
    """OptionError when TensorRT cannot build weights that are stored so for one of these SMs; what to know about the
    engines of those it can build. again: see Again.

    What is warned of was seen in engines of TensorRT-RTX 1.7 (tests/engines/trt/test_weights.py).
    """
    p, least = c.precision, c.precision.least_sm or 0
    if c.backend != ONNXRUNTIME and c.coding.embeddings:
        raise OptionError(
            f"embeddings in {c.embeddings} with {c.backend}",
            expected="embeddings in the dtype of activations: TensorRT takes no constant of int8 but right before a "
            "DequantizeLinear, which would unpack the whole table",
            fix=_other(c, replace(c, embeddings=MODEL), again),
        )
    old = [sm for sm in sms if sm < least]
    if old:
        able = [sm for sm in sms if sm not in old]
        fix = f"--target {','.join(f'sm_{sm}' for sm in able)}, or " if able else ""
        raise OptionError(
            f"precision {p} on {', '.join(f'sm_{sm}' for sm in old)}",
            expected=f"GPUs of SM {least / 10} or newer",
            fix=fix + _other(c, in_precision(c, INT8, COLUMN), again),
        )
    if p.e4m3:
        return [
            f"{p}: TensorRT-RTX unpacks gate_proj and up_proj of each layer in a kernel of its own in every step; "
            f"--int8 --block-size column takes as many bytes, is unpacked by the products alone, and rounds less"
        ]
    if p.quantises and not p.takes(block := p.block_size(c.block, c.backend), c.backend):
        own = "the checkpoint's own blocks need another backend: onnxruntime, or tensorrt-rtx where it serves the GPU"
        raise OptionError(
            f"{p} in blocks of {block_name(block)} with {c.backend}",
            expected="one scale for each column: its documentation has no blocks of such weights",
            fix=own if c.fixed else _other(c, replace(c, block=COLUMN), again),
        )
    if p == INT8 and p.block_size(c.block, c.backend) != COLUMN:
        return [
            f"{p} in blocks: TensorRT-RTX unpacks such weights in a kernel of its own in every step, and keeps some as "
            "float16; --block-size column is read as it is stored, by the product itself"
        ]
    return []


def verdict(a: Assessment) -> str:
    """Needs and has, of a request."""
    of = f" of {size(a.room.memory)}" if a.room.reserved else ""
    return f"needs {size(a.total)}, has {size(a.room.usable)}{of}"


def builder_verdict(a: Assessment) -> str:
    """Needs and has, of the builder."""
    return f"the builder needs {size(a.builder)}, has {size(a.room.usable)}"


def advice(a: Assessment, again: Again | None = None) -> str:
    """What fits instead. again: see Again."""
    ways = [] if a.proposal is None else [_proposal(a, a.proposal, again)]
    ways += [] if a.larger is None else [f"as it is, it fits {a.larger}"]
    return "; or ".join(ways) or "no smaller configuration of this model fits, nor a larger board known here"


def builder_advice(a: Assessment, again: Again | None = None) -> str:
    """What to do where engines run but cannot be built. again: see Again."""
    missing = a.builder - a.room.usable
    swap = f"add {-(-missing // 10**9)} GB of swap on the board for the build"
    if layers := _layers_that_fit(a):
        swap = f"add --layers-per-engine {layers}, or {swap}"
    same = a.larger and target(a.larger).sm == target(a.room.name).sm
    other = f", or build on {a.larger} with the same TensorRT version and copy the bundle" if same else ""
    proposal, asked = a.proposal, a.configuration
    if proposal and replace(proposal.configuration, layers_per_engine=asked.layers_per_engine) == asked:
        proposal = None  # which is said already
    return f"{swap}{other}" + (f", or {_proposal(a, proposal, again)}" if proposal else "")


def _layers_that_fit(a: Assessment) -> int | None:
    """Layers an engine with which the builder fits, in as few engines of about one size as can be; None if
    one layer alone takes too much."""
    c = a.configuration
    for engines in range(2, c.geometry.layers + 1):
        layers = -(-c.geometry.layers // engines)
        if measured(replace(c, layers_per_engine=layers), a.room).fits:
            return layers
    return None


def changes(old: Configuration, new: Configuration) -> str:
    """The command-line options that make `new` of `old`."""
    options = [f"--context {new.geometry.context}"] if new.geometry.context != old.geometry.context else []
    options += [f"--batch {new.batch}"] if new.batch != old.batch else []
    options += [f"--slots {new.slots}"] if new.slots != old.slots else []
    parts = new.layers_per_engine
    options += [f"--layers-per-engine {parts}"] if parts not in (None, old.layers_per_engine) else []
    options += [f"--residency {new.residency}"] if new.residency != old.residency else []
    slots, lazy = new.geometry.page_slots, new.geometry.lazy_pages
    options += ["--projection lazy"] if lazy != old.geometry.lazy_pages else []
    options += [f"--page-slots {slots}"] if slots != old.geometry.page_slots else []
    options += ["--kv int8"] if new.geometry.int8_pages != old.geometry.int8_pages else []
    options += ["--kv-cache int8"] if new.geometry.int8_cache != old.geometry.int8_cache else []
    options += [f"--{new.precision}"] if new.precision != old.precision else []
    options += [f"--block-size {block_name(new.block)}"] if new.block not in (None, old.block) else []
    same = old.head == old.precision.name and new.head == new.precision.name  # --quantize-head, of both
    options += [
        f"--{kind} {getattr(new, kind)}"
        for kind in APART
        if getattr(new, kind) != getattr(old, kind) and not (same and kind == "head")
    ]
    return " ".join(options)


def _other(old: Configuration, new: Configuration, again: Again | None) -> str:
    """How to get `new` instead of `old`."""
    if again:
        return f"build the bundle again: {again(new)}"
    gone = [f"--{old.precision}"] if new.precision != old.precision else []  # the command line takes one of them
    gone += ["--block-size"] if old.block is not None and new.block is None else []
    return f"add {changes(old, new)}" + (f" (in place of {' and '.join(gone)})" if gone else "")


def _proposal(a: Assessment, proposal: Assessment, again: Again | None) -> str:
    words = _other(a.configuration, proposal.configuration, again)
    return words if proposal.builds else f"{words}, and build elsewhere or with swap: {builder_verdict(proposal)}"


def measured(c: Configuration, room: Room) -> Assessment:
    """Whether `c` fits, and nothing of what else would."""
    copied = c.backend == TENSORRT and room.copies
    builder = 0 if c.backend == ONNXRUNTIME else largest_build(c, copied=copied)
    builds_here = c.backend == TENSORRT and room.integrated
    rate = None if room.bandwidth is None else speed(c, room.bandwidth)
    return Assessment(c, room, needs(c, integrated=room.integrated), builder, builds_here, rate, None, None)


def _nearest(found: Assessment) -> Assessment | None:
    """What fits with the fewest knobs changed; of equally many, first those that change a smaller context, then the
    slots, or the batch where there are none, then int8 pages, then an int8 cache, then the precision, int8 before int4.
    Each knob is changed as little as fits.

    The page budget and lazy projection are not among them: they save reading and computing, not memory. Nor is an int8
    cache for TensorRT without plugins, which has none.
    """
    c, room, g = found.configuration, found.room, found.configuration.geometry
    steps = [] if c.fixed else [each for each in c.precision.smaller if room.serves(each)]
    precisions, either = (c.precision, *steps), (False, True)
    caches = either if not g.int8_cache and (c.plugins or c.backend == ONNXRUNTIME) else (False,)
    ways = product(precisions, caches, either[: 2 - g.int8_pages], either, either)
    # Of equally many, ways that change their last knobs come first; but a smaller context before fewer rows.
    order = sorted(
        (way for way in ways if way != (c.precision, False, False, False, False)),
        key=lambda way: ((way[0] != c.precision) + sum(way[1:]), precisions.index(way[0]), way[1:3], not way[4]),
    )
    goals: list[Callable[[Assessment], bool]] = [lambda a: a.fits, lambda a: a.runs]
    for wanted in goals[:1] if found.runs else goals:  # with the builder if that is possible
        for precision, int8_cache, int8_pages, rows, context in order:
            cache, pages = g.int8_cache or int8_cache, g.int8_pages or int8_pages
            geometry = replace(g, int8_cache=cache, int8_pages=pages)
            for fewer in _fewer_rows(c) if rows else (c,):
                other = replace(in_precision(fewer, precision, c.block), geometry=geometry)
                shorter = _largest_context(other, room, wanted) if context else other
                if shorter is not None and wanted(fitting := measured(shorter, room)):
                    return fitting
    return None


def _fewer_rows(c: Configuration) -> Iterator[Configuration]:
    """`c` with fewer slots, where it has some, else with a smaller batch; the largest first."""
    for rows in range(c.rows - 1, 0, -1):
        yield replace(c, slots=rows, batch=min(c.batch, rows)) if c.slots > 1 else replace(c, batch=rows)


def _largest_context(c: Configuration, room: Room, wanted: Callable[[Assessment], bool]) -> Configuration | None:
    """`c` with the largest smaller context, a multiple of 64, that is wanted; None if there is none."""
    least = -(-(c.geometry.image_tokens + LEAST_TEXT) // 64)
    low, high = least, (c.geometry.context - 1) // 64

    def shorter(blocks: int) -> Configuration:
        return replace(c, geometry=replace(c.geometry, context=64 * blocks))

    if low > high or not wanted(measured(shorter(low), room)):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if wanted(measured(shorter(middle), room)) else (low, middle - 1)
    return shorter(low)
