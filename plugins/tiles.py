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


# The first row that holds is taken: those for some SMs or smaller sizes stand before those for all.
TILES: tuple[Tile, ...] = (
    Tile("append", (("ROWS", 32),), 4, 2, "chosen: small, and not measured against others"),
    Tile("prefill", (("ROWS", 16), ("BLOCK", 16)), 4, 2, "no tensor cores: products are unrolled", dtypes=("float32",)),
    Tile("prefill", (("ROWS", 64), ("BLOCK", 64)), 4, 2, "as landed", most=(("WIDTH", 64),), dtypes=HALVES),
    Tile("prefill", (("ROWS", 64), ("BLOCK", 32)), 4, 2, "as landed", dtypes=HALVES),
    Tile("attend", (("BLOCK", 64),), 2, 2, "measured on an H100: 9.5 us, of 128 keys by 4 warps 10.3 (1,200 tokens)"),
    Tile("attend_pages", (("BLOCK", 64),), 2, 2, "as `attend`"),
    Tile("combine", (("MAP_BLOCK", 64),), 4, 2, "chosen: small, and not measured against others"),
)


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
