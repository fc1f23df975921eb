"""What is stored in codes beside the linear layers: lm_head, vision, embeddings (--head, --vision, --embeddings)."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from engines.bundle.folder import Bundle
from engines.bundle.kinds import ONNXRUNTIME, PARTS, TENSORRT, TENSORRT_RTX, TRACED
from engines.bundle.manifest import PROMPT_TEMPLATE
from engines.bundle.precision import COLUMN, FP8, INT4, INT8, Scheme
from engines.bundle.rebuild import apart_of
from engines.bundle.tensors import EMBEDDINGS, HEAD, MODEL, Coding, coding_of, in_vision
from engines.errors import OptionError, ParityError
from engines.ort import OrtModel
from engines.sizing.fit import require_sms
from engines.sizing.needs import Configuration, step_bytes, weight_bytes
from export.build import BuildOptions, build, parse_arguments, read_recipe
from export.check import limits_of, parity
from export.checkpoint.config import ModelConfig
from export.checkpoint.folder import Checkpoint
from export.recipe import settle
from export.weights.stored import Stored, stored_weights
from tests.checkpoints import write_checkpoint
from tests.conftest import once
from tests.geometries import official, tiny

G = tiny(hidden=64, intermediate=128, head_dim=16)
ALL = {"head": "int8", "vision": "int8", "embeddings": "int8"}
BUILDS = {  # name -> options
    "all": {"precision": "int4", "block_size": 32, **ALL},
    "blocks": {"precision": "int8", "block_size": COLUMN, "head": "int4", "vision": "model"},
    "table": {"precision": "fp16", "embeddings": "int8"},
}
OFFICIAL_7B = ModelConfig(official(), 1, (2,), PROMPT_TEMPLATE, None)
LINEAR_VISION = 2 * 6 + 2  # of the tiny tower's two blocks, and of its projector


@pytest.fixture
def built(shared):
    """built(name of BUILDS) -> (checkpoint, bundle), parity-checked."""

    def get(name: str) -> tuple[Path, Path]:
        g = tiny(hidden=128, intermediate=128, head_dim=32) if name == "blocks" else G  # int4's default block divides
        folder = shared / f"choices-checkpoint-{g.hidden}"
        checkpoint = once(folder, lambda path: write_checkpoint(path, g))
        options = BuildOptions(checkpoint, shared / f"choices-{name}", **BUILDS[name])
        return checkpoint, once(options.out, lambda _: build(options))

    return get


def opened(checkpoint: Path) -> Checkpoint:
    return Checkpoint.open(checkpoint, checkpoint / "clip")


def test_a_parity_checked_bundle_says_what_it_stores(built):
    bundle = Bundle(built("all")[1])
    assert apart_of(bundle.manifest) == ALL
    assert {kind: bundle.manifest.options[kind] for kind in ALL} == ALL
    stored = Stored(bundle)
    found = {name: stored.schemes[name] for name in (HEAD, EMBEDDINGS)}
    assert found == {HEAD: Scheme(INT8, COLUMN), EMBEDDINGS: Scheme(INT8, COLUMN, rows=True)}
    vision = {scheme for name, scheme in stored.schemes.items() if in_vision(name)}
    assert vision == {Scheme(INT8, COLUMN)} and sum(map(in_vision, stored.schemes)) == LINEAR_VISION
    assert stored.schemes == read_recipe(BuildOptions(built("all")[0], **BUILDS["all"])).coding.schemes(G)


@pytest.mark.parametrize("name", BUILDS)
def test_sizes_are_the_files(built, name):
    checkpoint, folder = built(name)
    recipe = read_recipe(BuildOptions(checkpoint, **BUILDS[name]))
    found = {part: (folder / f"{part}.weights").stat().st_size for part in PARTS}
    assert weight_bytes(recipe.configuration()) == found


def test_only_the_rows_that_are_read_are_unpacked(built):
    """The table goes into a gather and nowhere else, traced and in ONNX Runtime, whose optimiser may not undo it."""
    folder = built("table")[1]
    bundle = Bundle(folder)
    for kind in (TRACED, ONNXRUNTIME):
        graph = ir.load(bundle.graph("decoder", kind)).graph
        uses = [use.node for use in graph.initializers[EMBEDDINGS].uses()]
        assert [node.op_type for node in uses] == ["Gather"]
        assert graph.initializers[EMBEDDINGS].dtype == ir.DataType.INT8


def test_onnxruntime_keeps_the_table_and_multiplies_with_the_codes(built, tmp_path):
    folder = Path(shutil.copytree(built("all")[1], tmp_path / "bundle"))
    model, expected = OrtModel(Bundle(folder)), {"vision": LINEAR_VISION, "decoder": 7 * 5 + 1}
    for part, count in expected.items():
        model._options.optimized_model_filepath = str(folder / f"{part}.optimised.onnx")
        model.session(Bundle(folder).graph(part, ONNXRUNTIME))
        graph = ir.load(folder / f"{part}.optimised.onnx").graph
        bits = [node.attributes["bits"].as_int() for node in graph if node.op_type == "MatMulNBits"]
        assert len(bits) == count and bits.count(8) == (1 if part == "decoder" else count)
        tables = [value.shape.numpy() for value in graph.initializers.values() if value.dtype == ir.DataType.INT8]
        assert tables.count((G.vocab, G.hidden)) == (part == "decoder")
        floats = ir.DataType.FLOAT, ir.DataType.FLOAT16
        copies = [value for value in graph.initializers.values() if value.dtype in floats]
        assert not any(value.shape.numpy() == (G.vocab, G.hidden) for value in copies)


def test_embeddings_are_within_half_a_step_of_the_checkpoints(built):
    checkpoint, folder = built("table")
    table = opened(checkpoint).tensor(EMBEDDINGS).float()
    found = Stored(Bundle(folder)).tensor(EMBEDDINGS)
    step = table.abs().amax(1, keepdim=True) / 127
    assert found.shape == table.shape and bool(((found - table).abs() <= 0.502 * step).all())
    assert float((found - table).abs().max()) > 0


@pytest.mark.parametrize("name", [EMBEDDINGS, HEAD])
def test_a_code_that_is_not_the_checkpoints(built, tmp_path, name):
    checkpoint, bundle = built("all")
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    count = stored_weights(Bundle(folder), opened(checkpoint))
    assert count == len(Stored(Bundle(folder)).names)
    _, tensor = Stored(Bundle(folder))._tensors[name]
    with open(folder / "decoder.weights", "r+b") as file:
        file.seek(tensor.offset + tensor.length - 1)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x10]))
    for run in (stored_weights, parity):
        with pytest.raises(ParityError, match=f"{name}.*steps"):
            run(Bundle(folder, verify=False), opened(checkpoint))


def test_a_head_in_blocks_beside_columns(built):
    schemes = Stored(Bundle(built("blocks")[1])).schemes
    assert schemes[HEAD] == Scheme(INT4, 128) and schemes["model.layers.0.mlp.up_proj.weight"] == Scheme(INT8, COLUMN)
    assert EMBEDDINGS not in schemes and not any(map(in_vision, schemes))


def test_what_the_options_mean():
    def coding(*line: str) -> Coding:
        return settle(parse_arguments([*line]), OFFICIAL_7B).coding

    columns, rows = Scheme(INT8, COLUMN), Scheme(INT8, COLUMN, rows=True)
    line = "--int4", "--head", "int8", "--vision", "int8", "--embeddings", "int8"
    assert coding(*line) == Coding(Scheme(INT4, 128), columns, columns, rows)
    assert coding("--int4", "--vision", "int4", "--block-size", "64").vision == Scheme(INT4, 64)
    assert coding("--fp8", "--head", "int4", "--block-size", "32") == Coding(Scheme(FP8, COLUMN), Scheme(INT4, 32))
    assert coding("--fp8", "--quantize-head").head == Scheme(FP8, COLUMN)
    assert coding("--int4", "--head", "int4") == coding("--int4", "--quantize-head")
    assert coding_of(INT8, 64, "tensorrt-rtx", head="int8").head == Scheme(INT8, 64)


@pytest.mark.parametrize(
    ("line", "message", "fix"),
    [
        ("--fp16 --head int8", "head int8 with fp16", "--int8"),
        ("--vision int8", "vision int8 with fp16", "--int8"),
        ("--fp32 --embeddings int8", "embeddings int8 with fp32", "--fp16"),
        ("--bf16 --embeddings int8", "embeddings int8 with bf16", "--fp16"),
        ("--int8 --quantize-head --head int8", "quantize_head with head 'int8'", "leave out"),
        ("--fp8 --block-size 32", "block_size 32 with fp8", "--int8"),
    ],
)
def test_what_is_refused(line, message, fix):
    with pytest.raises(OptionError, match=message) as caught:
        parse_arguments(line.split())
    assert fix in caught.value.fix


def test_what_a_fix_names_is_accepted():
    for knob in ALL:
        for precision in ("fp32", "bf16", "fp16"):
            try:
                BuildOptions(precision=precision, **{knob: "int8"})
            except OptionError as error:
                other = error.fix.split()[1].removeprefix("--")
                assert BuildOptions(precision=other, **{knob: "int8"}).precision == other


@pytest.mark.parametrize(
    ("options", "message", "fix"),
    [
        ({"embeddings": "int8"}, "embeddings cannot be quantised", "leave out --embeddings"),
        ({"precision": "int4", "block_size": 16, "head": "int8"}, "lm_head cannot be quantised", "leave out --head"),
        ({"precision": "int8", "block_size": COLUMN, "vision": "int4"}, "blocks of 128 do not divide", "--block-size"),
    ],
)
def test_what_a_model_does_not_admit(options, message, fix):
    g = tiny(tied_embeddings=True)
    with pytest.raises(OptionError, match=message) as caught:
        settle(BuildOptions(**options), replace(OFFICIAL_7B, geometry=g))
    assert fix in caught.value.fix


def test_knobs_nobody_knows():
    for knob, value in (("head", "fp8"), ("vision", "int2"), ("embeddings", "int4")):
        with pytest.raises(OptionError, match=knob):
            BuildOptions(precision="int8", **{knob: value})
        if value == "int2":
            with pytest.raises(OptionError, match=knob):
                Configuration(official(), INT8, **{knob: value})


def test_what_7b_gains_by_hand():
    plain = Configuration(official(), INT4)
    table = 32000 * 4096
    sizes = weight_bytes(plain)
    rows = weight_bytes(replace(plain, embeddings="int8"))
    assert sizes["decoder"] - rows["decoder"] == 2 * table - (table + 2 * 32000)
    head = weight_bytes(replace(plain, head="int4"))
    assert sizes["decoder"] - head["decoder"] == 2 * table - table // 2 - table // 128 * 2
    vision = weight_bytes(replace(plain, vision="int8"))["vision"]
    assert 0.50 < vision / sizes["vision"] < 0.52 and vision < 0.32e9
    whole = weight_bytes(replace(plain, head="int4", vision="int8", embeddings="int8"))
    assert sum(whole.values()) < 4.26e9 < 4.8e9 < sum(sizes.values())
    step = step_bytes(plain, 1024, 0)
    assert step - step_bytes(replace(plain, head="int4"), 1024, 0) == sizes["decoder"] - head["decoder"]
    assert 0 < step - step_bytes(replace(plain, embeddings="int8"), 1024, 0) < 2 * 4096


@pytest.mark.parametrize("backend", [TENSORRT, TENSORRT_RTX])
def test_tensorrt_gathers_no_codes(backend):
    """Seen with TensorRT-RTX 1.7: "Quantized constant is only allowed before DQ", it says of the table."""
    c = Configuration(official(), INT4, embeddings="int8", backend=backend)
    with pytest.raises(OptionError, match=f"embeddings in int8 with {backend}") as caught:
        require_sms(c, (89,))
    assert caught.value.fix == "add --embeddings model"
    assert require_sms(replace(c, embeddings=MODEL, head="int4", vision="int8"), (89,)) == []
    assert require_sms(replace(c, backend=ONNXRUNTIME), ()) == []


def test_a_coded_tower_is_held_to_a_bound_of_its_own():
    plain, coded = limits_of(INT8, G), limits_of(INT8, G, coded_vision=True)
    assert plain.features < coded.features <= plain.prefill
    assert replace(coded, features=plain.features) == plain
