"""Absurd, hostile and damaged settings: short typed errors, at once and in little memory."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from engines.bundle.consistency import SIZES
from engines.errors import ConfigError
from export.build import BuildOptions, SizingRequest, print_sizes
from export.checkpoint.config import read_config
from export.checkpoint.write_config import write_config
from tests.geometries import official, tiny
from tests.paths import ROOT

LAYERS, WIDTH, INNER, HEADS, HEAD_WIDTH, VOCABULARY, CONTEXT, PIXELS = (
    SIZES[name][1] for name in ("layers", "hidden", "intermediate", "heads", "head_dim", "vocab", "context", "lowres")
)
SHORT = 700  # characters of a message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_config(tmp_path / "model", tiny())
    return tmp_path / "model"


def change(folder: Path, name: str = "config.json", **changes: object) -> Path:
    path = folder / name
    settings = json.loads(path.read_text()) if path.exists() else {}
    extra = changes.pop("extra", None)
    settings |= changes
    if extra is not None:
        settings["extra"] |= extra
    path.write_text(json.dumps(settings))
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(folder)
    assert len(str(caught.value)) < SHORT
    return str(caught.value)


COUNTS = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": HEAD_WIDTH,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "mm_hidden_size": WIDTH,
}
TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": PIXELS,
    "patch_size": PIXELS,
}


@pytest.mark.parametrize("value", ["more", 10**12, 10**400, 0, -1, 1.5, "8", True, [8], {}])
@pytest.mark.parametrize("key", COUNTS)
def test_counts(folder, key, value):
    value = COUNTS[key] + 1 if value == "more" else value
    said = refused(change(folder, **{key: value}))
    assert f"{key} is " in said and (value != COUNTS[key] + 1 or str(COUNTS[key]) in said)


@pytest.mark.parametrize("value", ["more", 10**12, 10**400, 0, -1, 1.5, "8"])
@pytest.mark.parametrize("key", TOWER)
def test_counts_of_the_tower(folder, key, value):
    assert key in refused(change(folder, "clip/config.json", **{key: TOWER[key] + 1 if value == "more" else value}))


def test_the_ceilings_are_far_above_the_official_model():
    g = official()
    assert 8 * g.hidden <= WIDTH and 8 * g.layers <= LAYERS and 8 * g.vocab <= VOCABULARY and 8 * g.context <= CONTEXT
    assert 8 * g.intermediate <= INNER and 8 * g.highres <= PIXELS


@pytest.mark.parametrize("value", [0, -1, 1, 1e9, 10**400, "1e-5", True, []])
def test_epsilons(folder, value):
    assert "rms_norm_eps" in refused(change(folder, rms_norm_eps=value))


@pytest.mark.parametrize("text", ["Infinity", "-Infinity", "NaN", "1e999", "9" * 5000])
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "num_hidden_layers"])
def test_numbers_that_are_none(folder, key, text):
    raw = (folder / "config.json").read_text().replace(f'"{key}": ', f'"{key}": {text}, "x": ', 1)
    (folder / "config.json").write_text(raw)
    assert "is no JSON" in refused(folder)


@pytest.mark.parametrize("key", ["zoom_ratio", "cells", "start_layer", "threshold", "lowres_size", "highres_size"])
@pytest.mark.parametrize("value", ["9" * 5000, "9" * 10, 10**12, "-" + "9" * 5000, 1.5, "", "1e3", [[[[]]]], True])
def test_numbers_of_extra(folder, key, value):
    assert f"extra.{key} is " in refused(change(folder, extra={key: value}))


@pytest.mark.parametrize(
    ("geometry", "text"),
    [
        (tiny(image_std=(2.0, 0.5, 0.5)), "image_std.0 is 2"),
        (tiny(image_mean=(1.5, 0.5, 0.5)), "image_mean.0 is 1.5"),
        (tiny(zoom=40, lowres=28, cells=1), "geometry.zoom is 40, expected 1 .. 32"),
    ],
    ids=["image_std", "image_mean", "zoom"],
)
def test_what_no_bundle_may_have_no_checkpoint_has(folder, geometry, text):
    write_config(folder, geometry)
    assert text in refused(folder)


def test_hires_tokens(folder):
    assert "hi-res tokens per side" in refused(change(folder, extra={"zoom_ratio": "1000", "highres_size": "112000"}))


@pytest.mark.parametrize(
    "key", ["hidden_act", "mm_projector_type", "mm_vision_tower", "model_type", "image_aspect_ratio", "extra"]
)
@pytest.mark.parametrize("value", ["x" * 5000, "\0", "[bold]" * 99])
def test_long_texts(folder, key, value):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {key: value}))
    assert key in refused(folder)


def test_a_template_has_an_end(folder):
    long = "x" * 10_000 + "<image>{prompt}"
    assert "extra.prompt_template" in refused(change(folder, extra={"prompt_template": long}))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"7",
        b"{",
        b'{"a": ' + b"[" * 100_000,
        b'{"a": 1, "a": 2}',
        b'"' + b"x" * 100_000 + b'"',
        b" " * (17 << 20),
    ],
    ids=range(9),
)
@pytest.mark.parametrize(
    "name", ["config.json", "clip/config.json", "clip/preprocessor_config.json", "generation_config.json"]
)
def test_files_that_are_none(folder, name, content):
    (folder / name).write_bytes(content)
    assert name in refused(folder)


def test_many_keys_take_no_longer_each(folder):
    """200,000 keys, in each of two places: what compares each with all others would take minutes."""
    many = dict.fromkeys(map(str, range(200_000)), 0)
    started = time.process_time()
    text = json.dumps(many).replace('"199998"', '"199999"')
    (folder / "generation_config.json").write_text(text)
    assert "the key '199999' comes twice" in refused(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"extra": "zoom_ratio:3#" + ":1#".join([*many, "x:1"])}))
    assert "extra.0, extra.1" in refused(folder)
    assert time.process_time() - started < 10  # 1 where it was measured


def test_nesting_that_can_be_read(folder):
    deep = json.loads("[" * 100 + "]" * 100)
    assert "extra.zoom_ratio is [[" in refused(change(folder, extra={"zoom_ratio": deep}))


@pytest.mark.parametrize("name", ["config.json", "clip/preprocessor_config.json", "generation_config.json"])
def test_no_ordinary_files(folder, name):
    path = folder / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert "is a pipe" in refused(folder)
    path.unlink()
    path.mkdir()
    assert "is a folder" in refused(folder)
    path.rmdir()
    path.symlink_to(path.name)
    assert "cannot be read" in refused(folder)


def test_the_largest_numbers_take_no_memory(tmp_path):
    """A configuration at every ceiling, planned within 4 GB of address space in a process of its own."""
    g = tiny(
        hidden=WIDTH, heads=HEADS, kv_heads=HEADS, head_dim=WIDTH // HEADS, intermediate=INNER, layers=LAYERS,
        vocab=VOCABULARY, context=CONTEXT,
    )  # fmt: skip
    write_config(tmp_path, g)
    program = f"""
import resource, sys
from pathlib import Path
from export.build import SizingRequest, BuildOptions, print_sizes
from engines.sizing.needs import weight_bytes
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print_sizes(SizingRequest(BuildOptions(Path({str(tmp_path)!r}))))
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (30, 30)),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 200_000  # kB


def test_messages_never_break_the_printing(folder):
    """Names of keys with rich's markup in them are printed as they are."""
    change(folder, **{"[/nothing]": 1, "[bold": 2})
    console = Console(file=io.StringIO(), width=200)
    print_sizes(SizingRequest(BuildOptions(folder)), console)
    assert "not obeyed: [/nothing], [bold" in console.file.getvalue()
