"""Parts of a model that are in memory while an image is encoded, and no longer."""

from __future__ import annotations

import shutil
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

from engines.backend import Opening
from engines.bundle.folder import Bundle
from engines.errors import BackendError, BundleError
from engines.open import chosen, open_model
from engines.ort import OrtModel
from engines.residency import ALL, IMAGE_PARTS, RESIDENCIES, SHARED, ImageParts
from tests.engines.manifests import edit
from tests.geometries import tiny
from tests.parity.requests import request


class Asked:
    """What a backend does, counted."""

    def __init__(self, residency: str) -> None:
        self.opened: list[str] = []
        self.threads: set[str] = set()
        self.fails = False
        self.parts = ImageParts(residency, self._open, self._do)

    def _open(self, name: str) -> object:
        if self.fails:
            raise BackendError("no memory")
        self.opened.append(name)
        return object()

    def _do(self, work):
        self.threads.add(threading.current_thread().name)
        return work()


def test_all_of_it_stays():
    asked = Asked(ALL)
    assert asked.opened == list(asked.parts) == list(IMAGE_PARTS)
    with asked.parts.held("vision") as took:
        assert took == 0.0
    assert list(asked.parts) == list(IMAGE_PARTS) and len(asked.opened) == 2


def test_held_by_several_it_is_opened_once_and_closed_behind_the_last():
    asked = Asked(SHARED)
    assert not asked.opened
    with asked.parts.held("vision") as took:
        part = asked.parts["vision"]
        assert took > 0.0
        with asked.parts.held("vision") as again, asked.parts.held("pages") as other:
            assert again == 0.0 < other
            assert asked.parts["vision"] is part
        assert list(asked.parts) == ["vision"]
        with pytest.raises(KeyError):
            asked.parts["pages"]
    assert not list(asked.parts)
    with asked.parts.held("vision"):
        assert asked.opened == ["vision", "pages", "vision"]


def test_by_threads_at_the_same_time():
    asked, together = Asked(SHARED), threading.Barrier(8)

    def hold() -> None:
        together.wait()
        for _ in range(50):
            with asked.parts.held("vision"):
                assert asked.parts["vision"] is not None

    threads = [threading.Thread(target=hold) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not list(asked.parts) and len(asked.opened) <= 400


def test_errors_leave_it_closed():
    asked = Asked(SHARED)
    asked.fails = True
    with pytest.raises(BackendError, match="no memory"), asked.parts.held("vision"):
        pytest.fail("it was not opened")
    asked.fails = False
    with pytest.raises(RuntimeError), asked.parts.held("vision"):
        raise RuntimeError
    assert not list(asked.parts)


@pytest.mark.parametrize("residency", ["none", "ALL", True, 3])
def test_unknown_residencies(residency):
    with pytest.raises(BackendError, match="residency=") as caught:
        Opening(residency=residency)
    assert caught.value.expected == f"one of {list(RESIDENCIES)}, or None"


# On ONNX Runtime.


@pytest.fixture
def copy(random_model, tmp_path) -> Path:
    return Path(shutil.copytree(random_model("tiny", tiny())[1], tmp_path / "bundle"))


@pytest.mark.parametrize("residency", [None, *RESIDENCIES])
def test_a_bundle_opens_as_it_was_built_unless_told_otherwise(copy, residency):
    """None: of before bundles said anything, all is kept."""

    def say(manifest):
        assert manifest.pop("residency") == ALL  # what a build says that was not asked
        manifest |= {"residency": residency} if residency else {}

    edit(copy, say)
    bundle = Bundle(copy)
    for told in (None, *RESIDENCIES):
        opening = Opening(threads=1, residency=told)
        expected = told or residency or ALL
        assert chosen(bundle, opening).residency == expected
        assert list(open_model(bundle, opening)._images) == (list(IMAGE_PARTS) if expected == ALL else [])


def encoded(model: OrtModel) -> list[np.ndarray]:
    tiles, _, begin = request(tiny(), seed=3, text=9, begin=3)
    with model.held("vision"):
        low, high = model.vision(tiles[:1]), model.vision(tiles[1:])
    return [low.numpy(), *(pages.numpy() for pages in model.project(high, begin).values())]


def test_what_it_gives_is_the_same(copy):
    kept, shared = (OrtModel(Bundle(copy), threads=1, residency=residency) for residency in RESIDENCIES)
    for _ in range(2):
        assert all(map(np.array_equal, encoded(kept), encoded(shared)))
    assert list(kept._images) == list(IMAGE_PARTS) and not list(shared._images)


def test_what_came_of_a_session_does_not_keep_it(random_model):
    """Features and pages live as long as an image is asked about; ONNX Runtime's own outputs hold on to the session."""
    tiles, _, begin = request(tiny(), seed=3, text=9, begin=3)
    model, sessions = OrtModel(Bundle(random_model("tiny", tiny())[1]), threads=1, residency=SHARED), []
    with model.held("vision"), model.held("pages"):
        sessions += [weakref.ref(model._images[name]) for name in IMAGE_PARTS]
        kept = model.vision(tiles[1:])
        pages = model.project(kept, begin)
    assert [session() for session in sessions] == [None, None]
    assert np.isfinite(kept.numpy()).all() and all(np.isfinite(each.numpy()).all() for each in pages.values())


@pytest.mark.parametrize("name", ["vision.weights", "vision.onnxruntime.onnx", "pages.onnxruntime.onnx"])
def test_files_that_are_replaced_before_an_image_needs_them(copy, name):
    """What was checked is what is opened; a bundle that is written to is noticed before anything is computed."""
    model = OrtModel(Bundle(copy), threads=1, residency=SHARED)
    whole = (copy / name).read_bytes()
    (copy / "new").write_bytes(whole)
    (copy / "new").rename(copy / name)
    with pytest.raises(BundleError, match="was replaced since the bundle was opened"):
        encoded(model)
    assert not list(model._images)
    model = OrtModel(Bundle(copy), threads=1, residency=SHARED)
    model.require_unchanged()
    with (copy / name).open("r+b") as file:
        file.write(whole[:1])
        file.truncate(len(whole) - 1)
    with pytest.raises(BundleError, match="was written to"):
        model.require_unchanged()
