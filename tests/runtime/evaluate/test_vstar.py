"""V* against its definition in float64: options in their prompts, in the official way of computing."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from engines.bundle.manifest import PROMPT_TEMPLATE
from engines.progress import progress
from runtime import Engine
from runtime.evaluate import vstar
from runtime.evaluate.results import Results, Run
from runtime.evaluate.run import evaluate
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


def official_loss(checkpoint, reference, image: PIL.Image.Image, question: str, option: str) -> tuple[float, int]:
    """(mean cross entropy of an option's tokens, how many there are), by the official script's own prompt."""
    g = TALKATIVE
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    prompt = PROMPT_TEMPLATE.replace("{prompt}", f"{question}\n{INSTRUCTION}")
    before, after = prompt.split("<image>")
    first, rest, whole = (
        tokenizer.encode(text, add_special_tokens=False).ids for text in (before, after, f"{after} {option}")
    )
    assert whole[: len(rest)] == rest, "what the option is put behind stays as it was"
    features = reference.vision(preprocess(image, g))
    side, zoom = g.grid, g.zoom
    hires = features[1:].view(zoom, zoom, side, side, -1).transpose(1, 2).reshape(g.hires_side**2, -1)
    begin = 1 + len(first)
    weights = load_file(checkpoint / "model.safetensors")
    official = Official(weights, g, features[0], hires, begin, image.size)
    ids = [BOS, *first, *(-1 - np.arange(g.image_tokens)).tolist(), *whole]
    option_ids = whole[len(rest) :]
    official.run(ids[: -len(option_ids) - 1])
    losses = []
    for fed, target in zip(ids[-len(option_ids) - 1 : -1], option_ids, strict=True):
        logits, _ = official.run([fed])
        losses.append(-float(torch.log_softmax(logits, -1)[target]))
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize("slots", [1, 3])
def test_losses_are_those_of_the_official_script(model, tmp_path, slots):
    checkpoint, bundle = model
    items = vstar.read(write_vstar(tmp_path / "vstar_bench"))
    with Engine(bundle, slots=slots) as engine, Results(tmp_path / "r.jsonl", Run.of(vstar.TASK, items, engine)) as out:
        with progress("", quiet=True) as report:
            evaluate(vstar.TASK, items, engine, out, report)
        records = out.records
    reference, lengths, pages = load(checkpoint), set(), 0.0
    for item, record in zip(items, records, strict=True):
        with PIL.Image.open(item.image) as stored:
            image = stored.convert("RGB")  # as the official script: its EXIF says to turn it
        expected = [official_loss(checkpoint, reference, image, item.question, option) for option in item.references]
        losses = [loss for loss, _ in expected]
        assert record.details["losses"] == pytest.approx(losses, abs=LOGITS)
        best = losses.index(min(losses))
        assert (record.answer, record.score) == (item.references[best], float(best == 0))
        lengths |= {length for _, length in expected}
        pages += record.pages_read
    assert 1 in lengths and max(lengths) > 3 and pages > 0
    assert {record.score for record in records} == {0.0, 1.0}, "some are right, some are not"
    scores = {
        subset: [r.score for r in records if r.subset == subset]
        for subset in ("direct_attributes", "relative_position")
    }
    files = vstar.answer_files(records, PROMPT_TEMPLATE)
    for subset, found in scores.items():
        name, right, count, share = files[f"vbench_{subset}.txt"].split()
        assert (name, int(right), int(count)) == (subset, sum(found), len(found))
        assert float(share) == pytest.approx(np.mean(found))


def test_of_equal_options_the_first_counts(model, tmp_path):
    """Official: np.argmin."""
    folder = write_vstar(tmp_path)
    path = folder / "direct_attributes" / "sa_1.json"
    path.write_text('{"question": "which?", "options": ["red", "red"]}')
    item = vstar.read(folder)[0]
    with Engine(model[1]) as engine, engine.image(item.image, exif=False) as view:
        record = vstar.ask(view, item, None)
    first, second = record.details["losses"]
    assert first == second and record.score == 1.0


def test_where_it_looked(model, tmp_path):
    """The cells and the tokens of the option that it finds likeliest."""
    item = vstar.read(write_vstar(tmp_path))[0]
    with Engine(model[1]) as engine, engine.image(item.image, exif=False) as view:
        record = vstar.ask(view, item, None)
        cells, captions = vstar.look(engine, view, item, None)
        assert "".join(captions).strip() == record.answer
        assert cells.shape == (len(captions), len(TALKATIVE.selecting_layers), *2 * (TALKATIVE.cells,))
        assert vstar.ask(view, item, 0).pages_read == 0 < record.pages_read


def test_the_paper_counts_two_subsets():
    assert vstar.TASK.overall == ("direct_attributes", "relative_position")
    assert {row[0] for row in VSTAR} == set(vstar.TASK.overall)
