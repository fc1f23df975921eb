"""Calibrated int8 and int4: what folds is still the model, the search never loses, checks fail when they should."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from tokenizers import Tokenizer

import export.weights.calibrate
from engines.bundle.folder import Bundle
from engines.bundle.precision import INT4, INT8, Scheme
from engines.bundle.tensors import quantised_tensors
from engines.errors import BundleError, ConfigError, FlexError, ImageError, OptionError, ParityError, PromptError
from export.build import BuildOptions, build, parse_arguments
from export.check import parity
from export.checkpoint.config import read_config
from export.checkpoint.folder import Checkpoint
from export.network.reference import ReferenceModel
from export.weights import calibration_data, stored
from export.weights.awq import Search, best_clips, best_scales, output_errors, rounded
from export.weights.calibrate import calibrate
from export.weights.calibration_data import read_pictures, read_requests
from export.weights.folding import Folded, group_sizes, read_scales
from export.weights.rounding import RATIOS, ratios_of
from export.weights.stored import Stored, stored_weights
from runtime.image import load_image
from tests.checkpoints import write_checkpoint
from tests.conftest import once
from tests.engines.manifests import edit
from tests.geometries import tiny
from tests.paths import ROOT

G = tiny(hidden=64, intermediate=128, head_dim=16, vocab=300)
LOUD = 4  # of the 64 channels
SCHEME = Scheme(INT4, 32)


def loud(g) -> dict[str, torch.Tensor]:
    """Norms that make LOUD of the channels thirty times louder, as in large trained models."""
    weight = torch.ones(g.hidden)
    weight[:: g.hidden // LOUD] = 30
    norms = [f"{layer}.{norm}_layernorm" for layer in range(g.layers) for norm in ("input", "post_attention")]
    return {f"model.layers.{norm}.weight": weight.clone() for norm in norms}


def write_data(folder: Path) -> Path:
    """Two images, three questions, one of them in token ids."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, shape in (("wide.png", (60, 90, 3)), ("tall.png", (90, 50, 3))):
        Picture.fromarray(rng.integers(0, 255, shape, np.uint8)).save(folder / name)
    rows = [
        {"image": "wide.png", "question": "what number is in the red square?", "answer": "a number"},
        {"image": "tall.png", "input_ids": [1, -200, 40, 50, 60], "answer_ids": [70, 80]},
        {"image": "wide.png", "question": "a human?"},
    ]
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def data(shared) -> Path:
    return once(shared / "calibrate-data", write_data)


@pytest.fixture
def model(shared) -> Path:
    return once(shared / "calibrate-checkpoint", lambda folder: write_checkpoint(folder, G, tokenizer=True))


@pytest.fixture
def bundle(shared, model, data) -> Path:
    """int4 in blocks of 32 with lm_head, calibrated and parity-checked."""
    options = BuildOptions(model, shared / "calibrate-int4", "int4", 32, True, calibrate=data)
    return once(options.out, lambda _: build(options))


def opened(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder, folder / "clip")


def random_scales(g, head: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.exp2(3 * torch.randn(size, generator=generator)) for name, size in group_sizes(g, head).items()}


class Rounded:
    """Weights as a bundle would store them."""

    def __init__(self, source, g, scheme: Scheme, clips: dict[str, torch.Tensor]) -> None:
        self.source, self.names, self.scheme, self.clips = source, quantised_tensors(g), scheme, clips

    def tensor(self, name: str) -> torch.Tensor:
        values = self.source.tensor(name).float()
        ratios = ratios_of(self.clips[name]) if name in self.clips else None
        return rounded(values, self.scheme, ratios) if name in self.names else values


def logits(weights, g) -> tuple[np.ndarray, list[float]]:
    """Of a prompt and five steps that read pages, in the float32 reference; and the pages read."""
    from engines.backend import Image

    rng, reference = np.random.default_rng(3), ReferenceModel(g, weights)
    tiles = rng.standard_normal((1 + g.zoom**2, 3, g.lowres, g.lowres), dtype=np.float32)
    low, high = reference.vision(tiles[:1]), reference.vision(tiles[1:])
    begin, margins = np.array([3]), np.array([[1, 0]])
    decoder = reference.decoder(Image(low, reference.project(high, begin), begin, margins), 90)
    ids = np.concatenate((rng.integers(0, g.vocab, 3), -1 - np.arange(g.image_tokens), rng.integers(0, g.vocab, 6)))
    decoder.run(ids[None])
    steps = [decoder.run(np.array([[token]]), g.pages) for token in rng.integers(0, g.vocab, 5)]
    return np.concatenate([step.logits for step in steps]), [float(step.page_count.mean()) for step in steps]


# Folding.


@pytest.mark.parametrize(
    "g",
    [G, replace(G, kv_heads=2), replace(G, attention_bias=True), replace(G, tied_embeddings=True)],
    ids=["plain", "grouped", "biased", "tied"],
)
def test_folded_scales_change_nothing(tmp_path, g):
    folder = write_checkpoint(tmp_path / "checkpoint", g)
    checkpoint = opened(folder)
    scales = random_scales(g, head=not g.tied_embeddings)
    folded = Folded(checkpoint, g, scales)
    expected, read = logits(checkpoint, g)
    found, also = logits(folded, g)
    assert read == also and min(read) > 0
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    for name in (f"model.layers.{G.layers - 1}.self_attn.v_proj_hd.weight", "model.layers.0.mlp.down_proj.weight"):
        assert not torch.allclose(folded.tensor(name), checkpoint.tensor(name), rtol=0.1)
    without = Folded(checkpoint, g, {name: values for name, values in scales.items() if "output" not in name})
    without._columns |= {name: values for name, values in folded._columns.items() if "o_proj" in name}
    assert np.abs(logits(without, g)[0] - expected).max() > 1e-2  # values that nobody divides would be seen


def test_a_folded_tensor_is_the_same_in_pieces(model):
    folded = Folded(opened(model), G, random_scales(G))
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"):
        info = folded.info(name)
        assert info.dtype == torch.float32 and info.nbytes == 4 * torch.Size(info.shape).numel()
        assert b"".join(folded.chunks(name, 100)) == folded.tensor(name).numpy().tobytes()
    assert folded.info("model.norm.weight") == opened(model).info("model.norm.weight")


# The search.


@pytest.mark.parametrize("precision", [INT4, INT8], ids=str)
def test_the_search_is_never_worse_than_rounding(precision):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=generator) * torch.exp2(2 * torch.randn(64, generator=generator))
    weights = [torch.randn(n, 64, generator=generator) for n in (48, 96)]
    scheme = Scheme(precision, 32)
    found = best_scales(weights, x, scheme, Search())

    def share(scales: torch.Tensor, clips: list[torch.Tensor | None]) -> float:
        lost = 0.0
        for weight, clip in zip(weights, clips, strict=True):
            error = output_errors(weight, x, scales, scheme, None if clip is None else ratios_of(clip))
            lost += float(error.sum()) / float((x @ weight.T).square().sum()) / len(weights)
        return lost

    ones = torch.ones(64)
    assert share(ones, [None, None]) == pytest.approx(found.before, rel=1e-4)
    assert share(found.scales, [None, None]) == pytest.approx(found.after, rel=1e-4)
    assert found.after < 0.6 * found.before
    clips = [best_clips(weight, x, found.scales, scheme) for weight in weights]
    assert share(found.scales, clips) <= found.after and (precision == INT8 or clips[0].any())
    for weight, clip in zip(weights, clips, strict=True):  # row by row
        plain = output_errors(weight, x, found.scales, scheme)
        assert bool((output_errors(weight, x, found.scales, scheme, ratios_of(clip)) <= plain).all())


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_inputs_that_say_nothing(scale):
    weight, x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), scale * torch.ones(5, 32)
    found = best_scales([weight], x, SCHEME, Search())
    assert torch.equal(found.scales, torch.ones(32)) and found.after == found.before
    assert bool(torch.isfinite(ratios_of(best_clips(weight, x, found.scales, SCHEME))).all())


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_loud_channels_cost_less_after_calibration(tmp_path, data, kv_heads):
    """Every group of every layer at least as good on the data, and logits on another image much nearer."""
    g = replace(G, kv_heads=kv_heads)
    folder = write_checkpoint(tmp_path / "checkpoint", g, tokenizer=True, overrides=loud(g))
    checkpoint, config = opened(folder), read_config(folder)
    requests = read_requests(data, folder, config)
    pictures = read_pictures(requests, g)
    found = calibrate(checkpoint, g, SCHEME, requests, pictures, Search())
    again = calibrate(checkpoint, g, SCHEME, requests, pictures, Search())
    assert set(found.scales) == set(group_sizes(g, False))
    assert all(torch.equal(found.scales[name], again.scales[name]) for name in found.scales)
    assert all(torch.equal(found.clips[name], again.clips[name]) for name in found.clips)
    assert all(entry.after <= entry.before for entry in found.found.values())
    assert all(entry.after < 0.8 * entry.before for name, entry in found.found.items() if name.endswith("attention"))
    expected, _ = logits(checkpoint, g)
    plain = np.abs(logits(Rounded(checkpoint, g, SCHEME, {}), g)[0] - expected).mean()
    better = np.abs(logits(Rounded(found.folded(checkpoint, g), g, SCHEME, found.clips), g)[0] - expected).mean()
    print(plain, better)
    assert better < 0.8 * plain


# Bundles.


def test_a_calibrated_bundle(bundle, model, data):
    made = Bundle(bundle)
    manifest = made.manifest
    assert manifest.options["calibrate"] == data.name
    assert manifest.options["calibration"] == {"examples": 3, "images": 2, "rows": 512, "alphas": 20, "outputs": 1024}
    assert str(data.parent) not in (bundle / "bundle.json").read_text()
    stages = {stage.name: stage.error for stage in parity(made, opened(model))}
    assert 0.4 < stages["weights, in steps"] <= 0.5001 and stages["scales folded in: decode logits"] < 1e-4
    assert stored_weights(made, opened(model)) == len(Stored(made).names)
    assert set(read_scales(made)) == set(group_sizes(G, True))
    graph = (bundle / "decoder.onnx").read_bytes()
    assert b"scales" not in graph  # nothing of it is left in the graphs: the same operators as without


def test_lazy_bundles_store_the_scaled_projection(model, data, tmp_path):
    options = BuildOptions(model, tmp_path / "bundle", "int8", 32, calibrate=data, projection="lazy", check="weights")
    made = build(options)
    found = Stored(made)
    name = f"model.layers.{G.layers - 1}.self_attn.v_proj_hd.weight"
    assert name not in found.schemes and not torch.equal(found.tensor(name), opened(model).tensor(name).half())


def test_caches_in_8_bits(model, data, tmp_path):
    """Scales are searched on keys and values that are not rounded: the same ones as without."""
    kept = {"kv": "int8", "kv_cache": "int8"}
    made = build(BuildOptions(model, tmp_path / "bundle", "int8", 32, calibrate=data, check="weights", **kept))
    assert made.manifest.scales is not None and made.manifest.geometry.int8_cache


@pytest.mark.parametrize("check", [stored_weights, parity])
@pytest.mark.parametrize("what", ["integer", "step", "norm", "scales"])
def test_a_bundle_that_is_not_the_checkpoint_times_its_scales(bundle, model, tmp_path, check, what):
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    found = Stored(Bundle(folder))
    name = "model.layers.2.self_attn.o_proj.weight" + {"step": ".scale"}.get(what, "")
    if what == "norm":
        name = "model.layers.2.input_layernorm.weight"
    if what == "scales":
        arrays = {group: values.numpy().copy() for group, values in read_scales(Bundle(folder)).items()}
        arrays["model.layers.2.down"][5] *= 1.5
        with open(folder / "scales.npz", "wb") as file:
            np.savez(file, **arrays)
    else:
        with found.opened(name) as file:
            offset = file.tell()
        with open(folder / "decoder.weights", "r+b") as file:
            file.seek(offset + 1)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ (0x33 if what == "integer" else 0x01)]))
    with pytest.raises(ParityError, match="checkpoint's"):
        check(Bundle(folder, verify=False), opened(model))


@pytest.mark.parametrize("content", [b"no archive", "empty", "negative"])
def test_scales_that_are_none(bundle, tmp_path, content):
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    if isinstance(content, bytes):
        (folder / "scales.npz").write_bytes(content)
    else:
        arrays = {group: -values.numpy() for group, values in read_scales(Bundle(folder)).items()}
        with open(folder / "scales.npz", "wb") as file:
            np.savez(file, **(arrays if content == "negative" else {}))
    size = (folder / "scales.npz").stat().st_size
    edit(folder, lambda manifest: manifest["files"]["scales.npz"].update(bytes=size))
    with pytest.raises(BundleError, match=r"scales\.npz"):
        read_scales(Bundle(folder, verify=False))


# What fails, and how.


@pytest.mark.parametrize(
    ("lines", "error", "text"),
    [
        ("[]", ConfigError, "no entries"),
        ("", ConfigError, "no entries"),
        ("{broken", ConfigError, "line 1"),
        ('[{"question": "a?"}]', ConfigError, "entry 1: image is missing"),
        ('[{"image": "wide.png"}]', ConfigError, "(?s)entry 1.*one question"),
        ('{"image": "wide.png", "question": "a?"}\n{"image": 5, "question": "a?"}', ConfigError, "entry 2: image is 5"),
        ('[{"image": "wide.png", "question": "a?", "colour": 1}]', ConfigError, "colour"),
        ('[{"image": "gone.png", "question": "a?"}]', ImageError, "(?s)entry 1.*gone.png does not exist.*relative to"),
        ('[{"image": "data.json", "question": "a?"}]', ImageError, "not an image"),
        ('[{"image": "wide.png", "input_ids": [-200, -200]}]', PromptError, "entry 1: 2 images"),
        ('[{"image": "wide.png", "input_ids": [1, 5]}]', PromptError, "entry 1"),
        ('[{"image": "wide.png", "input_ids": [-200], "answer_ids": [300]}]', PromptError, "answer token 300"),
        (json.dumps([{"image": "wide.png", "question": "a " * 200}]), PromptError, "at most 160"),
    ],
)
def test_data_that_is_none(data, model, tmp_path, lines, error, text):
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    (folder / "data.json").write_text(lines)
    with pytest.raises(error, match=text) as caught:
        read_pictures(read_requests(folder, model, read_config(model)), G)
    assert caught.value.expected or caught.value.fix


def test_every_picture_is_opened_once(data, model, monkeypatch):
    opened, requests = [], read_requests(data, model, read_config(model))
    monkeypatch.setattr(calibration_data, "load_image", lambda path: opened.append(path.name) or load_image(path))
    assert [picture.tiles.shape[0] for picture in read_pictures(requests, G).values()] == [1 + G.zoom**2] * 2
    assert sorted(opened) == ["tall.png", "wide.png"]


def test_a_check_reads_the_scales_once(bundle, model, monkeypatch):
    read = []
    monkeypatch.setattr(stored, "read_scales", lambda made: read.append(made) or read_scales(made))
    for check in (stored_weights, parity):
        check(Bundle(bundle), opened(model))
        assert len(read) == 1, check
        read.clear()


def test_where_the_data_is(data, model, tmp_path):
    config = read_config(model)
    by_folder, by_file = (read_requests(path, model, config) for path in (data, data / "data.json"))
    assert [request.answer for request in by_folder] == [request.answer for request in by_file]
    assert len(by_folder) == 3 and by_folder[1].begin == 1 and by_folder[1].answer == (70, 80)
    for path, text in ((tmp_path / "nowhere", "no calibration data"), (tmp_path, "0 files")):
        with pytest.raises(OptionError, match=text) as caught:
            read_requests(path, model, config)
        assert caught.value.fix


def test_a_follow_up_stands_behind_its_history(tmp_path):
    """As the runtime asks it; the question alone is shorter."""
    model = ROOT / "checkpoints/default"
    config = read_config(model)
    assert config.turn_template
    row = {"image": "a.png", "question": "and in the yellow one?", "answer": "82"}
    said = [["what number is in the red diamond?", "25"]]
    file = tmp_path / "data.json"
    file.write_text(json.dumps([row | {"history": said}, row]))
    follow_up, alone = read_requests(file, model, config)
    words = Tokenizer.from_file(str(model / "tokenizer.json"))
    text = words.decode(follow_up.ids[follow_up.ids >= 0].tolist())
    assert "what number is in the red diamond?" in text and "25" in text and text.endswith("answer:")
    assert len(follow_up.ids) > len(alone.ids) and follow_up.answer == alone.answer

    for history in ([["a question"]], [["one", "two", "three"]], "a question", [[1, 2]]):
        file.write_text(json.dumps([row | {"history": history}]))
        with pytest.raises(ConfigError, match="history"):
            read_requests(file, model, config)
    file.write_text(json.dumps([{"image": "a.png", "input_ids": [1, -200], "history": said}]))
    with pytest.raises(ConfigError, match="history stands before a question"):
        read_requests(file, model, config)


def test_words_without_a_tokenizer(data, tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", G)
    with pytest.raises(PromptError, match="no tokenizer"):
        read_requests(data, folder, read_config(folder))


def test_too_little_memory(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(export.weights.calibrate, "available_bytes", lambda: 10**9)
    with pytest.raises(OptionError, match="calibration on 3 questions about 2 images needs") as caught:
        build(BuildOptions(model, tmp_path / "bundle", "int4", 32, calibrate=data))
    assert "--calibrate" in caught.value.fix and not (tmp_path / "bundle").exists()


def test_command_line(tmp_path):
    assert parse_arguments(["--int4", "--calibrate", "examples"]).calibrate == Path("examples")
    with pytest.raises(OptionError, match="calibrate with fp16") as caught:
        parse_arguments(["--fp16", "--calibrate", "examples"])
    assert "--int4" in caught.value.fix
    line = [sys.executable, "export/build.py", "--int4", "--block-size", "16", "--calibrate", "nowhere"]
    result = subprocess.run([*line, "--out", tmp_path / "bundle"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1 and "no calibration data nowhere" in result.stderr and "fix:" in result.stderr
    assert not (tmp_path / "bundle").exists()


def test_every_ratio_is_recognised():
    """largest_errors takes a step for what one of RATIOS gives: 1, and less, but not so little that nothing is left."""
    assert RATIOS[0] == 1.0 and list(RATIOS) == sorted(RATIOS, reverse=True) and RATIOS[-1] >= 0.5
    assert issubclass(ParityError, FlexError)
