"""lmms-eval, the real package, on tasks made of the default model's scenes. It is not installed with the tests: it
brings datasets, pandas, wandb and more. `pip install lmms-eval` in an environment of its own, and these run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import tomllib

from export.default_model.evaluate import scenes_with_questions, write
from runtime.evaluate import scenes, vstar
from runtime.evaluate.__main__ import parse_arguments, run
from runtime.evaluate.vqa_accuracy import CONTRACTIONS, normalised
from tests.paths import ROOT

if find_spec("lmms_eval") is None:
    pytest.skip("lmms-eval is not installed: pip install lmms-eval", allow_module_level=True)

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
