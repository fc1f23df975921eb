"""flex::ProjectPages: ONNX body and kernel against the reference, and the reference against the plain product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from plugins.artifacts import Artifacts
from plugins.cached_attention.reference import rotary
from plugins.op import Kernel
from plugins.project_pages import onnx_body, onnx_int8, onnx_slots
from plugins.project_pages.launch import ProjectPages
from plugins.tiles import TILES, tiled
from tests.emulator.interpreter import call
from tests.plugins.checks import check_int8_projection, check_page_slots, check_projection
from tests.plugins.harness import Run, by_body, by_reference
from tests.plugins.inputs import (
    PROJECTION_CASES,
    projection_inputs,
    projection_op,
)

RUNS = [(by_body(onnx_body.FUNCTIONS), dtype) for dtype in ("float32", "float16")]
RUNS += [(call, dtype) for dtype in ("float32", "float16", "bfloat16")]


@pytest.mark.parametrize("case", PROJECTION_CASES)
@pytest.mark.parametrize(("run", "dtype"), RUNS, ids=lambda each: getattr(each, "__name__", each))
def test_equals_the_reference(case, run, dtype):
    check_projection(PROJECTION_CASES[case], dtype, run)


def test_reference_projects_what_is_wanted_and_nothing_else():
    arrays = projection_inputs(counts=(4,), done=(2,))
    made = by_reference(projection_op(arrays), "float32", arrays)
    given = {name: torch.from_numpy(array) for name, array in arrays.items()}
    key, value, present = (torch.from_numpy(array) for array in made.values())
    wanted = set(given["pages"][0, :4].tolist())
    for page in range(9):
        held = bool(given["projected"][0, page])
        assert bool(present[0, page]) == (held or page in wanted)
        if held:
            assert torch.equal(key[0, :, page], given["page_key"][0, :, page])
            assert torch.equal(value[0, :, page], given["page_value"][0, :, page])
        elif page in wanted:
            features = given["features"][0, page]
            plain = (features @ given["key_weight"].T).view(1, 4, 2, 16).transpose(1, 2)
            turned = rotary(plain, given["cos"][0, page][None, None], given["sin"][0, page][None, None])[0]
            torch.testing.assert_close(key[0, :, page], turned)
            expected = (features @ given["value_weight"].T).view(4, 2, 16).transpose(0, 1)
            torch.testing.assert_close(value[0, :, page], expected)
        else:
            assert key[0, :, page].isnan().all()


def cut(change: Callable[[Kernel], Kernel]) -> Run:
    """The kernel in the interpreter with another tile."""

    class Cut(ProjectPages):
        def make_kernels(self, dtype):
            return tuple(map(change, super().make_kernels(dtype)))

    return lambda op, dtype, inputs: call(Cut(**op.attributes), dtype, inputs)


@pytest.mark.parametrize("sm", [sm for row in TILES if row.kernel == "project_pages" for sm in row.sms])
def test_as_each_sm_cuts_it(sm):
    """Tiles of several pages, the last of them not full."""
    run = cut(lambda kernel: tiled(kernel, sm))
    check_projection(PROJECTION_CASES["some"], "float16", run)
    check_int8_projection(PROJECTION_CASES["some"], "float16", run)


@pytest.mark.parametrize("programs", [1, 5, 64])
@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_programs_share_many_tiles(lanes, programs):
    """Pages begin within tiles and end in others, and programs have several tiles of several heads, or none."""
    small = {"ROWS": 16, "WIDTH": 16, "LANES": lanes, "PROGRAMS": programs}
    run = cut(lambda kernel: replace(kernel, constants=tuple((dict(kernel.constants) | small).items())))
    check_projection({"counts": (8, 5), "done": (0, 3), "page_size": 11, "hidden": 24}, "float16", run)


def test_code_of_an_older_version_has_its_grid():
    """A program per head, and eight that share its pages: what is launched is what the code was compiled for."""
    old = Artifacts.read(Path(__file__).parent / "data" / "format-1-float.zip")
    (found,) = (c.kernel for c in old.compiled if c.kernel.name == "project_pages")
    constants = {name.lower(): value for name, value in found.constants}
    names = "hidden", "kv_heads", "head_dim", "page_size"
    op = ProjectPages(**{name: constants[name] for name in names}, cells=3)
    shapes = {"features": (2, 9, op.attributes["page_size"], op.attributes["hidden"])}
    addresses = {tensor.name: 256 for tensor in (*op.inputs, *op.outputs)}
    (launch,) = op.launches("float16", shapes, addresses, 0, old.on(op.kernels("float16"), 86))
    assert launch.kernel == found and launch.grid == (8, 2 * op.attributes["kv_heads"], 2)


FACES = {  # of floats and of int8: as a store of every page, in slots
    "reference": ((by_reference, by_reference), (by_reference, by_reference)),
    "onnx": (
        (by_body(onnx_body.FUNCTIONS), by_body(onnx_slots.FUNCTIONS)),
        (by_body(onnx_int8.FUNCTIONS), by_body(onnx_slots.INT8_FUNCTIONS)),
    ),
    "kernel": ((call, call), (call, call)),
}


@pytest.mark.parametrize("case", PROJECTION_CASES)
@pytest.mark.parametrize("int8", [False, True], ids=["floats", "int8"])
@pytest.mark.parametrize("face", FACES)
def test_a_new_page_goes_to_its_slot_and_nothing_else_changes(face, int8, case):
    check_page_slots(PROJECTION_CASES[case], "float16", *FACES[face][int8], int8=int8)
