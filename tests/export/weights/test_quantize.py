"""int8, int4 and fp8: the arithmetic, their graphs, what ONNX Runtime fuses them to, and what cannot be quantised."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from engines import ort
from engines.bundle.folder import Bundle
from engines.bundle.kinds import ONNXRUNTIME, PARTS, TRACED
from engines.bundle.manifest import PROMPT_TEMPLATE
from engines.bundle.precision import COLUMN, FP8, INT4, INT8, PRECISIONS, Scheme
from engines.bundle.tensors import Coding
from engines.errors import BundleError, ExportError, OptionError, ParityError
from engines.ort import OrtModel
from export.build import BuildOptions, build, parse_arguments
from export.check import parity
from export.checkpoint.config import ModelConfig
from export.checkpoint.folder import Checkpoint
from export.recipe import settle
from export.weights.rounding import dequantise, largest_errors, pack, quantise, quantised, unpack
from export.weights.stored import Stored, stored_weights
from tests.checkpoints import write_checkpoint
from tests.conftest import once
from tests.engines.manifests import edit
from tests.geometries import official, tiny

G = tiny(hidden=64, intermediate=128, head_dim=16)
OFFICIAL_7B = ModelConfig(official(), 1, (2,), PROMPT_TEMPLATE, None)
LINEARS = 7  # of a decoder layer
WEIGHT = "model.layers.2.self_attn.q_proj.weight"
KINDS = [("int8", 32), ("int8", COLUMN), ("int4", 32), ("fp8", COLUMN)]
BUILDS = [(*kind, "eager") for kind in KINDS] + [("int4", 32, "lazy")]  # lazily, what is quantised is the same for all
INTEGERS = [kind for kind in KINDS if kind[0] != "fp8"]


@pytest.fixture
def built(shared):
    """built(precision, block=32, projection="eager") -> (checkpoint, bundle), with lm_head, parity-checked."""

    def get(precision: str, block: int = 32, projection: str = "eager") -> tuple[Path, Path]:
        checkpoint = once(shared / "quantise-checkpoint", lambda folder: write_checkpoint(folder, G))
        options = BuildOptions(
            checkpoint, shared / f"quantise-{precision}-{block}-{projection}", precision, block, True,
            projection=projection,
        )  # fmt: skip
        return checkpoint, once(options.out, lambda _: build(options))

    return get


# Arithmetic.


def test_the_number_of_cores_changes_nothing(built):
    """Every core works on a weight of its own; they come in order."""
    checkpoint, scheme, threads = Checkpoint.open(built("int4")[0]), Scheme(INT4, 32), torch.get_num_threads()
    made = []
    try:
        for cores in (1, 4):
            torch.set_num_threads(cores)
            made.append(list(quantised(checkpoint, Coding(scheme).schemes(G))))
    finally:
        torch.set_num_threads(threads)
    assert made[0] == made[1] and len(made[0]) > G.layers


@pytest.mark.parametrize("block", [32, 128, COLUMN])
@pytest.mark.parametrize("precision", [INT4, INT8], ids=str)
def test_rounding_is_to_nearest_and_nothing_is_clipped(precision, block):
    scheme = Scheme(precision, block)
    values = torch.randn(6, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-7, 4, 6)[:, None]
    integers, scales = quantise(values, scheme)
    steps = scales.float().repeat_interleave(block or 256, 1)
    assert float(((integers * steps - values).abs() / steps).max()) <= 0.5001
    low, high = scheme.limits
    assert low <= int(integers.min()) and int(integers.max()) <= high and int(integers.abs().max()) >= high
    assert scales.dtype == torch.float16 and bool((scales > 0).all())  # TensorRT takes no other


@pytest.mark.parametrize("precision", [INT4, INT8], ids=str)
def test_zeros_and_single_values(precision):
    values = torch.zeros(3, 32)
    values[1, 5], values[2, 7] = -1.0, 65504.0
    integers, scales = quantise(values, Scheme(precision, 32))
    found = integers * scales.float()
    assert torch.equal(found[0], values[0]) and bool(torch.isfinite(scales).all())
    assert torch.allclose(found, values, rtol=2e-3)


FLOATS = Scheme(FP8, COLUMN)


def test_floats_are_the_nearest_e4m3():
    """Found by trying them all: no other finite E4M3 number, times its scale, is nearer to a value."""
    values = torch.randn(6, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 6)[:, None]
    codes, scales = quantise(values, FLOATS)
    every = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn).double()
    every = every[every.isfinite()]
    assert len(every) == 254 and scales.shape == (6, 1)
    found = codes.view(torch.float8_e4m3fn).double()
    exact = values.double() / scales.double()
    nearest = (exact[..., None] - every).abs().amin(-1)
    assert float(((exact - found).abs() - nearest).max()) <= 1e-4  # what a division in float32 leaves undecided
    assert float(exact.abs().max()) <= 448.001 and bool(found.isfinite().all())
    assert float(found[2:].abs().amax(1).min()) >= 416  # all of the range, but for values below what a scale can be


def test_floats_of_zeros_and_single_values():
    values = torch.zeros(4, 32)
    values[1, 5], values[2, 7], values[3, :2] = -1.0, 65504.0, torch.tensor([1e-9, 2e-8])
    codes, scales = quantise(values, FLOATS)
    found = codes.view(torch.float8_e4m3fn).float() * scales.float()
    assert torch.equal(found[0], values[0]) and bool((scales > 0).all() and torch.isfinite(scales).all())
    assert torch.allclose(found[1:3], values[1:3], rtol=2e-3)
    assert float((found[3] - values[3]).abs().max()) < 1e-9  # a scale cannot be smaller than 6e-8, a code can


def test_int4_uses_its_ninth_negative_code():
    values = torch.linspace(-1, 0.5, 32)[None]
    integers, scales = quantise(values, Scheme(INT4, 32))
    assert integers.min() == -8 and float(scales) == pytest.approx(1 / 8, rel=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_that_of_onnx(bits):
    integers = torch.randint(-8, 8, (6, 10), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    data = pack(integers, bits)
    assert torch.equal(unpack(data, bits, (6, 10)), integers)
    tensor = ir.Tensor(integers.numpy(), dtype=ir.DataType.INT8)
    if bits == 4:
        import ml_dtypes

        tensor = ir.Tensor(integers.numpy().astype(ml_dtypes.int4))
    assert tensor.tobytes() == data


def test_a_weight_is_quantised_in_pieces_as_in_one(tmp_path, monkeypatch):
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "checkpoint", G), tmp_path / "checkpoint" / "clip")
    scheme = Scheme(INT4, 32)
    schemes = Coding(scheme).schemes(G)
    whole = list(quantised(checkpoint, schemes))
    monkeypatch.setattr("export.weights.rounding.PIECE", 3 * 64)
    assert list(quantised(checkpoint, schemes)) == whole
    name, (data, scales) = next(iter(schemes)), whole[0]
    integers, steps = quantise(checkpoint.tensor(name), scheme)
    expected = integers * steps.float().repeat_interleave(32, 1)
    assert torch.equal(dequantise(data, scales, scheme, tuple(expected.shape)), expected)


def test_threads_are_given_back(tmp_path):
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "checkpoint", G), tmp_path / "checkpoint" / "clip")
    before = torch.get_num_threads()
    made = quantised(checkpoint, Coding(Scheme(INT8, 32)).schemes(G))
    next(made)
    made.close()
    assert torch.get_num_threads() == before


# Graphs.


@pytest.mark.parametrize(("precision", "block", "projection"), BUILDS)
def test_linear_layers_are_read_through_dequantize_linear(built, precision, block, projection):
    bundle = Bundle(built(precision, block, projection)[1])
    g, scheme = bundle.manifest.geometry, Scheme(PRECISIONS[precision], block)
    dtype = {"int8": "INT8", "int4": "INT4", "fp8": "FLOAT8E4M3FN"}[precision]
    found: dict[str, tuple[int, ...]] = {}
    for part in PARTS:
        model = ir.load(bundle.graph(part, TRACED))
        for node in model.graph:
            if node.op_type == "DequantizeLinear":
                weight, scales = node.inputs
                k, n = weight.shape.numpy()
                found[weight.name] = (n, k)
                attributes = {name: value.as_int() for name, value in node.attributes.items()}
                assert attributes == ({"axis": 0, "block_size": block} if block else {"axis": 1})
                assert weight.dtype.name == dtype and scales.dtype == ir.DataType.FLOAT16
                assert scales.shape.numpy() == ((k // block, n) if block else (n,))
                assert [(use.node.op_type, use.idx) for use in node.outputs[0].uses()] == [("MatMul", 1)]
        assert model.opset_imports[""] == (21 if any(name in found for name in model.graph.initializers) else 20)
    assert found == Coding(scheme, scheme).tensors(g)
    pages = 0 if projection == "lazy" else 2 * len(g.reading_layers)
    assert len(found) == LINEARS * g.layers + pages + 1


@pytest.mark.parametrize(("precision", "block"), INTEGERS)
def test_onnxruntime_multiplies_with_the_integers(built, precision, block, tmp_path):
    folder = Path(shutil.copytree(built(precision, block)[1], tmp_path / "bundle"))
    bundle = Bundle(folder)
    model, expected = OrtModel(bundle), {"vision": 0, "pages": 2 * len(G.reading_layers), "decoder": LINEARS * 5 + 1}
    for part in PARTS:
        model._options.optimized_model_filepath = str(folder / f"{part}.optimised.onnx")
        model.session(bundle.graph(part, ONNXRUNTIME))
        nodes = list(ir.load(folder / f"{part}.optimised.onnx").graph)
        fused = [node.attributes for node in nodes if node.op_type == "MatMulNBits"]
        assert len(fused) == expected[part]
        assert not [node for node in nodes if node.op_type == "DequantizeLinear"]
        for attributes in fused:
            assert attributes["bits"].as_int() == PRECISIONS[precision].bits and attributes["block_size"].as_int() == 32
            assert attributes["accuracy_level"].as_int() == ort.ACCURACY_LEVEL


def test_onnxruntime_unpacks_floats_in_every_step(built, tmp_path):
    """It has no product of them, and keeps them as they are stored: as much memory as int8, more time than float32."""
    folder = Path(shutil.copytree(built("fp8", COLUMN)[1], tmp_path / "bundle"))
    model = OrtModel(Bundle(folder))
    model._options.optimized_model_filepath = str(folder / "optimised.onnx")
    model.session(Bundle(folder).graph("decoder", ONNXRUNTIME))
    graph = ir.load(folder / "optimised.onnx").graph
    unpacked = [node for node in graph if node.op_type == "DequantizeLinear"]
    assert len(unpacked) == LINEARS * 5 + 1
    assert {node.inputs[0].dtype for node in unpacked} == {ir.DataType.FLOAT8E4M3FN}


@pytest.mark.parametrize(("precision", "block", "projection"), BUILDS)
def test_with_exact_products_the_graphs_are_the_model(built, precision, block, projection, monkeypatch):
    """float32 products leave nothing but the order of summation: everything else the parity check allows is theirs."""
    checkpoint, bundle = built(precision, block, projection)
    opened = Checkpoint.open(checkpoint, checkpoint / "clip")
    usual = parity(Bundle(bundle), opened)
    monkeypatch.setattr("engines.ort.model.ACCURACY_LEVEL", 1)
    exact = {stage.name: stage.error for stage in parity(Bundle(bundle), opened)}
    assert 0.4 < exact.pop("weights, in steps") <= 0.5001
    decode = exact.pop("decode logits")
    assert max(exact.values()) <= 1e-3 and decode <= 1e-3, exact  # features are float16 on neither side
    print({stage.name: stage.error for stage in usual})
    assert precision == "fp8" or max(stage.error for stage in usual) > 2 * decode


@pytest.mark.parametrize(("precision", "block"), KINDS)
def test_the_manifest_says_it(built, precision, block):
    manifest = Bundle(built(precision, block)[1]).manifest
    assert (manifest.precision, manifest.block_size) == (precision, block)
    assert manifest.options["block_size"] == block and manifest.options["quantize_head"] is True
    io = {kind: graph.inputs for kind, graph in manifest.parts["decoder"].graphs.items()}
    assert {spec.dtype for spec in io[TRACED]} == {"int64", "float16"}
    assert {spec.dtype for spec in io[ONNXRUNTIME]} == {"int64", "float32"}


def test_less_is_stored():
    """Of LLaVA-1.5-7B's decoder layers: 4.125 bits for each weight in blocks of 128."""
    g = official()
    shapes = Coding(Scheme(INT4, 128)).tensors(g)
    count = sum(np.prod(shape) for shape in shapes.values())
    assert sum(Scheme(INT4, 128).stored_bytes(shape) for shape in shapes.values()) * 8 == count * 4.125
    rows = sum(shape[0] for shape in shapes.values())
    assert sum(FLOATS.stored_bytes(shape) for shape in shapes.values()) == count + 2 * rows


# What fails, and how.


@pytest.mark.parametrize(
    ("precision", "block", "text"),
    [
        ("int4", 48, "16, 32, 64, 128"),
        ("int4", COLUMN, "16, 32, 64, 128"),
        ("int8", True, "block_size True"),
        ("int8", False, "block_size False"),
        ("fp8", 128, "fp8: column"),
        ("fp16", 64, "--int4"),
        ("fp32", 0, "fp32"),
    ],
)
def test_block_sizes_nobody_knows(precision, block, text):
    with pytest.raises(OptionError, match=text):
        BuildOptions(precision=precision, block_size=block)


def test_command_line():
    def coding(*arguments: str) -> Coding:
        return settle(parse_arguments([*arguments]), OFFICIAL_7B).coding

    assert coding("--int4") == Coding(Scheme(INT4, 128)) and coding("--fp16") == Coding()
    with_head = Coding(Scheme(INT8, 64), Scheme(INT8, 64))
    assert coding("--int8", "--block-size", "64", "--quantize-head") == with_head
    assert coding("--int8", "--block-size", "64", "--head", "int8") == with_head
    assert coding("--int8", "--block-size", "column") == Coding(Scheme(INT8, COLUMN))
    assert coding("--fp8") == Coding(FLOATS)
    for wrong in (["--quantize-head"], ["--bf16", "--block-size", "64"]):
        with pytest.raises(OptionError):
            parse_arguments(wrong)


@pytest.mark.parametrize(
    ("changes", "block", "expected"),
    [
        ({"intermediate": 96}, 64, "down_proj.*96 inputs.*16 or 32"),
        ({"intermediate": 176}, 32, "down_proj.*176 inputs.*: 16"),
        ({"intermediate": 100}, 32, "down_proj.*100 inputs.*none of"),
        ({}, 128, "q_proj.*64 inputs.*16 or 32 or 64"),
    ],
)
def test_blocks_that_do_not_divide(tmp_path, changes, block, expected):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", replace(G, **changes))
    with pytest.raises(OptionError, match=f"(?s){expected}"):
        build(BuildOptions(checkpoint, tmp_path / "bundle", "int4", block))
    assert not (tmp_path / "bundle").exists()


def test_a_shared_head_stays(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", replace(G, tied_embeddings=True))
    with pytest.raises(OptionError, match="shares"):
        build(BuildOptions(checkpoint, tmp_path / "bundle", "int4", 32, True))
    build(BuildOptions(checkpoint, tmp_path / "bundle", "int4", 32))


@pytest.mark.parametrize(("value", "fix"), [(1e6, "--bf16"), (float("nan"), "repair"), (float("-inf"), "repair")])
def test_values_nobody_can_store(tmp_path, value, fix):
    weight = torch.zeros(64, 64)
    weight[63, 9] = value
    checkpoint = write_checkpoint(tmp_path / "checkpoint", G, overrides={WEIGHT: weight})
    with pytest.raises(ExportError, match=WEIGHT) as caught:
        build(BuildOptions(checkpoint, tmp_path / "bundle", "int4", 32))
    assert fix in caught.value.fix and not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("check", ["weights", "parity"])
@pytest.mark.parametrize("what", ["code", "scale"])
@pytest.mark.parametrize(("precision", "block"), [("int4", 32), ("fp8", COLUMN)])
def test_a_weight_that_is_not_the_checkpoints(built, tmp_path, precision, block, what, check):
    checkpoint, bundle = built(precision, block)
    opened = Checkpoint.open(checkpoint, checkpoint / "clip")
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    assert stored_weights(Bundle(folder), opened) > LINEARS * G.layers
    name = WEIGHT + ("" if what == "code" else ".scale")
    _, tensor = Stored(Bundle(folder))._tensors[name]
    with open(folder / "decoder.weights", "r+b") as file:
        file.seek(tensor.offset + tensor.length - 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ (0x30 if what == "code" else 0xFF)]))
    run = {"weights": stored_weights, "parity": parity}[check]
    with pytest.raises(ParityError, match=f"{WEIGHT}.*steps"):
        run(Bundle(folder, verify=False), opened)


@pytest.mark.parametrize("change", [1, -1])
def test_a_float_that_is_one_code_off(tmp_path, change):
    """Of every code of a weight, large and small: its step is the distance of the floats around it."""
    folder = write_checkpoint(tmp_path / "checkpoint", G, overrides={WEIGHT: torch.logspace(-6, 0, 4096).view(64, 64)})
    checkpoint = Checkpoint.open(folder, folder / "clip")
    ((data, scales),) = quantised(checkpoint, {WEIGHT: FLOATS})
    ((_, right),) = largest_errors(checkpoint, [(WEIGHT, FLOATS, data, scales)])
    assert 0.4 < right <= 0.5001
    codes = np.frombuffer(data, np.uint8).astype(int)
    for place in range(0, 4096, 97):
        wrong = codes.copy()
        wrong[place] = wrong[place] + change if change > 0 or codes[place] else 0x81  # below zero: the other sign
        stored = wrong.astype(np.uint8).tobytes()
        ((_, error),) = largest_errors(checkpoint, [(WEIGHT, FLOATS, stored, scales)])
        assert error > 0.5001, (place, codes[place], error)


@pytest.mark.parametrize(
    ("precision", "block"), [("int4", None), ("int4", 48), ("fp16", 32)], ids=["none", "unknown", "with float16"]
)
def test_manifests_that_contradict_themselves(built, tmp_path, precision, block):
    folder = Path(shutil.copytree(built("int4")[1], tmp_path / "bundle"))
    edit(folder, lambda manifest: manifest.update(block_size=block, precision=precision))
    with pytest.raises(BundleError, match="block size"):
        Bundle(folder)
