"""`--fit`: what is made smaller so that a model fits, and what that costs."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from engines.bundle.kinds import ONNXRUNTIME, TENSORRT, TENSORRT_RTX
from engines.bundle.precision import FP16, FP32, INT4, INT8
from engines.errors import OptionError
from engines.sizing.choices import CHOICES, Quality, made, without
from engines.sizing.fit import Assessment, Room, changes, room_of
from engines.sizing.fitting import fit
from engines.sizing.needs import Configuration
from engines.targets import target
from tests.geometries import official, tiny
from tests.paths import ROOT

KNOBS = {choice.knob for choice in CHOICES}


def as_it_is(c: Configuration, room: Room) -> Assessment:
    """Held against a room with nothing chosen."""
    return fit(c, room, KNOBS).assessment


@pytest.mark.parametrize("backend", [TENSORRT_RTX, ONNXRUNTIME])
def test_every_choice_is_needed(backend):
    """Whatever the room: with all of them it fits, without any one it does not."""
    c = Configuration(official(), backend=backend)
    all_of_it, fitting = as_it_is(c, Room("a room", 10**12)).total, 0
    for share in range(36, 100, 7):
        room = Room("a room", all_of_it * share // 100)
        found = fit(c, room)
        chosen = tuple(gain.choice for gain in found.gains)
        if not found.assessment.fits:
            continue
        assert found.assessment.configuration == made(c, chosen)
        assert found.assessment.total <= room.usable
        for gain in found.gains:
            other = as_it_is(made(c, without(chosen, gain.choice)), room)
            assert not other.fits and gain.request == other.total - found.assessment.total > 0
        fitting += 1
    assert fitting > 5


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: f"{choice.knob} {CHOICES.index(choice)}")
def test_every_choice_gives_something(choice):
    """And is made, where what it gives is enough and nothing else may be chosen."""
    precision = INT4 if choice.knob in ("head", "vision") else FP16  # which there are beside codes alone
    backend = ONNXRUNTIME if choice.knob == "embeddings" else TENSORRT_RTX
    c = Configuration(official(), precision, backend=backend)
    c = made(c, (each for each in CHOICES if each.knob == choice.knob and CHOICES.index(each) < CHOICES.index(choice)))
    smaller, room = choice.change(c), Room("a room", 10**12)
    assert smaller is not None and choice.change(smaller) in (None, smaller)
    before, after = as_it_is(c, room), as_it_is(smaller, room)
    assert changes(c, smaller).startswith("--")
    if choice.knob == "layers_per_engine":  # of the builder alone, which soon takes less than a request
        assert before.builder > after.builder and before.total <= after.total
        return
    room = Room("a room", after.total)
    (gain,) = fit(c, room, KNOBS - {choice.knob}).gains
    assert gain.choice is choice and gain.words == changes(c, smaller)
    assert gain.request == as_it_is(c, room).total - as_it_is(smaller, room).total > 0


def test_what_costs_most_is_spared_first():
    """int8 makes room enough for all that was made smaller before it, but for the builder."""
    nx = room_of(target("orin-nx-16"))
    found = fit(Configuration(official(), backend=TENSORRT), nx)
    words = changes(found.asked, found.assessment.configuration)
    assert words == "--layers-per-engine 16 --int8" and found.assessment.fits
    engines, precision = found.gains
    assert engines.words == "--layers-per-engine 16" and engines.builder > 10**10 and engines.request == 0
    assert precision.words == "--int8" and precision.request > 7 * 10**9 and precision.faster > 4
    # Where the builder is not the board's affair, what costs less is enough.
    c = Configuration(official(), backend=TENSORRT_RTX)
    found = fit(c, Room("a room", 18_300_000_000), KNOBS - {"kv", "kv_cache", "context", "precision"})
    assert [gain.words for gain in found.gains] == ["--kv int8", "--kv-cache int8", "--context 1536"]
    assert fit(c, Room("a room", 20 * 10**9)).gains == ()


def test_what_is_kept_is_not_chosen():
    c, room = Configuration(official(), backend=TENSORRT_RTX), Room("a room", 18_300_000_000)
    found = fit(c, room, KNOBS - {"kv_cache", "precision"})
    assert [gain.words for gain in found.gains] == ["--int8"]
    assert fit(replace(c, fixed=True), Room("a room", 9 * 10**9)).assessment.configuration.precision == c.precision
    without_plugins = fit(replace(c, plugins=False), Room("a room", 9 * 10**9))
    assert not without_plugins.assessment.configuration.geometry.int8_cache
    with pytest.raises(OptionError, match="precision fp16 on orin"):
        fit(c, replace(room, name="orin", precisions=("int4",)))


def test_blocks_that_divide_the_weights_are_chosen():
    c = Configuration(tiny(), FP32, backend=ONNXRUNTIME)
    change = {choice.costs.row: choice.change for choice in CHOICES if choice.knob == "precision"}
    assert [made.block for made in (change["int4, blocks of 16"](c), change["int8, columns"](c))] == [16, 16]
    assert change["int8, columns"](replace(c, backend=TENSORRT)).block is None  # columns
    odd = replace(tiny(), intermediate=50)
    assert change["int4, blocks of 16"](replace(c, geometry=odd)) is None
    assert change["int4, blocks of 16"](replace(c, precision=INT4)) is None
    assert change["int8, columns"](replace(c, precision=INT4)) is None and change["int4, blocks of 16"](
        replace(c, precision=INT8, block=16)
    )


def test_no_context_is_chosen_without_room_for_a_question():
    assert (
        fit(Configuration(tiny(), backend=ONNXRUNTIME), Room("a room", 10**6)).assessment.configuration.geometry.context
        == 160
    )


def test_a_board_that_holds_it_in_no_configuration():
    """Which is the smallest that does, with choices of its own, and what is missing where none is known."""
    large = official(layers=64, hidden=8192, heads=64, kv_heads=64, intermediate=28672)
    nx = fit(Configuration(large, backend=TENSORRT), room_of(target("orin-nx-16")))
    assert not nx.assessment.fits and nx.gains == () and nx.larger == "agx-orin-64"
    assert "--int4" in changes(nx.asked, nx.assessment.configuration)
    assert not as_it_is(nx.asked, room_of(target("agx-orin-64"))).fits
    huge = replace(large, layers=400)
    thor = fit(Configuration(huge, backend=TENSORRT), room_of(target("agx-thor-128")))
    assert not thor.assessment.fits and thor.larger is None


def test_costs_are_the_rows_of_the_figures():
    """Of the precisions' table in docs/figures.md."""
    rows = dict[str, tuple[str, str]]()
    for line in (ROOT / "docs/figures.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) > 5 and re.fullmatch(r"\d+ of \d+", cells[4]):
            rows[cells[0]] = cells[4], min(cells[3].split(), key=float)
    qualities = [choice.costs for choice in CHOICES if isinstance(choice.costs, Quality)]
    assert qualities and all(rows[each.row] == (each.tokens, each.iou) for each in qualities)
