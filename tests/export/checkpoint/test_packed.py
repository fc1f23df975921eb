"""Checkpoints that come quantised: the formats to the bit, their integers in the bundle, and what cannot be loaded."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from engines.bundle.folder import Bundle
from engines.bundle.geometry import Geometry
from engines.bundle.manifest import PROMPT_TEMPLATE
from engines.bundle.precision import INT4, INT8, Scheme
from engines.errors import CheckpointError, ConfigError, ExportError, OptionError, ParityError
from engines.ort import OrtModel
from export.build import BuildOptions, build, parse_arguments, print_sizes
from export.check import _stages, limits_of, parity
from export.checkpoint.config import ModelConfig, read_config
from export.checkpoint.folder import Checkpoint
from export.checkpoint.packed import PackedCheckpoint, open_checkpoint
from export.checkpoint.packed_settings import Packing, read_packing
from export.checkpoint.write_config import write_config
from export.network.reference import ReferenceModel
from export.recipe import settle
from export.weights.rounding import quantised, unpack
from export.weights.stored import Stored, stored_weights
from export.weights.write import converted
from tests.checkpoints import write_checkpoint
from tests.conftest import once
from tests.geometries import official, tiny
from tests.packed import Format, pack, quantise, write_packed

G = tiny(hidden=64, intermediate=128, head_dim=16)
LAYER = "model.layers.2.self_attn.q_proj"
AWQ, ASYMMETRIC = Format("awq", group=32), Format("awq", group=32, symmetric=False)
FORMATS = {
    "awq": (AWQ, INT4),
    "awq-asymmetric": (ASYMMETRIC, INT8),
    "gptq": (Format("gptq", group=64), INT4),
    "gptq-asymmetric": (Format("gptq", group=16, symmetric=False), INT8),
    "gptq-v2-asymmetric": (Format("gptq", group=32, symmetric=False, v2=True), INT8),
    "gptq-8": (Format("gptq", bits=8, group=32), INT8),
    "gptq-columns": (Format("gptq", group=-1), INT4),
}


@pytest.fixture
def source(shared) -> Path:
    """A checkpoint of floats."""
    return once(shared / "packed-source", lambda folder: write_checkpoint(folder, G))


@pytest.fixture
def write(source, tmp_path):
    """write(format=AWQ, **options) -> a packed checkpoint; see write_packed."""
    return lambda format=AWQ, **options: write_packed(source, tmp_path / "packed", format, **options)[0]


def opened(folder: Path) -> PackedCheckpoint:
    checkpoint = open_checkpoint(folder, read_config(folder))
    assert isinstance(checkpoint, PackedCheckpoint)
    return checkpoint


def one_layer(folder: Path, packing: Packing, **tensors: torch.Tensor) -> PackedCheckpoint:
    save_file({f"x.{key}": value for key, value in tensors.items()}, folder / "model.safetensors")
    return PackedCheckpoint(Checkpoint.open(folder), packing)


def words(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64).to(torch.int32)


# The formats.


def test_an_awq_word_is_eight_columns_in_its_order(tmp_path):
    zeros = words(0x88888888)[None]
    scales = torch.arange(1, 9).half()[None]
    packing = Packing("awq", 4, None, True)
    checkpoint = one_layer(tmp_path, packing, qweight=words(0x75316420, 0xF)[:, None], qzeros=zeros, scales=scales)
    integers, steps = checkpoint.integers("x.weight")
    assert (integers[0] + 8).tolist() == [0, 1, 2, 3, 4, 5, 6, 7] and (integers[1] + 8).tolist() == [15] + 7 * [0]
    assert torch.equal(steps, scales) and integers.dtype == torch.int8
    assert torch.equal(checkpoint.tensor("x.weight"), integers.t().float() * torch.arange(1, 9)[:, None])


@pytest.mark.parametrize(("offset", "zeros"), [(1, 0x76543210), (0, 0x87654321)])
def test_a_gptq_word_is_eight_rows_and_its_zeros_lack_one(tmp_path, offset, zeros):
    packing = Packing("gptq", 4, None, False, zero_offset=offset)
    qweight = words(*[0x76543210] * 7, 0xFEDCBA98)[None]
    qzeros, scales = words(zeros)[None], torch.ones(1, 8).half()
    found = one_layer(tmp_path, packing, qweight=qweight, qzeros=qzeros, scales=scales).integers("x.weight")[0]
    codes = torch.tensor([[row] * 7 + [row + 8] for row in range(8)])
    assert torch.equal(found, (codes - torch.arange(1, 9)).to(torch.int8))


def test_an_8_bit_gptq_word_is_four_rows(tmp_path):
    packing = Packing("gptq", 8, None, True, zero_offset=1)
    qweight, qzeros = words(0xFF807F00, *[0] * 3)[None], words(0x7F7F7F7F)[None]
    checkpoint = one_layer(tmp_path, packing, qweight=qweight, qzeros=qzeros, scales=torch.ones(1, 4).half())
    assert checkpoint.integers("x.weight")[0][:, 0].tolist() == [-128, -1, 0, 127]


@pytest.mark.parametrize("name", FORMATS)
def test_integers_are_read_and_stored_as_they_are(source, tmp_path, monkeypatch, name):
    format, precision = FORMATS[name]
    folder, exact, held = write_packed(source, tmp_path / "packed", format)
    checkpoint, floats = opened(folder), Checkpoint.open(exact, exact / "clip")
    packing = checkpoint.packing
    assert packing.precision == precision and checkpoint.names == floats.names
    scheme = Scheme(precision, packing.block(G))
    whole = list(quantised(checkpoint, dict.fromkeys(held, scheme)))
    monkeypatch.setattr("export.checkpoint.packed.PIECE", 24)  # words
    assert list(quantised(checkpoint, dict.fromkeys(held, scheme))) == whole
    for (weight, q), (data, scales) in zip(held.items(), whole, strict=True):
        k, n = q.codes.shape
        assert np.array_equal(unpack(data, scheme.bits, (k, n)).numpy(), q.integers)
        repeated = q.scales.repeat(k // scheme.block // len(q.scales), axis=0)
        assert np.array_equal(np.frombuffer(scales, np.float16).reshape(-1, n), repeated)
        assert torch.equal(checkpoint.tensor(weight), floats.tensor(weight))  # float32, bit for bit
        pieces = list(checkpoint.chunks(weight, 3 * 4 * k))
        assert len(pieces) > 2 and b"".join(pieces) == floats.tensor(weight).numpy().tobytes()
    assert checkpoint.identity()["files"] == {"model.safetensors": (folder / "model.safetensors").stat().st_size}


# Bundles.


@pytest.fixture
def built(shared, source):
    """built(name of a format, options) -> (packed checkpoint, checkpoint of its exact floats, bundle)."""

    def get(name: str, **options: object) -> tuple[Path, Path, Path]:
        folder, bundle = shared / f"packed-{name}", shared / f"packed-{name}-bundle"
        once(folder, lambda _: write_packed(source, folder, FORMATS[name][0]))
        made = once(bundle, lambda out: build(BuildOptions(folder, out, check="weights", **options)))
        return folder, Path(f"{folder}-floats"), made

    return get


@pytest.mark.parametrize(("name", "projection"), [("awq", "eager"), ("awq-asymmetric", "lazy")])
def test_with_exact_products_the_bundle_is_the_model_of_the_same_floats(built, monkeypatch, name, projection):
    folder, exact, made = built(name, projection=projection)
    bundle, checkpoint, (format, precision) = Bundle(made), opened(folder), FORMATS[name]
    manifest = bundle.manifest
    for knob, value in (("precision", precision.name), ("block_size", format.group)):  # as the checkpoint decided
        assert getattr(manifest, knob) == manifest.options[knob] == value
    assert manifest.options["floats"] == [] and parity(bundle, checkpoint)[0].error == 0
    monkeypatch.setattr("engines.ort.model.ACCURACY_LEVEL", 1)  # float32 products
    reference = ReferenceModel(G, Checkpoint.open(exact, exact / "clip"))
    limits = limits_of(precision, manifest.geometry)
    stages = {stage.name: stage.error for stage in _stages(reference, OrtModel(bundle), manifest.geometry, limits)}
    rounded = 1e-3 if projection == "lazy" else 1e-4  # k_proj_hd and v_proj_hd are float16 there
    assert stages["selected cells"] == 0 and max(stages.values()) <= rounded, stages
    if projection == "lazy":
        stored = Stored(bundle)
        name = next(name for name in stored.names if "k_proj_hd" in name)
        assert name not in stored.schemes and torch.equal(stored.tensor(name), checkpoint.tensor(name).half())
        assert b"".join(converted(checkpoint, name, torch.float32)) == checkpoint.tensor(name).numpy().tobytes()


@pytest.mark.parametrize("what", ["integer", "scale"])
@pytest.mark.parametrize("check", [stored_weights, parity])
def test_a_weight_that_is_not_the_checkpoints(built, tmp_path, what, check):
    folder, _, bundle = built("awq")
    damaged = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    assert stored_weights(Bundle(damaged), opened(folder)) > 7 * G.layers
    _, tensor = Stored(Bundle(damaged))._tensors[f"{LAYER}.weight" + (".scale" if what == "scale" else "")]
    with open(damaged / "decoder.weights", "r+b") as file:
        file.seek(tensor.offset + 5)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ParityError, match=f"{LAYER}.weight in decoder.weights is not the checkpoint's"):
        check(Bundle(damaged, verify=False), opened(folder))


def test_the_official_tiny_model_packed(weights, tmp_path):
    """Hidden 64, intermediate 176: groups of 16. Settings in a file of their own; lm_head is packed, the hi-res
    projections are not, as GPTQ's packers leave them, and stay floats."""
    folder, _, held = write_packed(
        weights, tmp_path / "packed", Format("gptq"), floats=lambda name: "_hd" in name, head=True,
        beside="quantize_config.json",
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=200)
    bundle = build(BuildOptions(folder, tmp_path / "bundle", "int4", 16, True, check="weights"), console)
    text = " ".join(console.file.getvalue().split())
    assert (
        "(gptq, 4 bits, groups of 16, symmetric): its integers and scales are carried over exactly; 6 weights" in text
    )
    assert "half a step" not in text and "tensors equal the checkpoint's;" in text and "projections" not in text
    stored, manifest = Stored(bundle), bundle.manifest
    floats = {name for name in stored.names if "_hd" in name}
    assert manifest.precision == "int4" and manifest.options["quantize_head"] is True
    assert set(manifest.options["floats"]) == floats and set(stored.schemes) <= set(held) and len(floats) == 6
    assert "lm_head.weight" in stored.schemes and len(stored.schemes) == 7 * 12 + 1
    for name in stored.schemes:
        data, scales = stored.codes(name)
        assert np.array_equal(unpack(data, 4, held[name].codes.shape).numpy(), held[name].integers)
        assert scales == held[name].scales.tobytes()


# Sizes, from config.json alone.


def sized(folder: Path, *arguments: str) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_sizes(parse_arguments(["--plan", "--target", "orin-nx-16", "--model", str(folder), *arguments]), console)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("settings", "texts"),
    [
        (Format("awq", group=128).config, (", int4,", "pages 398 MB, decoder 3.9 GB", "fits orin", "fits:")),
        (Format("gptq", group=128).config, (", int4,", "pages 1.5 GB, decoder 3.9 GB")),  # hi-res is not packed
        (
            Format("awq", group=128).config | {"modules_to_not_convert": ["k_proj_hd", "v_proj_hd", "lm_head"]},
            (", int4,", "pages 1.5 GB"),
        ),
    ],
)
def test_sizing_knows_the_precision(tmp_path, settings, texts):
    write_config(tmp_path, official(), tower="openai/clip-vit-large-patch14-336", quantization_config=settings)
    text = sized(tmp_path)
    assert any(word in text for word in texts[-2:]) and all(word in text for word in texts[:2]), text
    assert "--int" not in sized(tmp_path, "--context", "2048")  # no other precision is proposed
    with pytest.raises(OptionError, match="quantised already"):
        sized(tmp_path, "--fp16")


def test_zero_points_need_a_backend_that_takes_blocks_of_int8(tmp_path):
    settings = Format("awq", group=128, symmetric=False).config
    write_config(tmp_path, official(), tower="openai/clip-vit-large-patch14-336", quantization_config=settings)
    with pytest.raises(OptionError, match="int8 in blocks of 128 with tensorrt") as caught:  # what the board has
        sized(tmp_path)
    assert "onnxruntime, or tensorrt-rtx" in caught.value.fix
    text = sized(tmp_path, "--target", "rtx-4090", "--backend", "tensorrt-rtx")
    assert ", int8," in text and "decoder 7.1 GB" in text


# What fails, and how.


@pytest.mark.parametrize(
    ("format", "options", "found", "fix"),
    [
        (AWQ, {"precision": "fp16"}, "--fp16 for a checkpoint", "--int4 --block-size 32, or"),
        (AWQ, {"precision": "int8"}, "--int8 for a checkpoint", "--int4 --block-size 32, or"),
        (AWQ, {"precision": "int4", "block_size": 64}, "--block-size 64 for", "--int4 --block-size 32, or"),
        (AWQ, {"precision": "int4", "quantize_head": True}, "--quantize-head for", "--int4 --block-size 32, or"),
        (ASYMMETRIC, {"precision": "int4"}, "with zero points", "--int8 --block-size 32, or"),
        (Format("gptq", bits=8, group=64), {"precision": "bf16"}, "gptq, 8 bits", "--int8 --block-size 64, or"),
        (Format("gptq", group=-1), {"precision": "fp32"}, "a group per output", "--int4 --block-size 64, or"),
    ],
)
def test_options_that_are_not_the_checkpoints(write, tmp_path, format, options, found, fix):
    with pytest.raises(OptionError, match=found) as caught:
        build(BuildOptions(write(format), tmp_path / "bundle", **options))
    assert fix in caught.value.fix and not (tmp_path / "bundle").exists()
    if format == ASYMMETRIC:
        assert "TensorRT has zero points" in caught.value.expected


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised with 'bitsandbytes'"),
        ({"quant_method": "compressed-tensors"}, "'compressed-tensors'"),
        ({"quant_method": "fp8"}, "'fp8'"),
        ({**Format("gptq").config, "quant_method": "auto-round"}, "'auto-round'"),
        ({"bits": 4, "group_size": 128}, "quantised with 'none'"),
        ("awq", "quantised with None"),
        ({**AWQ.config, "version": "gemv"}, "format 'gemv'"),
        ({**AWQ.config, "bits": 8}, "awq with 8 bits"),
        ({**AWQ.config, "group_size": 48}, "group_size is 48"),
        ({**AWQ.config, "group_size": 256}, "group_size is 256"),
        ({**AWQ.config, "bits": "4"}, "bits is '4'"),
        ({"quant_method": "awq", "bits": 4}, "group_size is missing"),
        ({**Format("gptq").config, "checkpoint_format": "marlin"}, "format 'marlin'"),
        ({**Format("gptq").config, "is_marlin_format": True}, "format 'marlin'"),
        ({**Format("gptq").config, "bits": 3}, "gptq with 3 bits"),
        ({**Format("gptq").config, "bits": 8, "sym": False}, "8 bits with zero points"),
        ({**Format("gptq").config, "pack_dtype": "int16"}, "pack_dtype"),
        ({**Format("gptq").config, "dynamic": {"-:.*hd": {}, ".*down": {"bits": 8}}}, "modules like '.\\*down'"),
    ],
)
def test_settings_that_cannot_be_loaded(tmp_path, settings, text):
    with pytest.raises(ConfigError, match=text) as caught:
        read_packing(tmp_path, {"quantization_config": settings})
    assert "quantization_config" in str(caught.value) and caught.value.expected


def test_where_settings_are_looked_for(tmp_path):
    assert read_packing(tmp_path, {"quantization_config": None}) is None
    old = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(old))
    assert read_packing(tmp_path, {}) == Packing("awq", 4, 128, False)
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": -1, "desc_act": True}))
    found = read_packing(tmp_path, {})
    assert (found.method, found.group, found.symmetric, found.zero_offset) == ("gptq", None, True, 1)
    assert read_packing(tmp_path, {"quantization_config": AWQ.config}).group == 32


GPTQ = Format("gptq", group=32)
SHUFFLED = torch.arange(63, -1, -1, dtype=torch.int32) // 32
SHAPE = (64, 64)


@pytest.mark.parametrize(
    ("format", "overrides", "text"),
    [
        (AWQ, {"qzeros": None}, "qzeros is missing"),
        (AWQ, {"scales": None}, "scales is missing"),
        (AWQ, {"qweight": None, "qzeros": None, "scales": None}, "1 of .* keys are missing or wrong"),
        (AWQ, {"weight": torch.ones(SHAPE)}, "there twice"),
        (AWQ, {"qweight": torch.zeros(64, 8).half()}, "qweight is torch.float16"),
        (AWQ, {"qweight": torch.zeros(72, 8, dtype=torch.int32)}, "72 inputs in groups of 32"),
        (AWQ, {"qzeros": torch.zeros(2, 4, dtype=torch.int32)}, "qzeros has the shape"),
        (AWQ, {"scales": torch.ones(4, 64).half()}, "scales has the shape"),
        (AWQ, {"qzeros": torch.zeros(2, 8, dtype=torch.int32)}, "zero points other than 8"),
        (AWQ, {"bias": torch.ones(64).half()}, "bias that is not zero"),
        (AWQ, {"scales": torch.zeros(2, 64).half()}, "scales holds 0 "),
        (AWQ, {"scales": torch.full((2, 64), float("nan")).half()}, "holds nan"),
        (AWQ, {"scales": torch.full((2, 64), 9e3).half()}, "holds 9000"),
        (AWQ, {"scales": torch.full((2, 64), 0.1)}, "holds 0.1 .*float32"),
        (GPTQ, {"g_idx": SHUFFLED}, "not neighbours .desc_act"),
        (GPTQ, {"g_idx": SHUFFLED[:9].clone()}, "g_idx is torch.int32 .9"),
        (
            Format("gptq", bits=8, group=32),
            {"qweight": torch.zeros(8, 64, dtype=torch.int32)},
            "shape",
        ),
        (
            Format("gptq", group=32, symmetric=False),
            {"qzeros": torch.full((2, 8), -1, dtype=torch.int32)},
            "0 less one",
        ),
    ],
)
def test_weights_that_cannot_be_loaded(write, tmp_path, format, overrides, text):
    folder = write(format, overrides={f"{LAYER}.{key}": value for key, value in overrides.items()})
    with pytest.raises(CheckpointError, match=text) as caught:
        build(BuildOptions(folder, tmp_path / "bundle", check="none"))
    assert LAYER in str(caught.value) and not (tmp_path / "bundle").exists()


def test_what_is_harmless_loads(write):
    """Biases of zeros, which old packers wrote; groups said to be in another order that are not; bfloat16 scales."""
    bias, scales = torch.zeros(64).half(), torch.full((2, 64), 0.125, dtype=torch.bfloat16)
    folder = write(GPTQ, desc_act=True, overrides={f"{LAYER}.bias": bias, f"{LAYER}.scales": scales})
    assert opened(folder).integers(f"{LAYER}.weight")[1].dtype == torch.float16


def test_groups_in_an_unknown_order(write):
    folder = write(GPTQ, desc_act=True, overrides={f"{LAYER}.g_idx": None})
    with pytest.raises(CheckpointError, match=f"{LAYER}.*desc_act"):
        opened(folder)


def test_settings_and_weights_that_disagree(write, source, tmp_path):
    folder = write()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="nothing says how"):
        open_checkpoint(folder, read_config(folder))
    shutil.copytree(source, tmp_path / "stale")
    (tmp_path / "stale" / "quantize_config.json").write_text(json.dumps(GPTQ.config))
    with pytest.raises(CheckpointError, match="no packed weights"):
        open_checkpoint(tmp_path / "stale", read_config(tmp_path / "stale"))


def test_a_shared_head_is_not_packed(tmp_path):
    packing = Packing("gptq", 4, 32, True, head=True)

    def head(g: Geometry, **asked: object) -> bool:
        config = ModelConfig(g, 1, (2,), PROMPT_TEMPLATE, None, packing)
        return settle(BuildOptions(**asked), config).coding.head is not None

    assert not head(tiny(hidden=64, tied_embeddings=True))
    assert head(G, precision="int4", block_size=32, quantize_head=True)
    with pytest.raises(OptionError, match="no block size divides"):
        Packing("awq", 4, None, True).block(tiny(hidden=64, intermediate=100))


def test_a_scheme_that_cannot_hold_the_integers(write):
    checkpoint = opened(write(ASYMMETRIC))
    for scheme in (Scheme(INT4, 32), Scheme(INT8, 128)):
        with pytest.raises(ExportError, match=r"integers in -\d+ \.\. \d+ and groups of 32"):
            next(quantised(checkpoint, {f"{LAYER}.weight": scheme}))


def test_the_tests_own_rounding():
    """What write_packed packs is the weight, to a step."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for format, _ in FORMATS.values():
        q = quantise(weight, format)
        steps = q.scales.astype(np.float32).repeat(64 // len(q.scales), axis=0).T
        assert (np.abs(q.values - weight.numpy()) / steps).max() < 1.01  # its rounded zero or largest code may clip
        assert set(pack("x", q, format)) >= {"x.qweight", "x.qzeros", "x.scales"}
