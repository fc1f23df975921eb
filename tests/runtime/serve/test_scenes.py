"""New scenes come from the default model's generator, in a process that is replaced when it dies and ends with us."""

from __future__ import annotations

import base64
import io
import os
import signal
import threading

import numpy as np
import PIL.Image
import pytest

from engines.errors import BackendError
from export.default_model.scenes import make_scene
from runtime.serve.scenes import GENERATOR, Scenes
from tests.paths import ROOT


def pixels(scene: dict) -> np.ndarray:
    head, _, data = scene["image"].partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data))))


def test_a_scene_is_its_seeds_and_a_generator_that_died_is_replaced():
    scenes = Scenes()
    try:
        assert Scenes.available() and (ROOT / f"{GENERATOR.replace('.', '/')}.py").is_file()
        first = scenes.draw(5)
        expected = make_scene(np.random.default_rng(5), "test")
        assert first["seed"] == 5 and np.array_equal(pixels(first), np.asarray(expected.image))
        numbers = {thing.name: thing.number for thing in expected.things}
        kinds = first["questions"]
        assert 8 <= len(kinds) <= 10 and all(each["question"] and each["answer"] for each in kinds)
        assert kinds[0]["answer"].split()[-1] in numbers.values()  # of a kind that asks for a number
        process = scenes._process
        assert process is not None
        assert scenes.draw(6) != first and scenes._process is process  # long-lived
        os.kill(process.pid, signal.SIGKILL)
        assert scenes.draw(5) == first and scenes._process is not process
        last = scenes._process
    finally:
        scenes.close()
    assert last.poll() is not None
    with pytest.raises(BackendError, match="closed"):
        scenes.draw(5)
    scenes.close()


def test_a_generator_that_cannot_start_is_an_error():
    scenes = Scenes("export.default_model.nothing")
    with pytest.raises(BackendError, match="No module named") as error:
        scenes.draw(0)
    assert "export.default_model.nothing" in str(error.value.fix)
    assert scenes._process is None  # the next call starts another
    scenes.close()


def test_a_generator_that_hangs_is_ended():
    scenes = Scenes("json.tool", seconds=0.5)  # reads to the end, and writes nothing before
    try:
        with pytest.raises(BackendError, match="exit status -9"):
            scenes.draw(0)
    finally:
        scenes.close()


def test_closing_ends_one_that_draws():
    scenes, errors = Scenes("json.tool", seconds=30), []

    def ask() -> None:
        try:
            scenes.draw(0)
        except BackendError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while scenes._process is None:
        pass
    process = scenes._process
    scenes.close()
    thread.join(10)
    assert not thread.is_alive() and errors and process.poll() is not None
