"""Vision and page projection in memory while an image is encoded alone: the same answers, and what it costs."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines.errors import BackendError
from engines.ort import OrtModel
from engines.residency import SHARED
from runtime import Engine
from tests.paths import ROOT
from tests.runtime.questions import GEOMETRY, OPTIONS, OTHER, PHOTO, QUESTION, same

IMAGES = {"photo": PHOTO, "other": OTHER, "none": None}


@pytest.fixture(scope="module")
def bundle(random_model) -> Path:
    return random_model("engine", GEOMETRY, tokenizer=True)[1]


@pytest.fixture(scope="module")
def expected(bundle):
    with Engine(bundle, threads=1) as engine:
        return {name: engine.generate(image, QUESTION, **OPTIONS) for name, image in IMAGES.items()}


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Parts whose session was made, in order."""
    names, plain = [], OrtModel.part_session
    monkeypatch.setattr(
        OrtModel, "part_session", lambda self, bundle, part: names.append(part) or plain(self, bundle, part)
    )
    return names


def test_each_image_opens_them_once(bundle, expected, opened):
    engine = Engine(bundle, threads=1, residency=SHARED)
    assert opened == ["decoder"]
    for name in ("photo", "other", "none", "photo"):
        opened.clear()
        with engine.image(IMAGES[name]) as view:
            first, again = view.ask(QUESTION, **OPTIONS), view.ask(QUESTION, **OPTIONS)
        assert same(first, expected[name]) and same(again, expected[name])
        assert opened == ([] if name == "none" else ["vision", "pages"])
        assert (first.stats.opened_ms > 0.0) == ("opening" in str(first.stats)) == (name != "none")
        assert again.stats.opened_ms == 0.0
    assert expected["photo"].stats.opened_ms == 0.0 and "opening" not in str(expected["photo"].stats)


def test_they_are_closed_before_the_first_step(bundle, monkeypatch):
    engine = Engine(bundle, threads=1, residency=SHARED)
    seen, run = [], type(engine.model.part).run
    monkeypatch.setattr(
        type(engine.model.part), "run", lambda part, *args: seen.append(list(engine.model._images)) or run(part, *args)
    )
    engine.generate(PHOTO, QUESTION, **OPTIONS)
    assert len(seen) > OPTIONS["max_new_tokens"] and not any(seen)


def test_asked_by_threads_and_in_slots(bundle, expected):
    for slots in (1, 3):
        engine = Engine(bundle, threads=1, slots=slots, residency=SHARED)
        names = [*IMAGES, *IMAGES] * 2
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda name: engine.generate(IMAGES[name], QUESTION, **OPTIONS), names))  # noqa: B023
        for name, answer in zip(names, found, strict=True):
            assert answer.token_ids == expected[name].token_ids
            assert np.array_equal(answer.trace.cells, expected[name].trace.cells)
        assert not list(engine.model._images)


@pytest.mark.parametrize("slots", [1, 2])
def test_many_are_encoded_in_their_turn(bundle, expected, slots, monkeypatch):
    """Encoded ahead, vision would lie beside what decodes, in another thread."""
    engine = Engine(bundle, threads=1, slots=slots, residency=SHARED)
    submitted, submit = [], ThreadPoolExecutor.submit
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda *args: submitted.append(args) or submit(*args))
    names = ["photo", "photo", "other", "none", "photo"]
    answers = engine.generate_many([(IMAGES[name], QUESTION) for name in names], max_new_tokens=6, stop_at_eos=False)
    assert [answer.token_ids for answer in answers] == [expected[name].token_ids for name in names]
    assert not submitted
    assert len(Engine(bundle, threads=1).generate_many([(PHOTO, QUESTION)], max_new_tokens=1)) == 1 and submitted


def test_an_image_that_fails_leaves_the_engine_usable(bundle, expected, monkeypatch):
    engine = Engine(bundle, threads=1, residency=SHARED)
    plain = OrtModel.part_session

    def broken(self, bundle, part):
        raise BackendError("no memory for it")

    monkeypatch.setattr(OrtModel, "part_session", broken)
    with pytest.raises(BackendError, match="no memory for it"):
        engine.generate(PHOTO, QUESTION, **OPTIONS)
    monkeypatch.setattr(OrtModel, "part_session", plain)
    assert same(engine.generate(PHOTO, QUESTION, **OPTIONS), expected["photo"])


def test_on_the_command_line(bundle, expected, tmp_path):
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    ask = "-m", "runtime", bundle, tmp_path / "photo.png", QUESTION, "--max-new-tokens", "6", "--threads", "1"
    results = [
        subprocess.run([sys.executable, *ask, "--residency", residency], capture_output=True, cwd=ROOT)
        for residency in ("all", "shared", "none")
    ]
    assert [result.returncode for result in results] == [0, 0, 2]
    assert results[0].stdout == results[1].stdout
    assert b"opening" in results[1].stderr and b"opening" not in results[0].stderr
    assert b"invalid choice: 'none'" in results[2].stderr
