"""The gate itself: what ONNX Runtime really does in float16 passes, and every single thing wrong with it does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engines.bundle.folder import Bundle
from engines.ort import OrtModel
from tests.parity.gates import BOUNDS, GPU_BOUNDS, ReplayStep, failures, measure, replayed, together
from tests.parity.official import Case, recorded

FP16 = BOUNDS["fp16"]


@pytest.fixture(scope="module")
def portrait() -> Case:
    """A run with flips in float16, and close runner-ups."""
    return recorded("portrait")


@pytest.fixture(scope="module")
def steps(portrait, bundle) -> list[ReplayStep]:
    model = OrtModel(Bundle(bundle("fp16")))
    return replayed(portrait, model, model.geometry)


def changed(steps: list[ReplayStep], index: int, **change) -> list[ReplayStep]:
    return [*steps[:index], replace(steps[index], **change), *steps[index + 1 :]]


def shifted(steps: list[ReplayStep], index: int, by: float, of=slice(None)) -> list[ReplayStep]:
    """Logits of one step (some: those of `of`) larger by this much, and the token they make."""
    logits = steps[index].logits.copy()
    logits[of] += by
    return changed(steps, index, logits=logits, token=int(logits.argmax()))


def problems(case: Case, steps: list[ReplayStep], bounds=FP16) -> str:
    """What the gate says, after checking that it says one thing at most."""
    found = failures(measure(case, steps), bounds)
    assert len(found) <= 1, found
    return "".join(found)


def test_float16_passes(portrait, steps):
    assert problems(portrait, steps) == problems(portrait, steps, GPU_BOUNDS["fp16"]) == ""


def test_a_wrong_token(portrait, steps):
    """In a step with a flip, where the logits may be farther off than the runner-up is: the flip excuses no token."""
    golden = portrait.golden
    index = next(i for i in range(12, 0, -1) if FP16.gap < golden["logit_gap"][i] < 0.15)
    second = int(np.argsort(golden["logits"][index])[-2])
    lead = steps[index].logits.max() - steps[index].logits[second]
    cells = portrait.cells(index).copy()
    cells[0, 0] ^= True
    flipped = changed(steps, index, cells=cells)
    assert problems(portrait, flipped) == ""
    assert "another token" in problems(portrait, shifted(flipped, index, float(lead) + 0.01, second))


def test_a_token_that_is_not_the_largest_logit(portrait, steps):
    index = int(portrait.golden["logit_gap"].argmin())  # so close that another token alone would pass
    second = int(np.argsort(steps[index].logits)[-2])
    assert "largest logit" in problems(portrait, changed(steps, index, token=second))


def test_one_flip_too_many(portrait, steps):
    right = np.stack([portrait.cells(index) for index in range(len(steps))])
    allowed = int(FP16.flips * right.size)
    flipped = sum(int((step.cells != cells).sum()) for step, cells in zip(steps, right, strict=True))
    assert 0 < flipped < allowed
    cells = steps[-1].cells.copy()
    agree = np.argwhere(cells == right[-1])
    for at in agree[: allowed - flipped]:
        cells[tuple(at)] ^= True
    assert problems(portrait, changed(steps, -1 % len(steps), cells=cells)) == ""
    cells[tuple(agree[allowed - flipped])] ^= True
    over = changed(steps, -1 % len(steps), cells=cells)
    assert "flipped" in problems(portrait, over)
    # Over several runs the share is that of all their cells.
    runs = [measure(portrait, each) for each in (over, steps)]
    assert failures(together(runs), FP16) == [] and failures(together([runs[0]] * 2), FP16)


@pytest.mark.parametrize("index", [0, 12])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_logit_that_is_no_number(portrait, steps, index, value):
    logits = steps[index].logits.copy()
    logits[3] = value
    found = failures(measure(portrait, changed(steps, index, logits=logits)), FP16)
    assert any("in all steps: inf" in text for text in found), found


def test_a_shifted_logit(portrait, steps):
    """All logits of the first step, before any flip; one logit of the last, after flips: each by more than allowed."""
    found = measure(portrait, steps)
    assert 0 < found.clean <= FP16.logits and found.clean < found.always <= FP16.always
    early = failures(measure(portrait, shifted(steps, 0, 2 * FP16.logits)), FP16)
    assert any("before any flip" in text for text in early)
    low = int(steps[-1].logits.argmin())
    found = failures(measure(portrait, shifted(steps, len(steps) - 1, -2 * FP16.always, low)), FP16)
    assert any("in all steps" in text for text in found)


def test_float32_is_exact(portrait, steps):
    """What passes in float16 fails in float32, of which one flip and one token are one too many."""
    exact = BOUNDS["fp32"]
    assert len(failures(measure(portrait, steps), exact)) >= 2
    perfect = [
        ReplayStep(logits, int(token), portrait.cells(index))
        for index, (logits, token) in enumerate(
            zip(portrait.golden["logits"], portrait.golden["output_ids"][1:], strict=True)
        )
    ]
    assert problems(portrait, perfect, exact) == ""
    cells = perfect[5].cells.copy()
    cells[0, 0] ^= True
    assert "flipped" in problems(portrait, changed(perfect, 5, cells=cells), exact)
    index = int(portrait.golden["logit_gap"].argmin())
    second = int(np.argsort(perfect[index].logits)[-2])
    assert any(
        "another token" in text for text in failures(measure(portrait, changed(perfect, index, token=second)), exact)
    )


def test_bfloat16_fails_the_gate_of_float16(portrait, bundle):
    """A whole backend that computes too coarsely, not one number that was changed."""
    model = OrtModel(Bundle(bundle("bf16")))
    assert failures(measure(portrait, replayed(portrait, model, model.geometry)), FP16)


def test_an_error_in_a_step_that_agrees_again(portrait, steps):
    """Cells that differed before excuse no logits where they are the official ones again."""
    first = next(i for i, step in enumerate(steps) if (step.cells != portrait.cells(i)).any())
    index = next(i for i in range(first, len(steps)) if np.array_equal(steps[i].cells, portrait.cells(i)))
    low = int(steps[index].logits.argmin())
    assert "with the official cells" in problems(portrait, shifted(steps, index, -0.1, low))


def test_missing_steps_and_other_shapes(portrait, steps):
    with pytest.raises(ValueError, match="longer"):
        measure(portrait, steps[:-1])
    with pytest.raises(ValueError, match="step 2"):
        measure(portrait, changed(steps, 2, cells=steps[2].cells[:1]))
