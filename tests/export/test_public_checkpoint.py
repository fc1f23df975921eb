"""The public checkpoint is taken as it is: its config, and a small one with exactly its files and keys, build without
a word of warning."""

from __future__ import annotations

import io
import json
import logging

import pytest
from rich.console import Console

from engines.bundle.manifest import SYSTEM_PROMPT, TURN_TEMPLATE
from export.build import BuildOptions, SizingRequest, build, print_sizes
from export.checkpoint.config import read_config
from tests.export.public_checkpoint import FILES, SMALL, config, tensors, write_public_checkpoint
from tests.geometries import official

TOWER = "openai/clip-vit-large-patch14-336"
# What a build says when something is not as it should be, or not obeyed.
ALARMS = ("warning", "unknown", "obeyed", "left out of", "no engines", "not read", "differ", "damaged", "missing")


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))


def test_its_config(tmp_path):
    """At its own size: the tower is named, and its published numbers are known."""
    (tmp_path / "config.json").write_text(json.dumps(config(official(), TOWER)))
    found = read_config(tmp_path)
    assert found.geometry == official() and found.tower_folder is None
    assert (found.bos_token_id, found.eos_token_ids, found.unknown, found.notes) == (1, (2,), (), ())
    console = Console(file=io.StringIO(), width=200)
    print_sizes(SizingRequest(BuildOptions(tmp_path)), console)
    said = console.file.getvalue()
    assert "13.5 GB" in said and not [word for word in ALARMS if word in said]


def test_its_tensors():
    assert len(tensors(official())) == 750


def test_its_files_build_without_a_warning(tmp_path, caplog, recwarn, capfd):
    folder = write_public_checkpoint(tmp_path / "model")
    assert {path.name for path in folder.iterdir()} == FILES
    console = Console(file=io.StringIO(), width=200, color_system="standard", force_terminal=True, highlight=False)
    manifest = build(BuildOptions(folder, tmp_path / "bundle", check="weights"), console).manifest
    said = console.file.getvalue()
    assert "is ready" in said and "\x1b[33m" not in said  # nothing in yellow
    assert not [word for word in ALARMS if word in said.lower()], said
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not recwarn.list and capfd.readouterr().err == ""
    assert manifest.geometry == SMALL and manifest.options["not_obeyed"] == []
    assert manifest.prompt.bos_token_id == 1 and manifest.prompt.eos_token_ids == (2,)
    assert manifest.prompt.tokenizer == "tokenizer.json"
    assert (manifest.prompt.turn, manifest.prompt.system) == (TURN_TEMPLATE, SYSTEM_PROMPT)
    dropped = tensors(SMALL).keys() - manifest.dropped.keys()
    assert len(manifest.dropped) == 2 * 9 + 16 + 2 and len(dropped) == len(tensors(SMALL)) - 36
    assert "unknown to this model" not in manifest.dropped.values()
