"""Which tokens a continuation is: those it has behind its prompt, tokenised as one text with it."""

from __future__ import annotations

import string

import pytest
from tokenizers import Tokenizer, models

from export.checkpoint.config import read_config
from export.checkpoint.folder import Checkpoint
from export.network.reference import ReferenceModel
from runtime import Engine, Options, PromptError
from runtime.score.continuations import ContinuationReader, Continuations
from runtime.text.prompter import Prompter
from tests.runtime.questions import GEOMETRY, PHOTO
from tests.runtime.score.alone import alone, assert_alone

MERGED = ":x"  # the one token of two characters: the prompt's last, and what an answer may begin with


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A file whose tokens are characters, and MERGED."""
    characters = ["<unk>", "<s>", "</s>", *string.printable]
    vocab = {text: index for index, text in enumerate([*characters, MERGED])}
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    Tokenizer(models.BPE(vocab=vocab, merges=[(":", "x")], unk_token="<unk>")).save(str(path))
    return path, vocab


def prompter(path, template: str = "U <image>{prompt}:", turn: str | None = None) -> Prompter:
    g = GEOMETRY
    options = {"bos_id": 1, "vocab": g.vocab, "image_tokens": g.image_tokens, "ends": (2,)}
    return Prompter(path, template=template, turn=turn, **options)


@pytest.fixture(scope="module")
def bundle(random_model):
    return random_model("engine", GEOMETRY, tokenizer=True)


def read(bundle, prompter: Prompter, answers: list[str], question: str = "q"):
    reader = ContinuationReader(Options(), True, prompter, Engine(bundle[1]).manifest)
    return reader.read(question, None, Continuations(answers, None))


def test_a_token_across_the_seam_is_the_answers(bundle, tokenizer):
    """Not cut in two, nor given to the prompt: the answer that has it has a prompt that ends before it."""
    path, vocab = tokenizer
    apart, across = read(bundle, prompter(path), ["y", "xy", "yx", "x"])
    text = prompter(path)
    assert {place: text.pieces(ids.tolist()) for place, ids in apart.continuations.items()} == {0: ["y"], 2: ["y", "x"]}
    assert {place: text.pieces(ids.tolist()) for place, ids in across.continuations.items()} == {
        1: [MERGED, "y"],
        3: [MERGED],
    }
    assert apart.request.ids[-2:].tolist() == [vocab["q"], vocab[":"]] and across.request.ids[-1] == vocab["q"]
    assert apart.request.room == len(apart.request.ids) + 1 == across.request.room + 1


@pytest.mark.parametrize("slots", [1, 3])
def test_answers_of_two_prompts_are_scored_each_behind_its_own(bundle, tokenizer, monkeypatch, slots):
    checkpoint, folder = bundle
    config = read_config(checkpoint)
    reference = ReferenceModel(config.geometry, Checkpoint.open(checkpoint, config.tower_folder))
    path, vocab = tokenizer
    answers, (head, colon) = ["y", "xy", "yx", "x"], ([1, vocab["U"], vocab[" "], -200, vocab["q"]], [vocab[":"]])
    y, x, merged = vocab["y"], vocab["x"], vocab[MERGED]
    expected = [(head + colon, [y]), (head, [merged, y]), (head + colon, [y, x]), (head, [merged])]
    with Engine(folder, slots=slots) as engine:
        monkeypatch.setattr(engine, "prompter", prompter(path))
        view = engine.image(PHOTO)
        for score, (prompt, tokens) in zip(view.score("q", answers), expected, strict=True):
            assert score.token_ids == tokens
            assert_alone(score, alone(reference, PHOTO, prompt, tokens, GEOMETRY.pages))
        assert view.score("q", answers)[2].stats.vision_ms == 0


def test_an_answer_stands_where_a_conversation_has_one(bundle, tokenizer):
    """Behind what the bundle's turns have between a question and its answer; without turns, behind the prompt."""
    path, _ = tokenizer
    for turn, between in (
        (" {answer}</s>{prompt}:", " "),
        ("{answer}\n{prompt}:", ""),
        (" A: {answer}\n{prompt}", " A: "),
    ):
        text = prompter(path, turn=turn)
        (scoring,) = read(bundle, text, ["yes", "y"])
        assert "".join(text.pieces(scoring.continuations[0].tolist())) == between + "yes"
        assert len(scoring.request.ids) == 3 + GEOMETRY.image_tokens + 2
    text = prompter(path, template="U <image>{prompt}: ")
    (scoring,) = read(bundle, text, ["yes"])
    assert "".join(text.pieces(scoring.continuations[0].tolist())) == "yes"


def test_an_answer_is_text(bundle, tokenizer):
    path, _ = tokenizer
    text = prompter(path)
    (scoring,) = read(bundle, text, ["y</s>", "y<image>"])
    assert "".join(text.pieces(scoring.continuations[0].tolist())) == "y</s>" and 2 not in scoring.continuations[0]
    assert "".join(text.pieces(scoring.continuations[1].tolist())) == "y<image>"
    special = ContinuationReader(Options(special_tokens=True), True, text, Engine(bundle[1]).manifest)
    for answer in ("<image>", "a<image>b"):
        with pytest.raises(PromptError, match="an image"):
            special.read("q", None, Continuations([answer], None))


def test_a_continuation_that_is_no_token(bundle, tmp_path):
    """Whose characters the tokenizer drops."""
    from tokenizers import normalizers

    made = Tokenizer(models.BPE(vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "q": 3, ":": 4}, merges=[], unk_token="<unk>"))
    made.normalizer = normalizers.Replace("\u200b", "")
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(PromptError, match=r"continuation 1, .* has no token"):
        read(bundle, prompter(tmp_path / "tokenizer.json", template="<image>{prompt}:"), ["q", "\u200b\u200b"])
