"""What a manifest may say: sealed by a digest, in ranges, of files that are files of the folder. Nothing is made of its
numbers before they are checked."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from engines.bundle.consistency import SIZES
from engines.bundle.folder import Bundle
from engines.bundle.manifest import DIGEST, MANIFEST, PROMPT_TEMPLATE, SYSTEM_PROMPT, TURN_TEMPLATE, Prompt
from engines.bundle.writer import write_manifest
from engines.errors import BundleError, OptionError
from runtime import Engine
from tests.engines.manifests import edit
from tests.geometries import tiny
from tests.paths import ROOT

MEMORY = 1 << 30  # bytes that opening a hostile manifest may take of address space, Python and numpy included


@pytest.fixture(scope="module")
def whole(random_model) -> Path:
    return random_model("tiny", tiny())[1]


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """A bundle to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def refused(folder: Path, text: str | None = None) -> BundleError:
    with pytest.raises(BundleError, match=text) as caught:
        Bundle(folder, verify=False)
    assert caught.value.expected and caught.value.fix and len(str(caught.value)) < 2000
    return caught.value


# Conversations.


def test_old_bundles_have_the_turns_of_the_official_template(copy):
    """They say nothing of turns: those of the official template are known, those of another are not."""

    def old(template: str) -> Prompt:
        edit(copy, lambda m: [m["prompt"].pop("turn", None), m["prompt"].pop("system", None)])
        edit(copy, lambda m: m["prompt"].update(template=template))
        return Bundle(copy, verify=False).manifest.prompt

    official = old(PROMPT_TEMPLATE)
    assert official.turn == TURN_TEMPLATE == " {answer}</s>USER: {prompt} ASSISTANT:"
    assert official.system == SYSTEM_PROMPT and SYSTEM_PROMPT.startswith("A chat between a curious human and")
    other = old("<image>\n{prompt} answer:")
    assert (other.turn, other.system) == (None, None)


def test_turns_of_its_own(copy):
    """Those that a bundle names, whatever its template; they come back when the manifest is written again."""
    texts = {"template": PROMPT_TEMPLATE, "turn": "{answer}|{prompt}", "system": "A chat between a curious human"}
    edit(copy, lambda m: m["prompt"].update(texts))
    manifest = Bundle(copy, verify=False).manifest
    assert (manifest.prompt.turn, manifest.prompt.system) == (texts["turn"], texts["system"])
    write_manifest(copy, manifest)
    assert Bundle(copy, verify=False).manifest == manifest


# The digest.


def test_one_digest_for_all_of_it(copy):
    bundle = Bundle(copy)
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", bundle.digest)
    assert json.loads((copy / MANIFEST).read_text())[DIGEST] == bundle.digest
    assert Bundle(copy, expect=bundle.digest).digest == bundle.digest
    other = f"sha256:{'0' * 64}"
    with pytest.raises(BundleError, match="has the digest") as caught:
        Bundle(copy, expect=other)
    assert bundle.digest in caught.value.found and caught.value.expected == other
    assert f"python -m engines.doctor {copy}" in caught.value.fix
    for odd in ("", "0" * 64, "sha256:", f"sha256:{'g' * 64}", f"{other} ", 7):
        with pytest.raises(OptionError, match="expect"):
            Bundle(copy, expect=odd)


def test_an_engine_opens_the_bundle_that_is_expected(copy):
    digest = Bundle(copy).digest
    assert Engine(copy, expect=digest, threads=1).manifest.name
    for verify in (True, False):
        with pytest.raises(BundleError, match="has the digest"):
            Engine(copy, expect=f"sha256:{'0' * 64}", verify=verify)
    line = [sys.executable, "-m", "runtime", str(copy), "none", "hello", "--expect", f"sha256:{'0' * 64}"]
    run = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 1 and f"has the digest {digest}" in run.stderr


def test_the_digest_depends_on_the_content_and_not_on_the_layout(copy):
    digest = Bundle(copy).digest
    text = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(json.dumps(dict(reversed(json.loads(text).items()))))
    assert Bundle(copy).digest == digest
    edit(copy, lambda manifest: manifest.update(name="other"))
    assert Bundle(copy).digest != digest


def test_a_bundle_of_before_there_were_digests_opens_and_has_one(copy):
    digest = Bundle(copy).digest
    edit(copy, lambda manifest: None, sealed=False)
    assert DIGEST not in json.loads((copy / MANIFEST).read_text())
    assert Bundle(copy, expect=digest).digest == digest


def test_every_bit_counts(copy):
    """Of each line of bundle.json one bit is turned: an error, and a typed one; never another bundle."""
    data, digest = (copy / MANIFEST).read_bytes(), Bundle(copy).digest
    lines = [match.start() for match in re.finditer(rb"(?m)^", data)][::7]
    for index, start in enumerate(lines):
        end = data.find(b"\n", start)
        for place in {start + (index * 5) % max(1, end - start), (start + end) // 2}:
            changed = bytearray(data)
            changed[place] ^= 1 << index % 7
            (copy / MANIFEST).write_bytes(changed)
            with suppress(BundleError):
                assert Bundle(copy, verify=False).digest == digest  # a blank became another, say


def test_a_changed_manifest_says_so(copy):
    text = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(text.replace("0.48145466", "0.48145467", 1))
    assert "was changed" in refused(copy).found
    (copy / MANIFEST).write_text(text.replace(f'"{DIGEST}"', '"eigest"'))
    refused(copy, "unknown key 'eigest'")


def test_a_key_that_a_newer_version_added_does_no_harm_when_it_is_sealed(copy):
    edit(copy, lambda manifest: manifest.update(colour="blue"))
    Bundle(copy)


# Ranges.


def set_geometry(name: str, value: object):
    def change(manifest):
        place = manifest["geometry"]
        *outer, last = name.split(".")
        for key in outer:
            place = place[key]
        place[last] = value

    return change


BAD = {
    **{f"{name} {value}": (set_geometry(name, value), name.split(".")[-1])
       for name in SIZES for value in (SIZES[name][0] - 1, SIZES[name][1] + 1, 10**12, -(10**30))},
    "eps 0": (set_geometry("rms_eps", 0.0), "rms_eps"),
    "vision eps": (set_geometry("vision.eps", 2.0), "vision.eps"),
    "rope": (set_geometry("rope_theta", -1.0), "rope_theta"),
    "huge rope": (set_geometry("rope_theta", 1e300), "rope_theta"),
    "mean 1.5": (set_geometry("image_mean", [1.5, 0.4, 0.4]), "image_mean holds 1.5"),
    "mean -1": (set_geometry("image_mean", [0.4, -1.0, 0.4]), "image_mean holds -1"),
    "two means": (set_geometry("image_mean", [0.4, 0.4]), "image_mean"),
    "std 0": (set_geometry("image_std", [0.0, 0.4, 0.4]), "image_std holds 0"),
    "std -1": (set_geometry("image_std", [0.4, -1.0, 0.4]), "image_std holds -1"),
    "std 1e-300": (set_geometry("image_std", [0.4, 1e-300, 0.4]), "image_std"),
    "activation": (set_geometry("vision.activation", "relu"), "activation"),
    "odd head_dim": (lambda m: m["geometry"].update(head_dim=7, hidden=28), "even"),
    "hidden": (set_geometry("hidden", 33), "hidden 33"),
    "kv_heads": (set_geometry("kv_heads", 3), "kv_heads 3"),
    "vision heads": (set_geometry("vision.heads", 3), "vision.heads 3"),
    "patch": (set_geometry("vision.patch", 13), "vision.patch 13"),
    "cells": (set_geometry("cells", 9), "cells 9"),
    "context": (set_geometry("context", 64), "context 64"),
    "start_layer": (set_geometry("start_layer", 4), "start_layer 4"),
    "page_slots alone": (set_geometry("page_slots", 4), "page_slots without lazy_pages"),
    "page_slots 0": (lambda m: m["geometry"].update(page_slots=0, lazy_pages=True), "page_slots 0"),
    "page_slots 17": (lambda m: m["geometry"].update(page_slots=17, lazy_pages=True), "page_slots 17"),
    "page_slots of unlike pages": (
        lambda m: m["geometry"].update(page_slots=4, lazy_pages=True, cells=5), "page_slots with 24 hi-res tokens"),
    "hi-res side": (lambda m: (m["geometry"].update(lowres=8192, zoom=32), m["geometry"]["vision"].update(patch=1)),
                    "hi-res tokens"),
    "eos": (lambda m: m["prompt"].update(eos_token_ids=[2, 64]), "eos_token_ids 64"),
    "eos 10**12": (lambda m: m["prompt"].update(eos_token_ids=[10**12]), "eos_token_ids 1000000000000"),
    "bos": (lambda m: m["prompt"].update(bos_token_id=-1), "bos_token_id -1"),
    "bytes": (lambda m: m["files"]["pages.onnx"].update(bytes=-1), "of -1 bytes"),
    "many bytes": (lambda m: m["files"]["pages.onnx"].update(bytes=1 << 60), "bytes"),
    "sha256": (lambda m: m["files"]["pages.onnx"].update(sha256="0"), "SHA-256"),
    "budget 10**12": (lambda m: m.update(page_budget=10**12), "page_budget"),
    "vision's graph is the decoder's": (
        lambda m: m["parts"]["vision"]["graphs"]["onnxruntime"].update(file="decoder.onnxruntime.onnx"), "used twice"),
    "shared weights": (lambda m: m["parts"]["pages"].update(weights="vision.weights"), "used twice"),
    "scales are weights": (lambda m: m.update(kernels="vision.weights"), "used twice"),
}  # fmt: skip


@pytest.mark.parametrize("sealed", [True, False])
def test_numbers_out_of_range(whole, tmp_path, sealed):
    for number, (name, (change, text)) in enumerate(BAD.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(whole / MANIFEST, folder / MANIFEST)  # it alone: nothing else is looked at before
        edit(folder, change, sealed=sealed)
        assert text in str(refused(folder)), name


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 5000])
def test_numbers_that_are_none(copy, number):
    edit(copy, lambda manifest: None, sealed=False)
    text = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(text.replace("0.48145466", number, 1))
    refused(copy)


NAMES = [
    "../x", "a/b", "/etc/passwd", "", ".", "..", ".hidden", "a\0b", "a\nb", "a\\b", "C:x", "x:y", "CON", "nul.txt",
    "com1", "lpt9.weights", "ends.", "ends ", "blank name", "x" * 5000, "\ud800", "é", MANIFEST, "Bundle.JSON", "-rf",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:20])
def test_names_that_are_no_files_of_the_folder(copy, name):
    edit(copy, lambda manifest: manifest["files"].update({name: {"bytes": 1, "sha256": "0" * 64}}))
    refused(copy)


def test_names_that_differ_in_case_alone(copy):
    edit(copy, lambda manifest: manifest["files"].update({"VISION.weights": manifest["files"]["vision.weights"]}))
    refused(copy, "twice, in letters of another case")


def test_hostile_manifests_take_no_memory_and_no_time(whole, tmp_path):
    """Each alone in a folder, opened in a process that may take little memory."""
    hostile = {
        "layers": lambda m: m["geometry"].update(layers=10**12),
        "most layers": lambda m: m["geometry"].update(layers=SIZES["layers"][1]),
        "all that ranges allow": lambda m: m["geometry"].update(
            layers=512, start_layer=0, cells=256, lowres=3584, zoom=32, context=1 << 24
        ),
        "zoom": lambda m: m["geometry"].update(zoom=10**12),
        "vision": lambda m: m["geometry"]["vision"].update(layers=10**15),
        "files": lambda m: m["files"].update({f"f{n}": {"bytes": 1, "sha256": "0" * 64} for n in range(100_000)}),
        "deep": lambda m: m["options"].update(deep=json.loads("[" * 900 + "]" * 900)),
    }
    for name, change in hostile.items():
        (tmp_path / name).mkdir()
        shutil.copy(whole / MANIFEST, tmp_path / name / MANIFEST)
        edit(tmp_path / name, change)
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "size").mkdir()
    (tmp_path / "large").rename(tmp_path / "size" / MANIFEST)
    program = """
import sys
from contextlib import suppress
from pathlib import Path
from engines.bundle.folder import Bundle
from engines.errors import BundleError
for name in sys.argv[2:]:
    try:
        Bundle(Path(sys.argv[1]) / name)
    except BundleError as error:
        print("typed")
"""
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), *hostile, "size"],
        capture_output=True, text=True, cwd=ROOT, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
    )  # fmt: skip
    assert run.stdout.split() == ["typed"] * (len(hostile) + 1), run.stdout + run.stderr


# What is no ordinary file.


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


KINDS = {
    "a pipe": (make_pipe, "is a pipe"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "a folder": (lambda path: path.mkdir(), "is a folder"),
    "a dangling link": (lambda path: path.symlink_to("gone"), "is a link to gone"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "cannot be read"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [MANIFEST, "decoder.weights", "vision.onnxruntime.onnx", "pages.onnx"])
def test_what_is_no_ordinary_file(copy, name, kind):
    make, text = KINDS[kind]
    (copy / name).unlink()
    make(copy / name)
    refused(copy, text)


@pytest.mark.parametrize("name", [MANIFEST, "decoder.weights", "pages.onnx"])
def test_files_that_may_not_be_read(copy, name, monkeypatch):
    """For root every file may be: the system's answer is put in its mouth."""
    opened = os.open

    def refuse(path, *arguments, **named):
        if Path(path).name == name:
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **named)

    monkeypatch.setattr(os, "open", refuse)
    refused(copy, f"{name} cannot be read: Permission denied")


def test_folders_that_are_none(tmp_path):
    for path in ("a" * 5000, "a\0b", tmp_path / "none", "/dev/null"):
        with pytest.raises(BundleError):
            Bundle(path)


@pytest.mark.parametrize("where", [("precision",), ("backend",), ("prompt", "template")])
def test_a_long_value_is_not_told_in_full(where, copy):
    def lengthen(manifest: dict) -> None:
        for key in where[:-1]:
            manifest = manifest[key]
        manifest[where[-1]] = "<image>" * 100_000

    edit(copy, lengthen)
    with pytest.raises(BundleError) as caught:
        Bundle(copy)
    assert len(str(caught.value)) < 2000
