"""V* against its definition in float64: options in their prompts, in the official way of computing."""

from __future__ import annotations

from copy import copy
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from engines.bundle.manifest import PROMPT_TEMPLATE
from runtime import Engine
from runtime.evaluate import vstar
from runtime.evaluate.asking import evaluate
from runtime.evaluate.results import Results, Run
from runtime.preprocess import preprocess
from tests.parity.official import Official
from tests.parity.requests import LOGITS, load
from tests.runtime.evaluate.datasets import VSTAR, write_vstar
from tests.runtime.questions import TALKATIVE

BOS = 1
INSTRUCTION = "Answer the question using a single word or phrase."


@pytest.fixture(scope="module")
def model(random_model):
    """(checkpoint, bundle) with the official template."""
    return random_model("serve", TALKATIVE, tokenizer=True, template=PROMPT_TEMPLATE)


@pytest.fixture(scope="module")
def official(model, tmp_path_factory) -> tuple[Path, dict[str, list[tuple[float, int]]]]:
    """(data folder, for each question the mean cross entropy of each option's tokens, and how many they are), by the
    official script's own prompt."""
    g, folder = TALKATIVE, write_vstar(tmp_path_factory.mktemp("vstar_bench"))
    tokenizer = Tokenizer.from_file(str(model[0] / "tokenizer.json"))
    reference, weights = load(model[0]), load_file(model[0] / "model.safetensors")

    def tokens(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    losses = {}
    for subset, name, (suffix, *_), _, question, options in VSTAR:
        with PIL.Image.open(folder / subset / f"{name}.{suffix}") as stored:
            image = stored.convert("RGB")  # as the official script: its EXIF says to turn it
        features = reference.vision(preprocess(image, g))
        side, zoom = g.grid, g.zoom
        hires = features[1:].view(zoom, zoom, side, side, -1).transpose(1, 2).reshape(g.hires_side**2, -1)
        before, after = PROMPT_TEMPLATE.replace("{prompt}", f"{question}\n{INSTRUCTION}").split("<image>")
        first, rest = [BOS, *tokens(before)], tokens(after)
        prompt = Official(weights, g, features[0], hires, len(first), image.size)
        prompt.run([*first, *(-1 - np.arange(g.image_tokens)).tolist(), *rest[:-1]])
        of_question = []
        for option in options:
            whole = tokens(f"{after} {option}")
            assert whole[: len(rest)] == rest, "what the option is put behind stays as it was"
            run, found = copy(prompt), []
            run.cache = list(prompt.cache)
            for fed, target in zip([rest[-1], *whole[len(rest) : -1]], whole[len(rest) :], strict=True):
                found.append(-float(torch.log_softmax(run.run([fed])[0], -1)[target]))
            of_question.append((sum(found) / len(found), len(found)))
        losses[f"{subset}/{name}"] = of_question
    return folder, losses


@pytest.mark.parametrize("slots", [1, 3])
def test_losses_are_those_of_the_official_script(model, official, tmp_path, slots):
    folder, expected = official
    items = vstar.read(folder)
    with (
        Engine(model[1], slots=slots) as engine,
        Results(tmp_path / "r.jsonl", Run.of(vstar.TASK, items, engine)) as results,
    ):
        evaluate(vstar.TASK, items, engine, results, lambda part: None)
        records = results.records
    for item, record in zip(items, records, strict=True):
        losses = [loss for loss, _ in expected[item.key]]
        assert record.details["losses"] == pytest.approx(losses, abs=LOGITS)
        best = losses.index(min(losses))
        assert (record.answer, record.score) == (item.references[best], float(best == 0))
    lengths = {length for of_question in expected.values() for _, length in of_question}
    assert 1 in lengths and max(lengths) > 3 and all(record.pages_read > 0 for record in records)
    assert {record.score for record in records} == {0.0, 1.0}, "some are right, some are not"
    files = vstar.answer_files(records, PROMPT_TEMPLATE)
    for subset in vstar.PAPER:
        scores = [record.score for record in records if record.subset == subset]
        name, right, count, share = files[f"vbench_{subset}.txt"].split()
        assert (name, int(right), int(count)) == (subset, sum(scores), len(scores))
        assert float(share) == pytest.approx(np.mean(scores))


def test_of_equal_options_the_first_counts(model, tmp_path):
    """Official: np.argmin."""
    folder = write_vstar(tmp_path)
    path = folder / "direct_attributes" / "sa_1.json"
    path.write_text('{"question": "which?", "options": ["red", "red"]}')
    item = vstar.read(folder)[0]
    with Engine(model[1]) as engine, engine.image(item.image, exif=False) as view:
        record = vstar.ask(engine, view, item, None)
    first, second = record.details["losses"]
    assert first == second and record.score == 1.0


def test_where_it_looked(model, tmp_path):
    """The cells and the tokens of the option that it finds likeliest."""
    item = vstar.read(write_vstar(tmp_path))[0]
    with Engine(model[1]) as engine, engine.image(item.image, exif=False) as view:
        record = vstar.ask(engine, view, item, None)
        cells, captions = vstar.look(engine, view, item, None)
        assert "".join(captions).strip() == record.answer
        assert cells.shape == (len(captions), len(TALKATIVE.selecting_layers), *2 * (TALKATIVE.cells,))
        assert vstar.ask(engine, view, item, 0).pages_read == 0 < record.pages_read


def test_the_paper_counts_two_subsets():
    assert vstar.TASK.overall == ("direct_attributes", "relative_position")
    assert {row[0] for row in VSTAR} == set(vstar.TASK.overall)
