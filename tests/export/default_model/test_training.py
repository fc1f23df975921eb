"""Training computes what inference computes, and a short run of all of it makes a checkpoint that answers."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engines.backend import Image
from engines.bundle.pages import margins
from export.build import BuildOptions, build
from export.checkpoint.config import read_config
from export.checkpoint.folder import Checkpoint
from export.default_model import train
from export.default_model.learning.packing import pack, prefix_ids
from export.default_model.learning.pool import lowres, margins_of, normalised, padded
from export.default_model.learning.student import Student
from export.default_model.learning.student import run as student_pass
from export.default_model.learning.train_vision import Tower, tiles_of
from export.default_model.model import GEOMETRY, official_names, write_checkpoint
from export.default_model.questions import KINDS, build_tokenizer
from export.default_model.scenes import make_scene
from export.default_model.train import SMOKE, run
from export.network.reference import ReferenceModel
from runtime import Engine
from runtime.preprocess import preprocess

STEP = 1.5e-3  # every trained tensor has a number that even the shortest training moves farther
QUESTION = "what number is in the red square?"


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """A tower and a student with random weights that float16 holds exactly, and their checkpoint."""
    torch.manual_seed(0)
    tower, student = Tower(), Student()
    with torch.no_grad():
        for module in (tower, student):
            for parameter in module.parameters():
                parameter.copy_(parameter.half().float())
    folder = tmp_path_factory.mktemp("default") / "checkpoint"
    write_checkpoint(folder, official_names(tower.state_dict(), student.state_dict()))
    return tower.eval(), student.eval(), folder


def test_one_training_pass_equals_inference_step_by_step(random_model):
    """Logits of every answer token of packed questions, pages chosen by the model's own maps."""
    tower, student, folder = random_model
    config = read_config(folder)
    reference = ReferenceModel(config.geometry, Checkpoint.open(folder, config.tower_folder))
    g = config.geometry
    assert g == GEOMETRY
    scenes = [make_scene(np.random.default_rng(seed)) for seed in (3, 4)]
    tokenizer = build_tokenizer()
    batch = pack(np.random.default_rng(0), [(scene.things, scene.image.size) for scene in scenes], 3, tokenizer)
    pixels = torch.from_numpy(np.stack([padded(scene.image) for scene in scenes]))
    prefix = torch.tensor(prefix_ids(tokenizer))
    with torch.no_grad():
        low = tower.features(normalised(lowres(pixels)))
        high = tower.features(normalised(tiles_of(pixels))).unflatten(0, (2, 3, 3)).unflatten(3, (12, 12))
        high = high.transpose(2, 3).reshape(2, 1296, -1)
        sides = margins_of([scene.image.size for scene in scenes])
        modes = torch.ones(batch.where.shape, dtype=torch.int64)  # own selection
        logits, _, pages = student_pass(student, low, high, sides, batch, prefix, modes, g.threshold)
    assert 0 < float(pages) < g.pages
    position = np.array([len(prefix)])
    for index, scene in enumerate(scenes):
        tiles = preprocess(scene.image, g)
        assert sides[index].tolist() == list(margins(*scene.image.size, g.grid))
        near, far = reference.vision(tiles[:1]), reference.vision(tiles[1:])
        image = Image(near, reference.project(far, position), position, sides[index : index + 1].numpy())
        for question in range(3):
            where = batch.where[index, question].tolist()
            count = int((batch.answer[index, question] >= 0).sum())
            ids = batch.ids[index, question].tolist()
            prompt = [*prefix.tolist(), *(-1 - np.arange(g.image_tokens)), *ids[: where[0]]]
            decoder = reference.decoder(image, 256)
            decoder.run(np.array([prompt]))
            for step in range(count):
                expected = decoder.run(np.array([[ids[where[step]]]]), g.pages).logits[0]
                found = logits[index, question, step].numpy()
                assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def moved(found: dict[str, torch.Tensor], begin: dict[str, torch.Tensor]) -> dict[str, float]:
    """Tensor -> the farthest that one of its numbers is from where it was."""
    return {name: float((found[name].float() - begin[name].float()).abs().max()) for name in found}


def test_smoke_run(tmp_path, monkeypatch):
    """Every stage trains what it should and nothing else, says what it found, and writes what the runtime answers
    with."""
    model, baseline = tmp_path / "model", tmp_path / "baseline"
    monkeypatch.setattr(train, "AT_ONCE", SMOKE.decoder_scenes // 2 + 1)  # scenes in two parts
    run(SMOKE, model, baseline)

    log = json.loads((model / "training.json").read_text())
    assert log["recipe"] == asdict(SMOKE)
    stages = ("vision", "decoder", "lowres_only")
    assert log["seconds"] >= sum(log[f"{stage}_seconds"] for stage in stages) - 2 > 0  # each is rounded
    assert 0 < log["decoder"].pop("pages") <= GEOMETRY.pages
    assert log["machine"] == log["vision_machine"] and log["torch"] == torch.__version__
    assert set(log["decoder"]) == set(log["lowres_only"]) <= set(KINDS) and len(log["decoder"]) >= 8  # of few questions
    assert all(0 <= share <= 1 for stage in stages for share in log[stage].values())

    torch.manual_seed(SMOKE.seed)
    tower = Tower().state_dict()
    torch.manual_seed(SMOKE.seed)
    begin = official_names(tower, Student().state_dict())
    stored = [load_file(folder / "model.safetensors") for folder in (model, baseline)]
    for tensors, sees_pages in zip(stored, (True, False), strict=True):
        assert tensors.keys() == begin.keys() and all(tensor.isfinite().all() for tensor in tensors.values())
        for name, distance in moved(tensors, begin).items():
            if name.endswith("k_proj.bias"):
                continue  # added to all keys alike, it changes no softmax: there is nothing to learn
            trained = sees_pages or "_proj_hd" not in name  # the baseline reads no page
            assert (distance > STEP) == trained, (name, distance)
    for name, distance in moved(*stored).items():  # one tower, two decoders
        assert (distance == 0) == ("vision_tower" in name), (name, distance)

    for folder in (model, baseline):
        assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) <= 6_000_000
        engine = Engine(build(BuildOptions(folder, tmp_path / f"{folder.name}-bundle", precision="fp32")).path)
        scene = make_scene(np.random.default_rng(0), "test")
        ids = engine.prompter.encode(QUESTION, True)
        answer = engine.generate(scene.image, QUESTION, max_new_tokens=5, stop_at_eos=False, trace=True)
        config = read_config(folder)
        reference = ReferenceModel(config.geometry, Checkpoint.open(folder, config.tower_folder))
        row, begin = engine.prompter.expand(ids, True)
        tiles, position = preprocess(scene.image, GEOMETRY), np.array([begin])
        near, far = reference.vision(tiles[:1]), reference.vision(tiles[1:])
        sides = np.array([margins(*scene.image.size, GEOMETRY.grid)], np.int64)
        decoder = reference.decoder(Image(near, reference.project(far, position), position, sides), len(row) + 5)
        decoder.run(row[None, :-1])
        for token, logits in zip([int(row[-1]), *answer.token_ids], answer.trace.logits, strict=False):
            expected = decoder.run(np.array([[token]]), GEOMETRY.pages).logits[0]
            assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
        assert len(answer.token_ids) == 5 and answer.text == engine.prompter.decode(answer.token_ids)
