"""flex::ProjectPages: ONNX body and kernel against the reference, and the reference against the plain product."""

from __future__ import annotations

import pytest
import torch

from plugins.cached_attention.reference import rotary
from plugins.project_pages import onnx_body
from tests.emulator.interpreter import call
from tests.plugins.checks import check_projection
from tests.plugins.harness import by_body, by_reference
from tests.plugins.inputs import PROJECTION_CASES, projection_inputs, projection_op

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
