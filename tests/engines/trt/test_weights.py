"""What TensorRT-RTX makes of quantised weights, built on this CPU, and the GPUs that a precision is refused for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from engines.bundle.folder import Bundle
from engines.bundle.kinds import TENSORRT, TENSORRT_RTX
from engines.bundle.precision import COLUMN, FP8, INT4, INT8
from engines.errors import OptionError
from engines.sizing.fit import require_boards, require_sms
from engines.sizing.needs import Configuration
from engines.trt.build import build_engines
from engines.trt.options import EngineOptions
from export.build import BuildOptions, build, parse_arguments, print_sizes, read_recipe
from tests.conftest import once
from tests.engines.trt.rtx_layers import layers_of, log_of, plugins_of
from tests.geometries import official, tiny

G = tiny(hidden=256, intermediate=512, head_dim=64)


@pytest.fixture(autouse=True)
def own_cache(shared, monkeypatch):
    """Timings of tests go nowhere else."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared / "cache"))


def engine(shared, checkpoint, precision: str, block: int | None, *sms: int) -> Bundle:
    """The wide model with engines for `sms`; logs beside it."""
    knobs = EngineOptions(TENSORRT_RTX, targets=sms, keep_log=True)
    out = shared / f"wide-rtx-{precision}-{block}"
    options = BuildOptions(checkpoint, out, precision, block, backend=TENSORRT_RTX, check="none", engines=knobs)
    return Bundle(once(out, lambda _: build(options)))


@pytest.mark.parametrize(
    ("precision", "block", "share"),
    [("int4", 128, 0.7), ("int8", 128, 0.3), ("int8", COLUMN, 0.6), ("fp8", COLUMN, 0.55)],
)
def test_quantised_weights_in_the_engine(shared, random_model, precision, block, share):
    """Blocks of int4 and columns of int8 stay as they are stored, but for what a plan needs besides weights, and are
    unpacked inside the product that reads them. So do columns of fp8, but for gate_proj and up_proj of each
    layer, which the builder joins: those are unpacked by a kernel of their own in every step.

    So are blocks of int8, all of them, some already by the builder: the engine is smaller than float16's, not faster.
    """
    checkpoint, _ = random_model("wide", G)
    plans, weights = [], []
    for name, size in (("fp16", None), (precision, block)):
        bundle = engine(shared, checkpoint, name, size, 89, 120)
        manifest, decoder = bundle.manifest, bundle.manifest.parts["decoder"]
        plans.append(manifest.files[decoder.plans[TENSORRT_RTX].file].bytes)
        weights.append(manifest.files[decoder.weights].bytes)
        log = log_of(bundle.path, "decoder")
        assert len(plugins_of(log)) == G.layers + len(G.selecting_layers)
    print(precision, block, plans, weights)
    assert plans[0] - plans[1] > share * (weights[0] - weights[1]) > 0, (plans, weights)
    names = [layer.name.split("_myl0")[0] for layer in layers_of(log)]
    unpacking = [name for name in names if "CastMulCast" in name]
    apart = [name for name in unpacking if not name.endswith("CastMulCastFc")]
    if (precision, block) == ("int8", 128):
        assert len(apart) == len(unpacking) >= 4 * G.layers, Counter(names)
    else:
        assert len(unpacking) == 6 * G.layers and len(apart) == (G.layers if precision == "fp8" else 0), Counter(names)


def test_what_is_stored_apart_in_the_engine(shared, random_model):
    """int8 columns of vision and of lm_head stay as they are stored, and vision's are unpacked inside its products."""
    checkpoint, _ = random_model("wide-table", replace(G, vocab=8192))
    plans, weights = {}, {}
    for name, apart in (("plain", {}), ("apart", {"head": "int8", "vision": "int8"})):
        knobs = EngineOptions(TENSORRT_RTX, targets=(89,), plugins=False, keep_log=True)
        out = shared / f"wide-table-{name}"
        options = BuildOptions(
            checkpoint, out, "int8", COLUMN, backend=TENSORRT_RTX, check="none", engines=knobs, **apart
        )
        bundle = Bundle(once(out, lambda _, options=options: build(options)))
        files, parts = bundle.manifest.files, bundle.manifest.parts
        plans[name] = {part: files[parts[part].plans[TENSORRT_RTX].file].bytes for part in ("vision", "decoder")}
        weights[name] = {part: files[parts[part].weights].bytes for part in ("vision", "decoder")}
    print(plans, weights)
    saved = weights["plain"]["decoder"] - weights["apart"]["decoder"]
    assert saved == 8192 * 256 - 8192 * 2 and plans["plain"]["decoder"] - plans["apart"]["decoder"] > 0.9 * saved
    names = [layer.name for layer in layers_of(log_of(bundle.path, "vision"))]
    assert any("CastMulCast" in name for name in names), Counter(names)


# What cannot be built, and how that is said.


def test_fp8_is_refused_where_there_is_none():
    c = Configuration(official(), FP8, backend=TENSORRT)
    (warning,) = require_sms(c, (89, 90, 110, 120))
    assert "gate_proj and up_proj" in warning and require_boards(c, ("agx-thor-128", "h100-80")) == []
    with pytest.raises(OptionError, match="fp8 on sm_86, sm_87") as caught:
        require_sms(c, (86, 87, 89, 120))
    assert "SM 8.9" in caught.value.expected and "sm_89,sm_120" in caught.value.fix
    with pytest.raises(OptionError, match="fp8 on sm_87") as caught:
        require_sms(c, (87,))
    assert "--target" not in caught.value.fix
    with pytest.raises(OptionError, match="precision fp8 on agx-orin-64") as caught:
        require_boards(c, ("agx-orin-64",))
    assert "int8" in caught.value.expected and "fp8" not in caught.value.expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["--backend", "tensorrt-rtx"],
        ["--backend", "tensorrt-rtx", "--target", "sm_86,sm_89"],
        ["--backend", "tensorrt", "--target", "sm_87"],
        ["--target", "orin-nx-16"],
    ],
)
def test_a_build_is_refused_before_any_work(random_model, tmp_path, arguments):
    checkpoint, _ = random_model("wide", G)
    options = parse_arguments(["--fp8", "--model", str(checkpoint), "--out", str(tmp_path / "bundle"), *arguments])
    with pytest.raises(OptionError, match="precision fp8"):
        build(options)
    assert not (tmp_path / "bundle").exists()


def test_a_finished_bundle_is_refused_too(shared, random_model):
    checkpoint, _ = random_model("wide", G)
    bundle = engine(shared, checkpoint, "fp8", None, 89, 120)
    with pytest.raises(OptionError, match="fp8 on sm_86"):
        build_engines(bundle.path, EngineOptions(TENSORRT_RTX), quiet=True)


def test_blocks_of_int8_are_warned_of_with_tensorrt_rtx():
    for block in (None, 32, 128):
        (warning,) = require_sms(Configuration(official(), INT8, block, backend=TENSORRT_RTX), (86,))
        assert "--block-size column" in warning
    for backend in (TENSORRT, TENSORRT_RTX):
        assert require_sms(Configuration(official(), INT8, COLUMN, backend=backend), (86,)) == []
        assert require_sms(Configuration(official(), INT4, backend=backend), (86,)) == []
        assert require_sms(Configuration(official(), backend=backend), (86,)) == []


def test_blocks_of_int8_are_refused_with_tensorrt():
    """Its documentation has blocks of INT4, never of INT8. What is meant without --block-size, it takes."""
    assert require_sms(Configuration(official(), INT8, backend=TENSORRT), ()) == []
    c = Configuration(official(), INT8, 128, backend=TENSORRT)
    with pytest.raises(OptionError, match="int8 in blocks of 128 with tensorrt") as caught:
        require_sms(c, ())
    assert caught.value.fix == "add --block-size column"
    with pytest.raises(OptionError, match="int8 in blocks of 128") as caught:
        require_sms(replace(c, fixed=True), (87,))
    assert "onnxruntime" in caught.value.fix and "column" not in caught.value.fix


def test_int8_for_tensorrt_is_in_columns_unless_told_otherwise(random_model, tmp_path):
    checkpoint, _ = random_model("wide", G)
    arguments = ["--int8", "--model", str(checkpoint), "--out", str(tmp_path / "bundle"), "--check", "none"]
    plain, rtx = (read_recipe(parse_arguments([*arguments, "--backend", name])) for name in (TENSORRT, TENSORRT_RTX))
    assert plain.coding.block == COLUMN and rtx.coding.block == 128
    for knob in (["--block-size", "128"], ["--block-size", "128", "--plan"]):
        asked = parse_arguments([*arguments, "--backend", TENSORRT, "--target", "orin-nx-16", *knob])
        with pytest.raises(OptionError, match="int8 in blocks of 128 with tensorrt"):
            print_sizes(asked) if "--plan" in knob else build(asked)
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(OptionError, match="calibrate with int8 and one scale for a column"):
        parse_arguments([*arguments, "--backend", TENSORRT, "--calibrate", "examples"])
