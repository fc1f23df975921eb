"""lmms-eval, the real package, on tasks made of the default model's scenes. It is not installed with the tests: it
brings datasets, pandas, wandb and more. `pip install lmms-eval` in an environment of its own, and these run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import tomllib

from engines.errors import OptionError
from export.default_model.evaluate import scenes_with_questions, write
from runtime import Engine
from runtime.evaluate import scenes, vstar
from runtime.evaluate.__main__ import parse_arguments, run
from runtime.evaluate.vqa_accuracy import CONTRACTIONS, normalised
from tests.paths import ROOT
from tests.runtime.evaluate.datasets import picture
from tests.runtime.questions import GEOMETRY

if find_spec("lmms_eval") is None:
    pytest.skip("lmms-eval is not installed: pip install lmms-eval", allow_module_level=True)

from lmms_eval.api.instance import Instance

from runtime.evaluate.lmms import FlexAttention

COMMON = """
dataset_path: json
test_split: test
doc_to_visual: !function pictures.visual
doc_to_text: question
metadata:
  version: 1
"""
SCENES = """
task: flex_scenes
output_type: generate_until
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 16
  temperature: 0
  do_sample: false
  until: []
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
OPTIONS = """
task: flex_options
output_type: multiple_choice
doc_to_target: 0
doc_to_choice: options
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Scenes, and V*'s layout of the same pictures: the number, and three others."""
    folder, asked = tmp_path_factory.mktemp("data"), scenes_with_questions(4, 11)
    write(folder / "scenes", asked)
    subset = folder / "vstar" / "direct_attributes"
    subset.mkdir(parents=True)
    for index, (scene, questions) in enumerate(asked):
        question = next(each for each in questions if each.kind == "one")
        right = int(question.answer)
        options = [question.answer, *(str((right + step) % 100) for step in (7, 31, 50))]
        scene.image.save(subset / f"{index}.png")
        (subset / f"{index}.json").write_text(json.dumps({"question": question.text, "options": options}))
    return folder


@pytest.fixture(scope="module")
def scored(data, default_bundle, tmp_path_factory) -> dict[str, dict[str, object]]:
    """What lmms-eval says of the two tasks."""
    folder = tmp_path_factory.mktemp("lmms")
    tasks, site = folder / "tasks", folder / "site" / "flexattention-0.dist-info"
    tasks.mkdir()
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: flexattention\nVersion: 0\n")
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    lines = [f"{name} = {place}" for name, place in points.items()]
    (site / "entry_points.txt").write_text("\n".join(["[lmms_eval.models]", *lines, ""]))
    rows = [
        {"image": str(item.image), "question": item.prompt, "options": list(item.references)}
        for item in vstar.read(data / "vstar")
    ]
    (folder / "options.json").write_text(json.dumps(rows))
    rows = [
        {"image": str(item.image), "question": item.prompt, "answer": item.references[0]}
        for item in scenes.read(data / "scenes")
    ]
    (folder / "scenes.json").write_text(json.dumps(rows))
    for name, text in (("scenes", SCENES), ("options", OPTIONS)):
        files = f"dataset_kwargs:\n  data_files:\n    test: {folder / name}.json\n"
        (tasks / f"flex_{name}.yaml").write_text(text + COMMON + files)
    (tasks / "pictures.py").write_text(
        'import PIL.Image\n\n\ndef visual(doc):\n    return [PIL.Image.open(doc["image"]).convert("RGB")]\n'
    )
    paths = [str(ROOT), str(site.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    given = ["--model", "flexattention", "--model_args", f"bundle={default_bundle('fp16')},threads=1"]
    given += ["--batch_size", "2", "--tasks", "flex_scenes,flex_options", "--include_path", str(tasks)]
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *given, "--output_path", str(folder / "out")],
        env={**os.environ, **offline, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (found,) = (folder / "out").rglob("*_results.json")
    return json.loads(found.read_text())["results"]


def evaluated(task: str, data: Path, bundle: Path, out: Path) -> float:
    """The score of all, by our own command."""
    run(parse_arguments([task, "--data", str(data), str(bundle), "--out", str(out), "--threads", "1"]))
    return json.loads(out.with_suffix(".json").read_text())["scores"][-1]["mean"]


def test_answers_are_compared_in_the_form_of_the_published_evaluator():
    """On made-up answers of the words and marks that its rules are about."""
    path = Path(find_spec("lmms_eval").origin).parent / "tasks" / "_task_utils" / "vqa_eval_metric.py"
    spec = spec_from_file_location("vqa_eval_metric", path)
    published = module_from_spec(spec)
    spec.loader.exec_module(published)
    processor = published.EvalAIAnswerProcessor()
    words = [*CONTRACTIONS, *processor.NUMBER_MAP, *processor.ARTICLES, *processor.PUNCTUATIONS, "'", "It's", "U.S.A."]
    words += ["3.5", "1,000", ".", "." * 40, "\n", "\t", "a-b", "\u00a0", "Straße", "日本"]
    rng = random.Random(0)
    for _ in range(20_000):
        answer = "".join(rng.choice(words) + rng.choice(("", " ", "  ")) for _ in range(rng.randint(0, 6)))
        assert normalised(answer) == processor(answer), repr(answer)


def test_generated_answers(scored, data, default_bundle, tmp_path):
    ours = evaluated("scenes", data / "scenes", default_bundle("fp16"), tmp_path / "r.jsonl")
    assert scored["flex_scenes"]["exact_match,none"] == pytest.approx(ours)


def test_options_that_are_scored(scored, data, default_bundle, tmp_path):
    """With the paper's prompt, a multiple choice is the paper's: the lowest mean loss."""
    ours = evaluated("vstar", data / "vstar", default_bundle("fp16"), tmp_path / "r.jsonl")
    assert scored["flex_options"]["acc,none"] == pytest.approx(ours)


class Task:
    """A task of made-up documents, each a picture's seed (None: no picture) and a question."""

    def __init__(self, *docs: tuple[int | None, str]) -> None:
        self.docs = list(docs)

    def requests(self, kind: str, *between: object, settings: object = None) -> list[Instance]:
        """A request for each; `between`: what the kind has behind doc_to_visual."""
        return [
            Instance(
                request_type=kind, arguments=(text, settings or {}, self.visual, *between, index, "made_up", "test"),
                idx=0, metadata={"task": "made_up", "doc_id": index, "repeats": 1},
            )
            for index, (_, text) in enumerate(self.docs)
        ]  # fmt: skip

    @staticmethod
    def visual(doc):
        return [] if doc[0] is None else [picture(doc[0], (90, 60))]  # a new object each time, as from a file


@pytest.fixture
def opened(random_model, monkeypatch):
    """opened(task, batch size) -> (the model, how many images its engine has encoded)."""
    bundle = random_model("engine", GEOMETRY, tokenizer=True)[1]

    def get(task: Task, batch_size: int = 1):
        model, seen = FlexAttention(str(bundle), threads=1, batch_size=batch_size), []
        kind, vision = type(model.engine.model), type(model.engine.model).vision
        monkeypatch.setattr(kind, "vision", lambda self, tiles: (seen.append(len(tiles)), vision(self, tiles))[1])
        model.task_dict["made_up"] = {"test": task.docs}
        return model, lambda: seen.count(1)  # the low-res tile

    return get


@pytest.fixture
def asked(random_model):
    """asked(seed, question, limit) -> the greedy answer by the engine."""
    engine = Engine(random_model("engine", GEOMETRY, tokenizer=True)[1], threads=1)

    def get(seed: int | None, question: str, most: int) -> str:
        image = None if seed is None else np.asarray(picture(seed, (90, 60)))
        return str(engine.generate(image, question, max_new_tokens=most))

    return get


@pytest.mark.parametrize("batch_size", [1, 2])
def test_requests_about_one_picture_encode_it_once(opened, asked, batch_size):
    """Of one document and of several; without a picture, too. All in their order."""
    task = Task((1, "a"), (1, "<image>\nb"), (2, "c"), (None, "d"), (None, "e"), (1, "f"))
    model, encoded = opened(task, batch_size)
    found = model.generate_until(task.requests("generate_until", settings={"max_new_tokens": 5, "until": []}))
    assert encoded() == 3
    pairs = [each for each in task.requests("loglikelihood", settings=" yes") for _ in range(2)]
    scores = model.loglikelihood(pairs)
    assert encoded() == 6
    assert found == [asked(seed, text.removeprefix("<image>\n"), 5) for seed, text in task.docs]
    assert [each.text for each in scores[::2]] == [each.text for each in scores[1::2]]
    with model.engine.image(task.visual((2, ""))[0], exif=False) as view:
        assert scores[4].text[0] == pytest.approx(-view.score("c", ["yes"])[0].mean, abs=1e-5)


def test_an_answer_has_as_many_tokens_as_the_context_has_room_for(opened, asked):
    """Though the task allows more; without a number, 512."""
    task = Task((1, "x" * 100))
    model, _ = opened(task)
    for settings in ({"max_new_tokens": 4096}, {"max_new_tokens": None, "until": None}, {}):
        (found,) = model.generate_until(task.requests("generate_until", settings=settings))
        room = GEOMETRY.context + 1 - len(model.engine.prompter.encode(task.docs[0][1], True)) + 1
        assert found == asked(*task.docs[0], room - GEOMETRY.image_tokens)


def test_rounds(opened, asked):
    """Each is asked about its own picture, and the first round's is encoded once; what the task returns counts."""
    task, number = Task((1, "a"), (1, "b")), count()

    def next_round(doc, previous_output, round_idx, previous_round_info):
        assert len(previous_output) == round_idx and previous_round_info == (None if round_idx == 1 else round_idx - 1)
        next(number)
        seed = (doc[0], 2)[round_idx - 1] if round_idx < 3 else None
        over = round_idx == 3
        return Task.visual((seed, "")), f"round {round_idx}", over, [*previous_output, doc[1]], round_idx

    model, encoded = opened(task)
    settings = {"max_new_tokens": 4}
    found = model.generate_until_multi_round(task.requests("generate_until_multi_round", next_round, settings=settings))
    assert next(number) == 6 and encoded() == 3, "that of all first rounds, and two of last ones"
    rest = [asked(1, "round 1", 4), asked(2, "round 2", 4)]
    assert found == [[asked(1, first, 4), *rest, first] for first in "ab"]


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 4}, {"repetition_penalty": 1.2}, {"image_aspect_ratio": "anyres"}, {"min_new_tokens": 3},
     {"max_new_tokens": 0}, {"max_new_tokens": "many"}],
)  # fmt: skip
def test_settings_that_would_be_left_undone_are_an_error(opened, settings):
    task = Task((1, "a"))
    model, encoded = opened(task)
    (name,) = settings
    with pytest.raises(OptionError, match=f"generation_kwargs: {name}="):
        model.generate_until(task.requests("generate_until", settings=settings))
    assert encoded() == 0
    done = {"num_beams": 1, "repetition_penalty": None, "image_aspect_ratio": "pad", "max_new_tokens": 1}
    assert len(model.generate_until(task.requests("generate_until", settings=done))) == 1


def test_several_pictures_are_an_error(opened, monkeypatch):
    task = Task((1, "a"))
    model, _ = opened(task)
    for visuals, found in (([picture(1, (9, 9))] * 2, "2 visuals"), (["a.mp4"], "1 visuals: str")):
        monkeypatch.setattr(Task, "visual", staticmethod(lambda _, visuals=visuals: visuals))
        with pytest.raises(OptionError, match=found):
            model.generate_until(task.requests("generate_until"))


@pytest.mark.parametrize("given", [{"batch_size": "auto"}, {"batch_size": -1}])
def test_options_that_there_are_not(random_model, given):
    with pytest.raises(OptionError, match="--batch_size"):
        FlexAttention(str(random_model("engine", GEOMETRY, tokenizer=True)[1]), **given)
