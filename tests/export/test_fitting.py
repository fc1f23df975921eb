"""`python export/build.py --fit`: a configuration that a board, or this machine, can hold."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from rich.console import Console

from engines.bundle.kinds import ONNXRUNTIME
from engines.errors import OptionError
from engines.sizing.choices import CHOICES
from engines.sizing.fit import Room, assess
from engines.trt.options import EngineOptions
from export.build import build, parse_arguments, print_sizes, read_recipe
from export.checkpoint.config import read_config
from export.checkpoint.write_config import write_config
from export.fitting import OPTIONS, fitted, fitting, kept
from export.options import BuildOptions, SizingRequest
from tests.checkpoints import write_checkpoint
from tests.export.plans import printed
from tests.geometries import official, tiny
from tests.paths import ROOT


def chosen(*arguments: object) -> tuple[bool, str]:
    """Whether something fits, and what --plan --fit prints."""
    return printed("--fit", *arguments)


def test_the_command(config_alone):
    line = [sys.executable, "export/build.py", "--plan", "--fit", "--target", "orin-nx-16", "--model", config_alone]
    result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and "\nfits: needs " in result.stdout and not result.stderr
    assert "  --int8: 7.1 GB, 10.2 GB of the builder, 2.6 tokens/s; 57 of 65 official tokens stay" in result.stdout
    assert [path.name for path in config_alone.iterdir()] == ["config.json"]


def test_what_was_proposed_fits(config_alone):
    """The words that are printed are those of a plan that fits."""
    for board, batch in (("orin-nano-8", 1), ("orin-nx-16", 4), ("rtx-3090", 4)):
        asked = "--target", board, "--model", config_alone, "--batch", batch
        fits, text = chosen(*asked)
        (built,) = (line for line in text.splitlines() if line.startswith("build it: "))
        words = built.partition(", or with ")[2].removesuffix(" in place of --fit").split()
        assert fits and words and print_sizes(parse_arguments(["--plan", *map(str, asked), *words]))
    assert "has 6.5 GB" in chosen("--target", "orin-nano-8", "--model", config_alone)[1]


def test_what_is_asked_for_is_kept(config_alone):
    asked = "--target", "orin-nx-16", "--model", config_alone
    fits, text = chosen(*asked, "--fp16", "--context", 2048)
    assert not fits and " more than there is" in text and "--int" not in text and "fp16, int8 pages" in text
    fits, text = chosen(*asked, "--int4", "--context", 2048)
    assert fits and "nothing needs to be chosen" in text and "without --plan\n" in text
    assert kept(BuildOptions(kv="int8", context=2048, precision="fp16")) >= {"kv", "context", "precision"}
    assert not kept(BuildOptions()) & {choice.knob for choice in CHOICES}


def test_a_board_that_holds_it_in_no_configuration(tmp_path):
    """What is missing, and the smallest board that does; where there is none, that."""
    write_config(tmp_path, official(layers=80, hidden=8192, heads=64, kv_heads=64, intermediate=28672))
    board = "--model", tmp_path, "--target", "orin-nx-16"
    fits, text = chosen(*board)
    assert not fits and "does not fit: has 14.5 GB: " in text and " more than there is (with " in text
    assert "fix: add --target agx-orin-64 --fit (the smallest board that holds it)" in text
    fits, text = chosen("--model", tmp_path, "--target", "orin-nx-16", "--fp16")
    assert not fits and "fix: no larger board known here holds it, either" in text
    options = parse_arguments([*map(str, board), "--fit", "--out", str(tmp_path / "out")])
    with pytest.raises(OptionError, match=r"orin-nx-16 has 14\.5 GB: .* more than there is") as caught:
        build(options)
    assert caught.value.fix.startswith("--target agx-orin-64 --fit") and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "orin-nx-16,rtx-4090"], "--fit for the boards orin-nx-16, rtx-4090"),
        (["--target", "sm_87"], "--fit for compute capabilities"),
        (["--target", "sm_87", "--plan"], "--plan for compute capabilities"),
        (["--target", "orin"], "unknown target 'orin'"),
    ],
)
def test_one_memory_is_fitted(arguments, message):
    with pytest.raises(OptionError, match=message):
        parse_arguments(["--fit", *arguments])


def test_every_choice_is_an_option():
    """Of a build, and of its command line."""
    names = {each for make in OPTIONS.values() for each in make(SETTLED)}
    assert names <= {each.name for each in (*fields(BuildOptions), *fields(EngineOptions))}
    assert {choice.knob for choice in CHOICES} == set(OPTIONS)


SETTLED = assess(read_recipe(BuildOptions(fit=True)).configuration(), Room("a room", 10**12)).configuration


def test_a_build_that_is_made_to_fit(tmp_path, monkeypatch):
    """Into less than it takes as it is: what is built is what was chosen, and the manifest says so."""
    model = write_checkpoint(tmp_path / "model", tiny(context=4096))
    options = BuildOptions(model=model, out=tmp_path / "out", fit=True, check="weights")
    recipe = read_recipe(options)
    asked = recipe.configuration()
    room = Room("a room", assess(replace(asked, residency="shared"), Room("all", 10**12)).total - 10_000)
    monkeypatch.setattr("export.fitting.room_for", lambda *_: room)
    found = fitting(options, recipe, asked)
    assert found.assessment.fits and not assess(asked, room).fits
    console, read = Console(file=io.StringIO(), width=200), list[Path]()
    monkeypatch.setattr("export.build.read_config", lambda model: read.append(model) or read_config(model))
    manifest = build(options, console).manifest
    assert read == [model]  # once: what fits is settled for the settings that were asked about
    assert "chosen by --fit, all of it needed" in console.file.getvalue()
    chosen = fitted(options, found)
    assert chosen != replace(options, fit=False) and not chosen.fit
    knobs = {name: getattr(chosen, name) for gain in found.gains for name in OPTIONS[gain.choice.knob](found.asked)}
    assert knobs and {name: manifest.options[name] for name in knobs} == knobs
    assert chosen.residency == manifest.residency == "shared"  # it opens as it fits
    assert manifest.geometry.int8_pages == (chosen.kv == "int8")
    assert manifest.geometry.int8_cache == (chosen.kv_cache == "int8")
    assert manifest.backend == ONNXRUNTIME and "fit" not in manifest.options
    assert manifest.options["context"] == manifest.geometry.context == 4096


def test_it_is_no_option_of_others():
    assert parse_arguments(["--fit"]) == BuildOptions(fit=True)
    assert parse_arguments(["--fit", "--plan"]) == SizingRequest(BuildOptions(fit=True)) and not BuildOptions().fit
