"""Parts of a model that are in memory while an image is encoded, and no longer."""

from __future__ import annotations

import shutil
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engines.backend import Opening
from engines.bundle.folder import Bundle
from engines.errors import BackendError, BundleError
from engines.open import chosen, open_model
from engines.ort import OrtModel
from engines.ort.decoder import OrtDecoder
from engines.residency import ALL, IMAGE_PARTS, RESIDENCIES, SHARED, ImageParts
from export.build import BuildOptions, build
from tests.engines.manifests import edit
from tests.geometries import tiny
from tests.parity.requests import assert_equal, encode, padded, request, steps


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


# Scratch memory of a prompt, and copies of what encodes images, where that is opened for each image.

CHUNK = 7  # of a prompt of 72 tokens: the last chunk is shorter


@pytest.fixture(scope="module")
def models(random_model) -> tuple[OrtModel, OrtModel]:
    """One that keeps everything, and one that spares memory."""
    bundle = Bundle(random_model("tiny", tiny())[1])
    return OrtModel(bundle, threads=1), OrtModel(bundle, threads=1, residency=SHARED, prefill_chunk=CHUNK)


@pytest.fixture
def runs(monkeypatch) -> list[int]:
    """Tokens of a row in each run of a decoder."""
    seen, plain = [], OrtDecoder._run

    def run(self, ids, *rest):
        seen.append(ids.shape[1])
        return plain(self, ids, *rest)

    monkeypatch.setattr(OrtDecoder, "_run", run)
    return seen


def test_a_prompt_in_chunks_says_the_same(models, runs):
    tiles, ids, begin = request(tiny(), seed=3)
    whole, chunked = (steps(model, encode(model, tiles, begin), ids, [5, 9], 16) for model in models)
    assert runs == [72, 1, 1, 1, *[CHUNK] * 10, 2, 1, 1, 1]
    assert_equal(whole, chunked)
    assert whole[-1].page_count.all()  # pages were read


@pytest.mark.parametrize(
    "kept", [{"kv": "int8", "kv_cache": "int8"}, {"projection": "lazy", "page_slots": 8}], ids=["int8", "page slots"]
)
def test_a_prompt_in_chunks_says_the_same_however_pages_and_cache_are_kept(kept, random_model, tmp_path, runs):
    checkpoint, found = random_model("tiny", tiny())[0], []
    bundle = Bundle(build(BuildOptions(checkpoint, tmp_path / "bundle", precision="fp32", check="none", **kept)).path)
    tiles, ids, begin = request(tiny(), seed=3)
    runs.clear()  # of the check of a build
    for options in ({}, {"residency": SHARED, "prefill_chunk": CHUNK}):
        model = OrtModel(bundle, threads=1, **options)
        found.append(steps(model, encode(model, tiles, begin), ids, [5, 9], 8))
    assert runs == [72, 1, 1, 1, *[CHUNK] * 10, 2, 1, 1, 1]
    assert_equal(*found)
    assert found[0][-1].page_count.all()


def test_the_last_column_of_a_prompt_reads_pages(models, runs):
    tiles, ids, begin = request(tiny(), seed=4)
    found = [model.decoder(encode(model, tiles, begin), 100).run(ids, 16) for model in models]
    assert runs[1:] == [CHUNK] * 10 + [3]
    assert_equal(found[:1], found[1:])


def test_padded_rows_in_chunks(models, runs):
    prompts = [np.random.default_rng(n).integers(3, 64, (1, n)) for n in (24, 4, 16)]
    ids, lengths, last = padded(prompts)
    found = []
    for model in models:
        decoder = model.decoder(model.no_image(3), 64)
        decoder.run(ids, lengths=lengths)
        assert list(decoder.length) == [23, 3, 15]
        found.append(decoder.run(last))
    assert runs == [23, 1, *[CHUNK] * 3, 2, 1]
    assert_equal(found[:1], found[1:])


def test_a_chunk_that_fails_leaves_the_cache_as_it_was(models, monkeypatch):
    model, ids = models[1], np.arange(3, 33)[None]
    decoder, expected = model.decoder(model.no_image(1), 64), model.decoder(model.no_image(1), 64).run(ids).logits
    runs, plain = [], type(model.part).run

    def third_fails(part, *rest):
        runs.append(rest)
        if len(runs) == 3:
            raise BackendError("no memory")
        return plain(part, *rest)

    monkeypatch.setattr(type(model.part), "run", third_fails)
    with pytest.raises(BackendError, match="no memory"):
        decoder.run(ids)
    assert len(runs) == 3 and decoder.length == 0
    assert np.array_equal(decoder.run(ids).logits, expected)


def test_scratch_memory_of_a_prompt_is_given_back(models, monkeypatch):
    """A step's is kept: the next takes as much."""
    key, given = "memory.enable_memory_arena_shrinkage", []
    for model in models:
        decoder, plain = model.decoder(model.no_image(1), 64), type(model.part).run
        monkeypatch.setattr(
            type(model.part),
            "run",
            lambda part, binding, options=None: (given.append(options), plain(part, binding, options))[1],  # noqa: B023
        )
        decoder.run(np.arange(3, 8)[None])
        decoder.run(np.array([[5]]))
        monkeypatch.undo()
    assert [options and options.get_run_config_entry(key) for options in given] == [None, None, "cpu:0", None]


def test_a_tower_in_16_bits_is_not_made_float32_for_one_image(random_model, monkeypatch):
    """Its weights are cast where they are read: the same features, but for the order of float32 sums."""
    bundle, seen = Bundle(random_model("tiny", tiny(), "bf16")[1]), []
    plain = OrtModel.session
    monkeypatch.setattr(
        OrtModel,
        "session",
        lambda self, path, *rest, folds=True: seen.append((path.name, folds)) or plain(self, path, *rest, folds=folds),
    )
    tiles = request(tiny(), seed=3)[0]
    kept, spared = (OrtModel(bundle, threads=1, residency=residency).vision(tiles).numpy() for residency in RESIDENCIES)
    assert [name for name, folds in seen if not folds] == ["vision.onnxruntime.onnx"] and seen[-1][1] is False
    assert np.abs(kept - spared).max() <= 1e-5 * np.abs(kept).max()


@pytest.mark.parametrize(
    ("precision", "vision", "part", "folds"),
    [
        ("int4", None, "vision", False),
        ("int4", "model", "vision", False),
        ("int4", "int8", "vision", True),
        ("int4", "model", "pages", True),
        ("int4", "model", "decoder", True),
        ("fp16", "model", "vision", True),
        ("fp32", "model", "vision", True),
    ],
)
def test_codes_are_fused_into_their_products_all_the_same(models, precision, vision, part, folds):
    """That needs their scales as constants. Float16 graphs compute so: there is nothing to be widened for good."""
    manifest = SimpleNamespace(precision=precision, options={} if vision is None else {"vision": vision})
    bundle = SimpleNamespace(manifest=manifest)
    assert models[1]._folds(bundle, part) is folds
    assert models[0]._folds(bundle, part)
