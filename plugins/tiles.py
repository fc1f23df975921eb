"""How each kernel cuts its work on each SM: data, one row per choice, with where its numbers come from.

A kernel names in `Kernel.tile` those of its constants that set the cut and not the result. An op declares a kernel with
`tiled(Kernel(...))`, which adds those constants, the warps and the stages of the row for every SM; that code runs where
there is no other, and its PTX on GPUs nobody has heard of. plugins/compiler/kernels.py compiles `tiled(kernel, sm)` for
each SM. Which of them a GPU runs is known when it launches (Artifacts.on): the op takes the sizes of its grid from the
constants of the kernels it is given (Op.launches_of), never from here, so that older code with other tiles runs, too.

Nothing but Python is needed here: a board reads it as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from plugins.op import FIRST_SM, MODEL_DTYPES, Kernel

HALVES = "float16", "bfloat16"  # what tensor cores multiply; float32 they would round
# Bytes of shared memory one program may have: CUDA's programming guide, compute capabilities.
SHARED_LIMIT = {
    80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10,
    100: 227 << 10, 110: 227 << 10, 120: 99 << 10, 121: 99 << 10,
}  # fmt: skip
LEAST_SHARED = min(SHARED_LIMIT.values())  # what every GPU has


@dataclass(frozen=True)
class Tile:
    """One row.

    kernel: its name. constants: those of its tl.constexpr parameters that set the cut. warps, stages: of its Triton
    program. source: what the choice rests on. sms: where it holds; none: wherever no other row does. most: it is for
    kernels whose constants of these names are no larger. dtypes: of the model. native: compiled for the SM's own
    architecture, whose code no other SM runs, and not from the text that all share.
    """

    kernel: str
    constants: tuple[tuple[str, int], ...]
    warps: int
    stages: int
    source: str
    sms: tuple[int, ...] = ()
    most: tuple[tuple[str, int], ...] = ()
    dtypes: tuple[str, ...] = MODEL_DTYPES
    native: bool = False

    def holds(self, kernel: Kernel, sm: int | None) -> bool:
        """Whether it is for this kernel on this SM; None: on whatever has no row of its own."""
        constants = dict(kernel.constants)
        return (
            kernel.name == self.kernel
            and (not self.sms or sm in self.sms)
            and dtype_of(kernel) in self.dtypes
            and all(constants[name] <= most for name, most in self.most)
        )


def _projection(rows: int, width: int, lanes: int, programs: int) -> tuple[tuple[str, int], ...]:
    """The constants of a row of `project_pages`. How many programs share the work was chosen, not measured: as many as
    run at one time, since most launches find nothing new, and then cost what it takes to start them."""
    return ("ROWS", rows), ("WIDTH", width), ("LANES", lanes), ("PROGRAMS", programs)


# The first row that holds is taken: those for some SMs or smaller sizes stand before those for all.
TILES: tuple[Tile, ...] = (
    Tile("append", (("ROWS", 32),), 4, 2, "chosen: small, and not measured against others"),
    Tile("dequantise", (("ROWS", 32),), 4, 2, "as `append`"),
    Tile("prefill", (("ROWS", 16), ("BLOCK", 16)), 4, 2, "no tensor cores: products are unrolled", dtypes=("float32",)),
    Tile(
        "prefill", (("ROWS", 64), ("BLOCK", 64)), 4, 3, sms=(90,), dtypes=HALVES, native=True,
        source="measured on an H100, head size 128: 31.9 us at 717 tokens, 58.3 at 1,199; 112 KB of shared memory",
    ),
    Tile(
        "prefill", (("ROWS", 128), ("BLOCK", 64)), 8, 3, sms=(100, 110), dtypes=HALVES, native=True,
        source="chosen: ptxas keeps it in registers, and it fits; it has run nowhere",
    ),
    Tile(
        "prefill", (("ROWS", 128), ("BLOCK", 64)), 8, 3, most=(("WIDTH", 64),), dtypes=HALVES,
        source="chosen: that of head size 128 in half the shared memory; not measured against others",
    ),
    Tile(
        "prefill", (("ROWS", 128), ("BLOCK", 32)), 8, 3, most=(("HEAD_DIM", 127),), dtypes=HALVES,
        source="chosen: with a padded head's masks, 64 keys a tile spill; at head size 128 an H100 took 54 and 105 us",
    ),
    Tile(
        "prefill", (("ROWS", 128), ("BLOCK", 64)), 8, 3, dtypes=HALVES,
        source="measured on an H100, head size 128: 48 us at 717 tokens, 90 at 1,199; 64x64 by 4 warps: 51 and 97. Its "
        "96 KB of shared memory fit every SM, and none has registers for a second program of 8 warps",
    ),
    Tile(
        "attend", (("BLOCK", 64),), 4, 2, dtypes=("float32",),
        source="chosen: at head size 128 a tile of float32 keys and values takes the registers of four warps",
    ),
    Tile(
        "attend_pages", (("BLOCK", 64),), 4, 2, dtypes=("float32",), source="as `attend`",
    ),
    Tile("attend", (("BLOCK", 64),), 2, 2, "measured on an H100: 9.5 us, of 128 keys by 4 warps 10.3 (1,200 tokens)"),
    Tile("attend_pages", (("BLOCK", 64),), 2, 2, "as `attend`"),
    Tile("combine", (("MAP_BLOCK", 64),), 4, 2, "chosen: small, and not measured against others"),
    Tile(
        "project_pages", _projection(16, 16, lanes=8, programs=64), 4, 2, dtypes=("float32",),
        source="no tensor cores: products are unrolled",
    ),
    Tile(
        "project_pages", _projection(128, 64, lanes=8, programs=132), 8, 4, sms=(90,), most=(("INT8_PAGES", 0),),
        native=True,
        source="tile measured on an H100: 124 us for 10 pages, 936 for 81; its 128 KB of shared memory leave each "
        "of the 132 multiprocessors room for one program",
    ),
    Tile(
        "project_pages", _projection(64, 64, lanes=16, programs=264), 4, 4, sms=(90,),
        source="tile measured on an H100, not with int8 pages: 172 us for 10 pages, 1,412 for 81. With int8 pages and "
        "float16, ptxas says that it runs wgmma one at a time, which was not measured",
    ),
    Tile(
        "project_pages", _projection(128, 64, lanes=8, programs=148), 8, 4, sms=(100,), native=True,
        source="chosen: as on SM 90, for the 148 multiprocessors of a B200; it has run nowhere",
    ),
    Tile(
        "project_pages", _projection(128, 64, lanes=4, programs=20), 8, 4, sms=(110,), native=True,
        source="chosen: as on SM 90, for the 20 multiprocessors of a Thor; it has run nowhere",
    ),
    Tile(
        "project_pages", _projection(64, 64, lanes=16, programs=216), 4, 4, sms=(80,),
        source="tile measured on an H100: 172 us for 10 pages, 1,412 for 81; each of an A100's 108 multiprocessors has "
        "room for two programs",
    ),
    Tile(
        "project_pages", _projection(128, 64, lanes=4, programs=48), 8, 3, sms=(87,),
        source="chosen: the tile of all others; Orins have 8 to 16 multiprocessors, and 4 MB of cache, in which the "
        "features of 4 tiles stay while every head reads them",
    ),
    Tile(
        "project_pages", _projection(128, 64, lanes=8, programs=128), 8, 3,
        source="tile measured on an H100: 200 us for 10 pages, 1,422 for 81; it fits every SM, and reads weights half "
        "as often as 64 tokens a tile do, whose 4 warps would be alone on SMs 86, 89 and 120",
    ),
)  # fmt: skip


def dtype_of(kernel: Kernel) -> str:
    """What the model computes in, by the kernel's parameters; float32 where none of them has another type."""
    kinds = {kind for _, kind in kernel.parameters}
    return "float16" if "*fp16" in kinds else "bfloat16" if "*bf16" in kinds else "float32"


def tiled(kernel: Kernel, sm: int | None = None) -> Kernel:
    """The kernel as it is compiled for an SM, or without one for any: with the constants of its row. A kernel without a
    row stays as it is. ValueError for a row whose constants the kernel does not call its tile."""
    row = next((row for row in TILES if row.holds(kernel, sm)), None)
    if row is None:
        return kernel
    strange = {name for name, _ in row.constants} - set(kernel.tile)
    if strange:
        raise ValueError(f"{kernel.name}: {sorted(strange)} of its row are not among its tile, {kernel.tile}")
    constants = dict(kernel.constants) | dict(row.constants)
    arch = sm if row.native and sm is not None else FIRST_SM
    return replace(kernel, constants=tuple(constants.items()), warps=row.warps, stages=row.stages, arch=arch)
