"""What fits where, and what is proposed when it does not."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from engines import cuda
from engines.bundle.kinds import ONNXRUNTIME, TENSORRT, TENSORRT_RTX
from engines.bundle.precision import INT4, INT8
from engines.cuda import Cuda
from engines.errors import BackendError, OptionError
from engines.sizing.fit import (
    SYSTEM_RESERVE,
    Room,
    advice,
    assess,
    builder_advice,
    changes,
    require_boards,
    room_of,
    this_machine,
    verdict,
)
from engines.sizing.needs import Configuration, needs, weight_bytes
from engines.targets import TARGETS, target
from tests.emulator.driver import Driver
from tests.geometries import official


def on(name: str, **knobs):
    board = target(name)
    return assess(Configuration(official(), backend=board.backend, **knobs), room_of(board))


def total(c: Configuration) -> int:
    return sum(need.bytes for need in needs(c, integrated=True))


def test_7b_on_boards():
    assert on("agx-orin-64").fits and on("orin-nx-16", precision=INT4).fits and on("rtx-4090").fits
    nx = on("orin-nx-16")
    assert not nx.runs and not nx.fits and nx.room.usable == 16 * 10**9 - SYSTEM_RESERVE
    assert changes(nx.configuration, nx.proposal.configuration) == "--int4" and nx.proposal.fits
    assert (
        nx.larger == "agx-orin-64" and advice(nx) == "add --int4 (in place of --fp16); or as it is, it fits agx-orin-64"
    )
    assert verdict(nx) == f"needs {nx.total / 1e9:.1f} GB, has 14.5 GB of 16.0 GB"
    nano = on("orin-nano-8", precision=INT4)
    assert not nano.fits and nano.proposal.fits and nano.larger == "orin-nx-16"  # and what fits takes many choices
    assert advice(nano).startswith("add --layers-per-engine 8 --residency shared --kv int8 --kv-cache int8;")


def test_engines_that_fit_where_their_builder_does_not():
    found = on("orin-nx-16", precision=INT8)
    assert found.runs and not found.builds and not found.fits
    said = builder_advice(found)
    assert "9 GB of swap" in said and "build on agx-orin-64" in said and "add --int4" in said
    layers = int(re.match(r"add --layers-per-engine (\d+), or add", said)[1])
    assert on("orin-nx-16", precision=INT8, layers_per_engine=layers).fits
    engines = -(-32 // layers)  # as few as can be
    assert not on("orin-nx-16", precision=INT8, layers_per_engine=-(-32 // (engines - 1))).fits
    warnings = require_boards(found.configuration, ("orin-nx-16",))
    assert len(warnings) == 1 and "orin-nx-16: the builder needs" in warnings[0]
    card = on("rtx-4090")  # its engines are built anywhere: 29 GB of another memory
    assert card.builder > card.room.memory and card.builds and not card.builds_here


def test_a_parser_that_copies_weights_is_counted():
    """TensorRT 10.3 of JetPack 6 does; nothing that is installed on a card need be as old, and TensorRT-RTX maps."""
    weights = max(weight_bytes(Configuration(official(), backend=TENSORRT)).values())
    orin, thor, card = (on(name).builder for name in ("agx-orin-64", "agx-thor-128", "rtx-4090"))
    assert orin - thor == weights and thor == card
    server = target("h100-80")
    assert assess(Configuration(official(), backend=TENSORRT), room_of(server)).builder == card


def test_another_sm_does_not_build_for_this_one():
    """Engines of Orin are not built on Thor, whatever its memory."""
    big = Configuration(official(layers=95))
    found = assess(big, room_of(target("agx-orin-64")))
    assert found.runs and not found.builds and found.larger == "agx-thor-128"
    assert "agx-thor-128" not in builder_advice(found)


@pytest.mark.parametrize(
    ("room", "knobs", "proposed"),
    [
        # Of 19.8 GB 64 tokens of the cache are 33.6 MB. A smaller context is tried first,
        (19_500_000_000, {}, "--context 1536"),
        (20_000_000_000, {"batch": 2}, "--batch 1"),  # then the batch, where no context does,
        (19_000_000_000, {"batch": 2}, "--int8"),  # then the precision, where no batch does either,
        (15_000_000_000, {}, "--int8"),
        (12_300_000_000, {}, "--int4"),  # before two knobs, which would be --context 1088 --int8;
        (9_000_000_000, {}, "--context 1792 --int4"),  # and at last all that is needed
        (9_000_000_000, {"batch": 3}, "--context 1792 --batch 1 --int4"),
        (8_100_000_000, {}, "--context 1728 --kv int8 --int4"),
        (7_500_000_000, {}, "--context 1152 --kv int8 --kv-cache int8 --int4"),
        # and where that is not enough, whatever it takes: engines/sizing/choices.py.
        (7_200_000_000, {}, "--residency shared --kv int8 --int4"),
        (3_900_000_000, {}, None),
        # Where pages are int8 already, and no context is much smaller, the cache is next,
        (18_100_000_000, {"geometry": official(context=832, int8_pages=True)}, "--kv-cache int8"),
        (17_900_000_000, {"geometry": official(context=832, int8_pages=True)}, "--int8"),  # before the precision.
    ],
)
def test_the_nearest_configuration(room, knobs, proposed):
    c = Configuration(**{"geometry": official(), **knobs}, backend=TENSORRT_RTX)
    found = assess(c, Room("a room", room))
    assert found.larger is None
    if proposed is None:
        assert found.proposal is None and "no smaller configuration" in advice(found)
        return
    other = found.proposal.configuration
    assert changes(c, other) == proposed and total(other) <= room < total(c)


def test_no_int8_cache_is_proposed_where_there_is_none():
    c = Configuration(official(context=832, int8_pages=True), backend=TENSORRT_RTX)
    proposed = []
    for plugins in (True, False):
        asked = replace(c, plugins=plugins)
        proposed.append(changes(asked, assess(asked, Room("a room", total(asked) - 10**8)).proposal.configuration))
    assert proposed == ["--kv-cache int8", "--int8"]


def test_a_smaller_context_is_the_largest_that_fits():
    c = Configuration(official(), backend=TENSORRT_RTX)
    for room in range(19_400_000_000, 19_770_000_000, 90_000_000):
        other = assess(c, Room("a room", room)).proposal.configuration
        more = Configuration(official(context=other.geometry.context + 64), backend=TENSORRT_RTX)
        assert total(other) <= room < total(more)


def test_precisions_a_target_does_not_serve():
    with pytest.raises(OptionError, match="precision int4 on a card") as caught:
        assess(Configuration(official(), INT4), Room("a card", 10**11, precisions=("fp16", "bf16")))
    assert "fp16, bf16" in caught.value.expected
    small = assess(Configuration(official()), Room("a card", 10**10, precisions=("fp16", "bf16")))
    assert small.proposal is None  # nor does a proposal name one


def test_boards_are_checked_before_work():
    c = Configuration(official())
    assert require_boards(c, ()) == require_boards(c, ("agx-orin-64",)) == []
    with pytest.raises(OptionError, match=r"orin-nx-16 needs 19\.8 GB, has 14\.5 GB") as caught:
        require_boards(c, ("agx-orin-64", "orin-nx-16"))
    assert "--int4" in caught.value.fix and "agx-orin-64" in caught.value.fix
    with pytest.raises(OptionError, match=r"unknown target 'orin'(.|\n)*orin-nano-8"):
        require_boards(c, ("orin",))


def test_this_machine(monkeypatch):
    assert this_machine(ONNXRUNTIME).memory > 0 and this_machine(ONNXRUNTIME).bandwidth is None
    assert assess(Configuration(official(), backend=ONNXRUNTIME), Room("here", 10**12)).speed is None
    room = this_machine(TENSORRT, Cuda(Driver(sm=87, integrated=True, total=16 << 30)))
    assert room.memory == 16 << 30 and room.integrated and room.reserved == SYSTEM_RESERVE and room.bandwidth is None
    monkeypatch.setattr(cuda, "_import", lambda: Driver(devices=0))
    with pytest.raises(BackendError, match=r"this machine's GPU.*CUDA_ERROR_NO_DEVICE") as caught:
        this_machine(TENSORRT)  # nothing is assumed of a GPU that is not there
    assert "--target orin-nx-16" in caught.value.fix


def test_targets_say_which_backend_is_theirs():
    backends = {name: each.backend for name, each in TARGETS.items()}
    assert {name for name, backend in backends.items() if backend == TENSORRT_RTX} == {
        "rtx-3090", "rtx-4090", "rtx-5090",
    }  # fmt: skip
