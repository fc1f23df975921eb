"""Files that are written to while a bundle is open: an error at the next request where the system tells, and none where
the mapping keeps the old file."""

from __future__ import annotations

import gc
import os
import shutil
import timeit
from pathlib import Path

import pytest

from engines.bundle.folder import Bundle
from engines.bundle.mapped import MappedFiles
from engines.errors import BundleError
from engines.ort import OrtModel
from runtime import Engine
from tests.geometries import tiny

WEIGHTS = "vision.weights", "pages.weights", "decoder.weights"
ASKED = {"input_ids": [1, 5, 7], "max_new_tokens": 2, "stop_at_eos": False}


@pytest.fixture
def copy(random_model, tmp_path) -> Path:
    return Path(shutil.copytree(random_model("tiny", tiny())[1], tmp_path / "bundle"))


def cut(path: Path) -> None:
    os.truncate(path, 0)


def overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))


def grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"x")


@pytest.mark.parametrize("harm", [cut, overwrite, grow])
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("answered", [False, True])
def test_what_is_written_in_place_is_an_error(copy, harm, name, answered):
    engine = Engine(copy, threads=1)
    view = engine.image(None)
    if answered:
        view.ask(**ASKED)
    harm(copy / name)
    for ask in (view.ask, lambda **options: engine.generate(None, **options)):
        with pytest.raises(BundleError, match=rf"{name} was written to") as caught:
            ask(**ASKED)
        assert "rename" in caught.value.fix


def replaced(path: Path) -> None:
    path.with_name("new").write_bytes(bytes(10))
    path.with_name("new").rename(path)


@pytest.mark.parametrize(
    "change", [replaced, Path.unlink, lambda path: path.chmod(0o600)], ids=["rename", "unlink", "chmod"]
)
def test_what_leaves_the_mapped_file_alone_is_none(copy, change):
    engine = Engine(copy, threads=1)
    before = engine.generate(None, **ASKED)
    for name in WEIGHTS:
        change(copy / name)
    assert engine.generate(None, **ASKED).token_ids == before.token_ids


def test_a_view_that_began_before_notices(copy):
    engine = Engine(copy, threads=1)
    stream = engine.stream(None, **ASKED)  # nothing is computed yet
    cut(copy / "decoder.weights")
    with pytest.raises(BundleError, match="was written to"):
        stream.answer()


@pytest.mark.parametrize("size", [10, None], ids=["too short to open", "as long"])
def test_a_file_that_is_replaced_while_the_bundle_is_opened(copy, monkeypatch, size):
    session, weights = OrtModel.session, copy / "decoder.weights"
    other = bytes(size or weights.stat().st_size)

    def meanwhile(self, path, **how):
        (copy / "new").write_bytes(other)
        (copy / "new").rename(weights)
        return session(self, path, **how)

    bundle = Bundle(copy)
    monkeypatch.setattr(OrtModel, "session", meanwhile)
    with pytest.raises(BundleError, match="was replaced since the bundle was opened"):
        OrtModel(bundle, threads=1)


def test_a_file_that_is_written_to_between_check_and_opening(copy):
    bundle = Bundle(copy)
    overwrite(copy / "decoder.weights")
    with pytest.raises(BundleError, match="was written to"):
        OrtModel(bundle, threads=1)


def test_the_check_costs_microseconds_and_no_descriptor_stays(copy):
    def count() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    bundle, before = Bundle(copy), count()
    mapped = MappedFiles(bundle, WEIGHTS)
    assert count() == before + 3
    assert min(timeit.repeat(mapped.require_unchanged, number=100, repeat=5)) / 100 < 1e-4  # measured: 4e-6
    del mapped
    assert count() == before
