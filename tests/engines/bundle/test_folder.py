"""Bundles that were damaged, and bundles that could not be written."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from engines.bundle.folder import Bundle
from engines.bundle.manifest import FORMAT, MANIFEST
from engines.bundle.writer import write_bundle
from engines.errors import BundleError, ExportError
from tests.engines.manifests import edit
from tests.geometries import tiny


@pytest.fixture
def copy(random_model, tmp_path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(random_model("tiny", tiny())[1], tmp_path / "bundle"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_opens_and_describes_itself(copy):
    bundle = Bundle(copy)
    assert bundle.manifest.geometry == tiny()
    assert bundle.manifest.page_budget == tiny().pages
    assert set(bundle.manifest.files) == {path.name for path in copy.iterdir()} - {MANIFEST}
    assert bundle.manifest.options["check"] == "parity"
    assert len(bundle.manifest.source["sha256"]) == 64


def test_bundles_of_before_a_choice_open_without_it(copy):
    def forget(manifest):
        for field in ("lazy_pages", "int8_pages", "int8_cache"):
            del manifest["geometry"][field]
        del manifest["options"]["kv"], manifest["options"]["kv_cache"]

    edit(copy, forget)
    assert Bundle(copy).manifest.geometry == tiny()


def without_plugin_free(manifest):
    del manifest["parts"]["decoder"]["graphs"]["plugin-free"]


DAMAGE = {
    "no folder": (lambda folder: shutil.rmtree(folder), "no bundle folder"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "no bundle.json"),
    "no JSON": (lambda folder: (folder / MANIFEST).write_text("{"), "is no JSON"),
    "a list": (lambda folder: (folder / MANIFEST).write_text("[]"), "no manifest"),
    "newer format": (lambda folder: edit(folder, lambda m: m.update(format=FORMAT + 1)), "upgrade"),
    "older format": (lambda folder: edit(folder, lambda m: m.update(format=0)), "rebuild"),
    "missing field": (lambda folder: edit(folder, lambda m: m.pop("geometry")), "geometry"),
    "wrong type": (lambda folder: edit(folder, lambda m: m["geometry"].update(layers="many")), "geometry.layers"),
    "true for a format": (lambda folder: edit(folder, lambda m: m.update(format=True)), "format True"),
    "endless nesting": (lambda folder: (folder / MANIFEST).write_text("[" * 100_000), "is no JSON: nested"),
    "text for a number": (lambda folder: edit(folder, lambda m: m["geometry"].update(threshold="48")), "threshold"),
    "impossible number": (
        lambda folder: edit(folder, lambda m: m["geometry"]["vision"].update(patch=0)),
        "vision.patch is 0",
    ),
    "other geometry": (lambda folder: edit(folder, lambda m: m["geometry"].update(layers=6)), "not those of its"),
    "unknown residency": (lambda folder: edit(folder, lambda m: m.update(residency="some")), "residency 'some'"),
    "int8 pages": (lambda folder: edit(folder, lambda m: m["geometry"].update(int8_pages=True)), "not those of its"),
    "int8 cache": (
        lambda folder: edit(folder, lambda m: [m["geometry"].update(int8_cache=True), without_plugin_free(m)]),
        "graph of decoder are not those of its",
    ),
    "no parts": (lambda folder: edit(folder, lambda m: m.update(parts={})), "parts"),
    "no plugin-free graph": (lambda folder: edit(folder, without_plugin_free), "graphs of decoder"),
    "other capacity": (lambda folder: edit(folder, lambda m: m["geometry"].update(context=150)), "plugin-free graph"),
    "no files": (lambda folder: edit(folder, lambda m: m.update(files={})), "not among the files"),
    "negative budget": (lambda folder: edit(folder, lambda m: m.update(page_budget=-3)), "page_budget -3"),
    "large budget": (lambda folder: edit(folder, lambda m: m.update(page_budget=17)), "page_budget 17"),
    "precision": (lambda folder: edit(folder, lambda m: m.update(precision="fp99")), "fp99"),
    "template": (lambda folder: edit(folder, lambda m: m["prompt"].update(template="<image>")), "template"),
    "turn": (lambda folder: edit(folder, lambda m: m["prompt"].update(turn="{prompt}{answer}")), "turn template"),
    "image in a turn": (
        lambda folder: edit(folder, lambda m: m["prompt"].update(turn="{answer}<image>{prompt}")),
        "no <image>",
    ),
    "system": (lambda folder: edit(folder, lambda m: m["prompt"].update(system="SYSTEM")), "system text 'SYSTEM'"),
    "missing file": (lambda folder: (folder / "decoder.weights").unlink(), "decoder.weights is missing"),
    "shorter file": (lambda folder: (folder / "pages.onnx").write_bytes(b"x"), "pages.onnx has 1 bytes"),
    "changed file": (lambda folder: flip(folder / "decoder.weights"), "decoder.weights was changed"),
    "changed graph": (lambda folder: flip(folder / "vision.onnxruntime.onnx"), "vision.onnxruntime.onnx was changed"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_the_fix_named(damage, copy):
    harm, text = DAMAGE[damage]
    harm(copy)
    with pytest.raises(BundleError, match=text) as caught:
        Bundle(copy)
    assert "export/build.py" in caught.value.fix or "upgrade" in caught.value.fix


def test_without_verification_only_sizes_count(copy):
    flip(copy / "decoder.weights")
    Bundle(copy, verify=False)
    (copy / "decoder.weights").write_bytes(b"")
    with pytest.raises(BundleError, match="0 bytes"):
        Bundle(copy, verify=False)


def test_a_file_outside_the_bundle_is_refused(copy):
    (copy / "pages.onnx").rename(copy.parent / "secret")

    def point_outside(manifest):
        manifest["files"]["../secret"] = manifest["files"].pop("pages.onnx")

    edit(copy, point_outside)
    with pytest.raises(BundleError, match="inside the bundle"):
        Bundle(copy)


def test_a_graph_outside_the_bundle_is_refused(copy):
    edit(copy, lambda manifest: manifest["parts"]["pages"]["graphs"]["traced"].update(file="../secret"))
    with pytest.raises(BundleError, match="not among the files"):
        Bundle(copy)


def test_names_the_system_refuses():
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle("a" * 5000)


def test_a_missing_graph_names_the_command(copy):
    with pytest.raises(BundleError, match="no plugin-free graph of vision") as caught:
        Bundle(copy).graph("vision", "plugin-free")
    assert "export/build.py" in caught.value.fix


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), write_bundle(tmp_path / "out") as writer:
        writer.write("part", iter([b"half"]))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_full_disk(tmp_path):
    def chunks():
        yield b"some"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ExportError, match="No space left") as caught, write_bundle(tmp_path / "out") as writer:
        writer.write("part", chunks())
    assert "free disk space" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_old_bundle(copy):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises(RuntimeError), write_bundle(copy) as writer:
        writer.write("decoder.weights", iter([b"half"]))
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_the_manifest_survives_writing_and_reading(copy, tmp_path):
    manifest = Bundle(copy).manifest
    with write_bundle(tmp_path / "again") as writer:
        for name in manifest.files:
            writer.write(name, iter([(copy / name).read_bytes()]))
        assert writer.files == manifest.files
        writer.finish(manifest)
    assert Bundle(tmp_path / "again").manifest == manifest
    assert (tmp_path / "again" / MANIFEST).read_bytes() == (copy / MANIFEST).read_bytes()


def test_only_a_bundle_is_replaced(copy, tmp_path):
    manifest = Bundle(copy).manifest
    with write_bundle(copy) as writer:
        writer.write("part", iter([b"ab", b"c"]))
        writer.finish(manifest)
    assert {path.name for path in copy.iterdir()} == {MANIFEST, "part"}
    for stranger in ("thesis.tex", MANIFEST):
        precious = tmp_path / f"precious-{stranger}"
        precious.mkdir()
        (precious / stranger).write_text('{"name": "of another kind"}')
        with pytest.raises(ExportError, match="no bundle of this version"), write_bundle(precious):
            pass
        assert (precious / stranger).exists()


def test_a_bundle_with_something_beside_it_stays(copy):
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"notes\.txt"), write_bundle(copy):
        pytest.fail("the work must not begin")
    Bundle(copy)


def test_folders_that_cannot_be_replaced(copy, monkeypatch, tmp_path):
    monkeypatch.chdir(copy)
    with pytest.raises(ExportError, match="current folder"), write_bundle(Path()):
        pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="is a file"), write_bundle(tmp_path / "file"):
        pass
    with pytest.raises(ExportError, match="mount point"), write_bundle(Path("/proc")):
        pass


def test_a_link_to_a_bundle_stays_a_link(copy, tmp_path):
    manifest = Bundle(copy).manifest
    link = tmp_path / "link"
    link.symlink_to(copy)
    with write_bundle(link) as writer:
        writer.finish(manifest)
    assert link.is_symlink() and {path.name for path in copy.iterdir()} == {MANIFEST}


def test_the_old_bundle_comes_back_when_the_new_one_cannot_take_its_place(copy, monkeypatch):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    manifest, original = Bundle(copy).manifest, Path.rename

    def rename(self, target):
        if target == copy.resolve() and self.name != "old":
            raise OSError(errno.EBUSY, "Device or resource busy")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ExportError, match="busy"), write_bundle(copy) as writer:
        writer.finish(manifest)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]
