"""What the options and the checkpoint's configuration settle between them, for a build and for its sizes alike."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from engines.bundle.kinds import ONNXRUNTIME, PLUGINS_ALONE, TENSORRT, TENSORRT_RTX
from engines.bundle.manifest import PROMPT_TEMPLATE
from engines.bundle.precision import COLUMN, FP8, FP16, INT4, INT8, Scheme
from engines.bundle.tensors import Coding
from engines.errors import OptionError
from engines.trt.options import EngineOptions
from export.checkpoint.config import ModelConfig
from export.checkpoint.packed_settings import Packing
from export.options import BuildOptions, parse_arguments
from export.recipe import Recipe, settle
from tests.geometries import official, tiny

CONFIG = ModelConfig(official(), 1, (2,), PROMPT_TEMPLATE, None)


def settled(config: ModelConfig = CONFIG, **options: object) -> Recipe:
    return settle(BuildOptions(model=Path("a/b"), **options), config)


def test_nothing_given():
    recipe = settled()
    assert recipe.folder == Path("build/b-fp16") and recipe.precision == FP16 and recipe.coding == Coding()
    assert recipe.page_budget == 81 and recipe.geometry == official() and recipe.config == CONFIG
    assert recipe.backend == ONNXRUNTIME and recipe.engines is None
    open_still = [each.name for each in fields(recipe) if getattr(recipe, each.name) is None]
    assert open_still == ["calibrate", "engines"]  # there are none of these: nothing is left to a default


def test_defaults_of_block_sizes_and_engines():
    assert settled(precision="int8").coding == Coding(Scheme(INT8, 128))
    assert settled(precision="fp8").coding == Coding(Scheme(FP8, COLUMN))
    blocks = Scheme(INT4, 32)
    assert settled(precision="int4", block_size=32, quantize_head=True).coding == Coding(blocks, blocks)
    assert settled(backend=TENSORRT).engines == EngineOptions(TENSORRT)
    given = EngineOptions(TENSORRT_RTX, batch=3)
    recipe = settled(backend=TENSORRT_RTX, engines=given)
    assert recipe.engines is given and recipe.configuration().batch == 3 and recipe.configuration(7).batch == 7


def test_the_geometry_is_the_bundles():
    g = settled(context=1024, projection="lazy", kv="int8").geometry
    assert g == replace(official(), context=1024, lazy_pages=True, int8_pages=True)
    recipe = settled(kv_cache="int8")  # of ordinary tokens alone
    assert recipe.geometry == replace(official(), int8_cache=True)
    assert recipe.record(None)["kv_cache"] == "int8" and recipe.record(None)["kv"] == "model"
    assert recipe.record(None)["page_slots"] is None
    recipe = settled(projection="lazy", page_slots=24)
    assert recipe.geometry == replace(official(), lazy_pages=True, page_slots=24)
    assert recipe.record(None)["page_slots"] == 24


def test_a_packed_checkpoint_brings_its_own():
    packing = Packing("gptq", 4, 64, True, only=("self_attn.q_proj",))
    recipe = settled(replace(CONFIG, packing=packing), quantize_head=False)
    assert recipe.folder == Path("build/b-int4") and recipe.precision == INT4
    assert recipe.coding.block == 64 and len(recipe.coding.floats) == 32 * 6 + 2 * 23
    c = recipe.configuration()
    assert c.fixed and c.floats == recipe.coding.floats and c.precision == INT4
    with pytest.raises(OptionError, match="--calibrate for a checkpoint that is quantised already"):
        settled(replace(CONFIG, packing=packing), precision="int4", calibrate=Path("examples"))


def test_what_a_packed_checkpoint_holds_as_floats_may_be_stored_in_codes():
    packing = Packing("gptq", 4, 64, True)
    apart = {"precision": "int4", "head": "int8", "vision": "int8", "embeddings": "int8"}
    columns = Scheme(INT8, COLUMN)
    coding = settled(replace(CONFIG, packing=packing), **apart).coding
    assert coding == replace(coding, head=columns, vision=columns, embeddings=replace(columns, rows=True))
    assert coding.linear == Scheme(INT4, 64)
    with pytest.raises(OptionError, match="--head int8 for a checkpoint that is quantised already") as caught:
        settled(replace(CONFIG, packing=replace(packing, head=True)), **apart)
    assert caught.value.fix.startswith("--int4 --block-size 64 --quantize-head, ")
    same = settled(replace(CONFIG, packing=replace(packing, head=True)), **apart | {"head": "int4"}).coding
    assert same.head == same.linear


@pytest.mark.parametrize(
    ("g", "options", "text"),
    [
        (official(), {"page_budget": 82}, "--page-budget 82"),
        (official(), {"context": 4096}, "a context of 4096"),
        (tiny(attention_bias=True), {"projection": "lazy"}, "attention biases"),
        (tiny(), {"projection": "lazy", "page_slots": 17}, r"--page-slots 17(.|\n)*1 .. 16"),
        (tiny(zoom=2, cells=3), {"projection": "lazy", "page_slots": 4}, "16 hi-res tokens a side in 3 cells"),
        (tiny(), {"precision": "int4"}, "blocks of 128 do not divide"),  # sizes of what cannot be built are none
        (tiny(tied_embeddings=True), {"precision": "int4", "block_size": 16, "quantize_head": True}, "shares"),
    ],
)
def test_what_a_model_does_not_admit(g, options, text):
    with pytest.raises(OptionError, match=text):
        settled(replace(CONFIG, geometry=g), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"context": 4096},
        {"context": 1},
        {"context": -5},
        {"page_budget": 82},
        {"page_budget": -1},
        {"projection": "lazy", "page_slots": 0},
        {"projection": "lazy", "page_slots": 82},
        {"projection": "lazy"},
        {"precision": "int8", "block_size": 64},
        {"precision": "int4", "quantize_head": True},
    ],
    ids=str,
)
def test_the_advice_is_taken(options):
    """What a fix names is an option of the command, and is accepted in place of what was refused."""
    odd = tiny(attention_bias=True, tied_embeddings=True)
    model = Path("a/b")
    is_odd = "precision" in options or options == {"projection": "lazy"}
    config = replace(CONFIG, geometry=odd if is_odd else official())
    with pytest.raises(OptionError) as caught:
        settle(BuildOptions(model=model, **options), config)
    advice = caught.value.fix.split(", or")[0].split()
    if advice[0] == "leave":  # the last option that was refused
        command = [f"--{options['precision']}", "--block-size", "16"]
        assert advice[2:] == ["--quantize-head"]
    else:
        command = advice + ([f"--{options['precision']}"] if "precision" in options else [])
        command += ["--projection", "lazy"] if "page_slots" in options else []
    settle(replace(parse_arguments(command), model=model), config)


@pytest.mark.parametrize("slots", [True, 2.0, "24"])
def test_page_slots_are_a_number(slots):
    with pytest.raises(OptionError, match="page_slots"):
        settled(projection="lazy", page_slots=slots)


def test_page_slots_need_lazy_pages():
    with pytest.raises(OptionError, match="page_slots 24 with projection eager") as caught:
        parse_arguments(["--page-slots", "24"])
    assert caught.value.fix == "add --projection lazy, or leave out --page-slots"
    assert parse_arguments(["--page-slots", "24", "--projection", "lazy"]).page_slots == 24


@pytest.mark.parametrize(("option", "why"), PLUGINS_ALONE.values())
def test_what_needs_plugins(option, why):
    line = ["--backend", TENSORRT, "--no-plugins", *option.split()]
    with pytest.raises(OptionError, match=f"{option} with --no-plugins: TensorRT alone {why}") as caught:
        parse_arguments(line)
    assert caught.value.fix == f"leave out {option}, or --no-plugins"
    assert parse_arguments(line[:3]).engines.plugins is False
    assert parse_arguments([*line[:2], *line[3:]]).engines.plugins


def test_a_context_that_holds_no_image_and_question():
    with pytest.raises(OptionError, match="this model's context of 70 tokens") as caught:
        settled(replace(CONFIG, geometry=tiny(context=70)))
    assert "at least 72" in caught.value.expected


def test_the_record_has_every_knob_and_no_path():
    options = BuildOptions(Path("/a/b"), Path("/c/d"), "int8", 64, calibrate=Path("/e/f"), backend=TENSORRT)
    record = settle(options, CONFIG).record({"examples": 3})
    knobs = {each.name for each in fields(BuildOptions)} - {"engines", "fit"}  # which is recorded as what it chose
    assert set(record) == knobs | {"floats", "calibration", "not_obeyed", TENSORRT}
    assert (record["model"], record["out"], record["calibrate"]) == ("b", "d", "f")
    assert (record["precision"], record["block_size"], record["page_budget"]) == ("int8", 64, 81)
    assert record[TENSORRT]["batch"] == 1 and record[TENSORRT]["boards"] == []
