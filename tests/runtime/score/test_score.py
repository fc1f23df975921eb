"""Scores of given answers: those of each alone, whatever is shared, and nothing of them stays behind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from engines.backend import Step
from engines.ort import OrtDecoder
from export.checkpoint.config import read_config
from export.checkpoint.folder import Checkpoint
from export.network.reference import ReferenceModel
from runtime import BackendError, ContextError, Engine, FlexError, ImageError, OptionError, PromptError
from tests.geometries import tiny
from tests.runtime import questions
from tests.runtime.questions import GEOMETRY, OPTIONS, OTHER, PHOTO, QUESTION, VOCAB
from tests.runtime.score.alone import alone, assert_alone, in_context, same

ANSWERS = [
    "a red square",
    "a red",  # begins another
    "x",  # of one token
    "a red circle",
    "a red square",  # again
    "číslo 7 \U0001f7e5\u200d",  # bytes of characters that the tokenizer does not know
    " x",  # begins with a space of its own
    "</s>",  # text, not the end
]


@pytest.fixture(scope="module")
def bundle(random_model):
    return random_model("engine", GEOMETRY, tokenizer=True)[1]


@pytest.fixture(scope="module")
def engine(bundle) -> Engine:
    return Engine(bundle, threads=1)


@pytest.fixture(scope="module")
def slotted(bundle) -> Engine:
    return Engine(bundle, threads=1, slots=3, prefill_chunk=30)


@pytest.fixture(scope="module")
def reference(random_model) -> ReferenceModel:
    checkpoint, _ = random_model("engine", GEOMETRY, tokenizer=True)
    config = read_config(checkpoint)
    return ReferenceModel(config.geometry, Checkpoint.open(checkpoint, config.tower_folder))


@pytest.fixture(scope="module", params=["one slot", "three slots"])
def either(request, engine, slotted) -> Engine:
    return engine if request.param == "one slot" else slotted


@pytest.mark.parametrize("image", [PHOTO, OTHER, None], ids=["photo", "other", "text"])
@pytest.mark.parametrize("budget", [None, 2])
def test_each_is_what_the_reference_says_of_it_alone(either, reference, image, budget):
    with either.image(image) as view:
        scores = view.score(QUESTION, ANSWERS, page_budget=budget)
    assert len(scores) == len(ANSWERS)
    for answer, score in zip(ANSWERS, scores, strict=True):
        prompt, tokens = in_context(either, QUESTION, answer, image is not None)
        assert score.token_ids == tokens, answer
        assert "".join(score.tokens).replace("Ġ", " ")[0] == " "
        assert_alone(score, alone(reference, image, prompt, tokens, GEOMETRY.pages if budget is None else budget))
    assert (image is None) == (not any(score.pages_read.any() for score in scores))


def test_any_model_serves(slotted, engine, reference, monkeypatch, bundle):
    """Nothing is ONNX Runtime's alone: with the reference in its place, with and without slots."""
    expected = engine.image(PHOTO).score(QUESTION, ANSWERS)
    with Engine(bundle) as one:
        monkeypatch.setattr(one, "model", reference)
        found = one.image(PHOTO).score(QUESTION, ANSWERS)
    with Engine(bundle, slots=2) as two:
        two._batch.__init__(reference, 2, 30)
        monkeypatch.setattr(two, "model", reference)
        beside = two.image(PHOTO).score(QUESTION, ANSWERS)
    for scores in (found, beside):
        for ours, theirs in zip(scores, expected, strict=True):
            assert ours.token_ids == theirs.token_ids and np.array_equal(ours.cells, theirs.cells)
            assert np.abs(ours.logprobs - theirs.logprobs).max() <= 2e-4


def test_an_answer_scores_as_it_was_made(either):
    answer = either.generate(PHOTO, QUESTION, **OPTIONS)
    score = either.score(PHOTO, QUESTION, continuation_ids=answer.token_ids)
    logits = answer.trace.logits.astype(np.float64)
    expected = logits[np.arange(6), answer.token_ids] - np.logaddexp.reduce(logits, 1)
    assert np.abs(score.logprobs - expected).max() <= 1e-5
    assert score.greedy and np.array_equal(score.cells, answer.trace.cells)
    assert np.array_equal(score.pages_read, answer.stats.pages_read)
    other = either.score(PHOTO, QUESTION, continuation_ids=[*answer.token_ids[:3], (answer.token_ids[3] + 1) % VOCAB])
    assert not other.greedy and np.abs(other.logprobs[:3] - score.logprobs[:3]).max() <= 1e-5


def test_probabilities_of_all_tokens_sum_to_one(either):
    """And one step, of one row, says them all."""
    before = either.steps
    scores = either.image(PHOTO).score(QUESTION, continuation_ids=[[token] for token in range(VOCAB)])
    assert sum(np.exp(score.sum) for score in scores) == pytest.approx(1, abs=1e-12)
    assert [score.token_ids for score in scores] == [[token] for token in range(VOCAB)]
    assert all(len(score.stats.decode_ms) == 1 for score in scores)
    assert either.steps - before == (0 if either.slots == 1 else 1)
    assert sum(score.greedy for score in scores) == 1


@pytest.fixture
def work(engine, monkeypatch) -> tuple[list[int], list[int]]:
    """What engines do from now on: of each run of a decoder how many tokens of the prompt it was fed, 0 of a step; and
    how many tiles each pass of vision had."""
    runs, tiles, run, vision = [], [], OrtDecoder.run, type(engine.model).vision

    def counted(self, ids, *rest, lengths=None, **more):
        step = ids.shape[1] == 1 and lengths is None
        runs.append(0 if step else ids.size if lengths is None else int(lengths.sum()))
        return run(self, ids, *rest, lengths=lengths, **more)

    monkeypatch.setattr(OrtDecoder, "run", counted)
    monkeypatch.setattr(type(engine.model), "vision", lambda self, of: (tiles.append(len(of)), vision(self, of))[1])
    return runs, tiles


def test_what_answers_share_is_fed_once(engine, work):
    """One pass of vision, one prefill, and a step for each beginning that something follows."""
    runs, tiles = work
    view = engine.image(PHOTO)
    scores = view.score(QUESTION, ANSWERS)
    assert tiles == [1, GEOMETRY.zoom**2], "low-res and hi-res"
    beginnings = {tuple(score.token_ids[:end]) for score in scores for end in range(len(score.token_ids))}
    assert runs.count(0) == len(beginnings) == len(scores[0].stats.decode_ms)
    assert sum(runs) == scores[0].stats.prompt_tokens - 1
    assert scores[0].stats.reused_tokens == 0 and scores[0].stats.vision_ms > 0
    again = view.score(QUESTION, ANSWERS[:1])[0].stats
    assert again.reused_tokens == again.prompt_tokens - 1 and again.vision_ms == again.projection_ms == 0


def test_with_slots_what_answers_share_is_fed_once(slotted, work):
    """One row prefills the prompt, from which the others copy it; then they step together."""
    runs, tiles = work
    with slotted.image(np.roll(PHOTO, 1, 0)) as view:  # which no row holds yet
        scores = view.score("what is it?", ANSWERS)
        rows = {id(score.stats): score.stats for score in scores}.values()
        assert len(rows) > 1
        assert tiles == [1, GEOMETRY.zoom**2] and sum(runs) == scores[0].stats.prompt_tokens - 1
        assert runs.count(0) == max(len(stats.decode_ms) for stats in rows)
        beginnings = {tuple(score.token_ids[:end]) for score in scores for end in range(1, len(score.token_ids))}
        assert sum(len(stats.decode_ms) for stats in rows) == len(beginnings) + len(rows)
        view.score("what is it?", ANSWERS[::-1])
        assert len(tiles) == 2 and sum(runs) == scores[0].stats.prompt_tokens - 1, "nothing is fed again"


def test_slots_score_side_by_side(slotted, engine):
    """Answers that begin with different tokens in rows of their own; those that begin alike in one."""
    apart = [[token, 7, 8, 9, 10, 11] for token in (20, 21, 22)]
    before = slotted.steps
    found = slotted.image(PHOTO).score(QUESTION, continuation_ids=apart)
    assert slotted.steps - before == 6
    assert all(map(same, found, engine.image(PHOTO).score(QUESTION, continuation_ids=apart)))
    before = slotted.steps
    slotted.image(PHOTO).score(QUESTION, continuation_ids=[[20, *each] for each in apart])
    assert slotted.steps - before == 2 + 3 * 5
    before = slotted.steps
    many = [[token, 7, 8, 9] for token in range(20, 29)]  # three in each row
    found = slotted.image(PHOTO).score(QUESTION, continuation_ids=many)
    assert slotted.steps - before == 1 + 3 * 3
    assert all(map(same, found, engine.image(PHOTO).score(QUESTION, continuation_ids=many)))


def test_scores_beside_answers_and_other_scores(slotted, engine):
    """More of both than there are rows, in threads; some of one view."""
    shared = {"photo": slotted.image(PHOTO), "other": slotted.image(OTHER), "text": slotted.image(None)}
    images = {"photo": PHOTO, "other": OTHER, "text": None}
    jobs = [(kind, name) for name in images for kind in ("ask", "score", "score", "ask")]

    def do(kind, view):
        return view.ask(QUESTION, **OPTIONS) if kind == "ask" else view.score(QUESTION, ANSWERS)

    expected = {(kind, name): do(kind, engine.image(images[name])) for kind, name in jobs}
    with ThreadPoolExecutor(5) as threads:
        found = [*threads.map(lambda job: do(job[0], shared[job[1]]), jobs)]
    for job, result in zip(jobs, found, strict=True):
        if job[0] == "ask":
            assert questions.same(result, expected[job])
        else:
            assert all(map(same, result, expected[job]))
    assert slotted._batch.active == 0


def test_nothing_of_it_stays(either):
    answer = either.generate(PHOTO, QUESTION, **OPTIONS)
    other = either.generate(PHOTO, "and where?", **OPTIONS)
    scores = either.image(PHOTO).score(QUESTION, ANSWERS)
    with either.image(PHOTO) as view:
        assert all(map(same, view.score(QUESTION, ANSWERS), scores))
        assert questions.same(view.ask(QUESTION, **OPTIONS), answer)
        assert all(map(same, view.score(QUESTION, ANSWERS), scores))
        assert questions.same(view.ask("and where?", **OPTIONS), other)
        assert all(map(same, view.score(QUESTION, ANSWERS), scores))
        running = view.stream(QUESTION, **OPTIONS)
        steps = running.steps()
        next(steps), next(steps)
        assert all(map(same, view.score(QUESTION, ANSWERS), scores))
        assert same(view.score(QUESTION, [ANSWERS[0]])[0], scores[0])
        assert questions.same(running.answer(), answer)


def test_a_conversation_is_scored_as_it_stands(random_model):
    bundle = random_model("chat", questions.TALKATIVE, tokenizer=True)[1]
    engine, twin = Engine(bundle, threads=1), Engine(bundle, threads=1)
    chat, untouched = engine.chat(PHOTO), twin.chat(PHOTO)
    for question in ("what number is it?", "and where?"):
        scores = chat.score(question, ["a chat", "between", "a chat or two"])
        fresh = Engine(bundle, threads=1).image(PHOTO)
        asked = [*chat.messages, {"role": "user", "content": question}]
        assert all(map(same, scores, fresh.score(asked, ["a chat", "between", "a chat or two"])))
        assert questions.same(chat.ask(question, **OPTIONS), untouched.ask(question, **OPTIONS))
        assert chat.messages == untouched.messages
        said = chat.messages[-1]["content"]
        assert said and chat.score(question, [said])  # with the question asked once more
    assert len(chat.messages) == 4
    reused = chat.score("is it a chat?", ["a chat"])[0].stats
    assert reused.reused_tokens > questions.TALKATIVE.image_tokens, "goes on from what the conversation holds"


def test_token_ids(either, reference):
    """Of prompt and continuation, or of the continuation alone; as lists and arrays, one or several."""
    prompt, tokens = [1, 5, -200, 7], [9, 4, 200]
    score = either.score(PHOTO, input_ids=prompt, continuation_ids=tokens)
    assert_alone(score, alone(reference, PHOTO, prompt, tokens, GEOMETRY.pages))
    array = either.score(PHOTO, input_ids=np.array(prompt), continuation_ids=np.array(tokens, np.uint16))
    assert same(array, score) and all(type(token) is int for token in array.token_ids)
    with either.image(PHOTO) as view:
        both = view.score(input_ids=prompt, continuation_ids=np.array([tokens, tokens[::-1]]))
        assert same(both[0], score) and both[1].token_ids == tokens[::-1]
    text = either.score(PHOTO, QUESTION, "a red square")
    assert same(either.score(PHOTO, QUESTION, continuation_ids=text.token_ids), text)
    assert_alone(either.score(None, input_ids=[1], continuation_ids=[5]), alone(reference, None, [1], [5], 0))
    ends = either.score(PHOTO, QUESTION, "x</s>", special_tokens=True)
    assert ends.token_ids[-1] == 2 and ends.tokens[-1] == "</s>"


def test_without_a_tokenizer(random_model):
    engine = Engine(random_model("tiny", tiny())[1])
    score = engine.score(PHOTO, input_ids=[1, -200, 7], continuation_ids=[5, 6])
    assert score.tokens is None and score.token_ids == [5, 6] and np.isfinite(score.logprobs).all()
    with pytest.raises(PromptError, match="no tokenizer"):
        engine.score(PHOTO, QUESTION, "x")


BAD = {
    "no continuation": (PromptError, "no continuation", (PHOTO, QUESTION), {}),
    "both": (PromptError, "both", (PHOTO, QUESTION, "x"), {"continuation_ids": [5]}),
    "empty text": (PromptError, "continuation 0 is empty", (PHOTO, QUESTION, ""), {}),
    "empty ids": (PromptError, "non-empty list", (PHOTO, QUESTION), {"continuation_ids": []}),
    "no text": (PromptError, "continuation 0 of type int", (PHOTO, QUESTION, 5), {}),
    "no ids": (PromptError, "non-empty list", (PHOTO, QUESTION), {"continuation_ids": "5"}),
    "id too large": (PromptError, f"token id {VOCAB}", (PHOTO, QUESTION), {"continuation_ids": [5, VOCAB]}),
    "id negative": (PromptError, "token id -1", (PHOTO, QUESTION), {"continuation_ids": [-1]}),
    "an image": (PromptError, "an image stands in a prompt", (PHOTO, QUESTION), {"continuation_ids": [5, -200]}),
    "half a character": (PromptError, "half a character", (PHOTO, QUESTION, "a\ud800"), {}),
    "an image in text": (PromptError, "an image", (PHOTO, QUESTION, "<image>"), {"special_tokens": True}),
    "text after ids": (PromptError, "tokenised as one", (PHOTO, None, "x"), {"input_ids": [1, -200]}),
    "no prompt": (PromptError, "no prompt", (PHOTO, None, "x"), {}),
    "two prompts": (PromptError, "both", (PHOTO, QUESTION), {"input_ids": [1, -200], "continuation_ids": [5]}),
    "ids without an image": (PromptError, "no -200", (PHOTO,), {"input_ids": [1, 4], "continuation_ids": [5]}),
    "image id without image": (PromptError, "no image", (None,), {"input_ids": [1, -200], "continuation_ids": [5]}),
    "missing image": (ImageError, "does not exist", ("nowhere.png", QUESTION, "x"), {}),
    "page budget": (OptionError, "page_budget=17", (PHOTO, QUESTION, "x"), {"page_budget": 17}),
    "special tokens": (OptionError, "special_tokens=3", (PHOTO, QUESTION, "x"), {"special_tokens": 3}),
    "long prompt": (ContextError, "200 tokens", (PHOTO, "word " * 300, "x"), {}),
    "long text": (ContextError, "characters", (PHOTO, QUESTION, "x" * 10**6), {}),
    "long continuation": (ContextError, "continuation of at most", (PHOTO, QUESTION, "xy" * 90), {}),
    "more ids": (ContextError, "continuation_ids", (PHOTO, QUESTION), {"continuation_ids": range(10**12)}),
    "more input_ids": (ContextError, "input_ids", (None,), {"input_ids": range(10**12), "continuation_ids": [5]}),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_requests_are_typed_errors_and_leave_the_engine_usable(bad, either):
    kind, text, given, named = BAD[bad]
    with pytest.raises(kind, match=text) as caught:
        either.score(*given, **named)
    assert isinstance(caught.value, FlexError)
    assert len(either.score(PHOTO, QUESTION, "x").token_ids) > 0


NO_LISTS = ["a red square", {"a": 1}, b"a", 5, [], np.array("a"), np.array([], str), range(0)]


@pytest.mark.parametrize("continuations", NO_LISTS, ids=repr)
def test_several_are_a_list(engine, continuations):
    view = engine.image(PHOTO)
    for given in ({"continuations": continuations}, {"continuation_ids": continuations}):
        with pytest.raises(PromptError, match=r"list of|no continuation"):
            view.score(QUESTION, **given)


@pytest.mark.parametrize("continuations", [range(2**70), np.array(["x", None]), np.array([["x", "y"]])], ids=repr)
def test_what_is_no_text_is_named(engine, continuations):
    with pytest.raises(PromptError, match=r"continuation [01] of type"):
        engine.image(PHOTO).score(QUESTION, continuations)
    with pytest.raises(PromptError, match=r"continuation 0: continuation_ids"):
        engine.image(PHOTO).score(QUESTION, continuation_ids=range(2**70))


def test_texts_in_an_array(engine):
    view = engine.image(PHOTO)
    assert all(map(same, view.score(QUESTION, np.array(ANSWERS)), view.score(QUESTION, ANSWERS)))


def test_one_bad_continuation_of_several_is_named(engine):
    view = engine.image(PHOTO)
    with pytest.raises(PromptError, match="continuation 1"):
        view.score(QUESTION, ["x", ""])
    with pytest.raises(PromptError, match=r"continuation 2: token id 999"):
        view.score(QUESTION, continuation_ids=[[5], [6], [999]])
    view.close()
    with pytest.raises(OptionError, match="closed"):
        view.score(QUESTION, ["x"])


def test_the_length_the_error_names_fits(either):
    prompt = either.prompter.encode(QUESTION, True)
    with pytest.raises(ContextError) as caught:
        either.score(PHOTO, input_ids=prompt, continuation_ids=[5] * 190)
    room = int(caught.value.fix.removeprefix("a continuation of at most ").removesuffix(" tokens"))
    score = either.score(PHOTO, input_ids=prompt, continuation_ids=[5] * room)
    assert score.stats.prompt_tokens + room - 1 == GEOMETRY.context and np.isfinite(score.logprobs).all()
    with pytest.raises(ContextError):
        either.score(PHOTO, input_ids=prompt, continuation_ids=[5] * (room + 1))


def test_a_conversation_that_is_too_long_says_how_many_turns_fit(random_model):
    engine = Engine(random_model("chat", questions.TALKATIVE, tokenizer=True)[1])
    turn = [{"role": "user", "content": "what number is it? " * 3}, {"role": "assistant", "content": "a chat"}]
    chat, view, answers = engine.chat(PHOTO, turn * 40), engine.image(PHOTO), ["a chat", "x" * 120]
    with pytest.raises(ContextError, match="41 questions") as caught:
        chat.score("and where?", answers)
    kept, question = caught.value.turns, {"role": "user", "content": "and where?"}
    assert 0 < kept < 40 and f"chat.keep({kept})" in caught.value.fix
    with pytest.raises(ContextError):
        view.score([*turn * (kept + 1), question], answers)
    assert len(view.score([*turn * kept, question], answers)) == 2
    with pytest.raises(ContextError, match="characters") as caught:
        view.score([*turn * 1000, question], answers)
    assert caught.value.turns == kept
    with pytest.raises(ContextError, match="characters") as caught:
        view.score([*turn, question], ["x" * 10**6])
    assert caught.value.turns is None


def test_logits_that_are_no_numbers(engine, slotted, monkeypatch):
    run = OrtDecoder.run

    def broken(self, ids, *rest, **more):
        step = run(self, ids, *rest, **more)
        logits = step.logits.copy()
        logits[:, 3] = np.nan
        return Step(lambda: logits, step.token, step.pages, step.page_count)

    for each in (engine, slotted):
        expected = each.score(PHOTO, QUESTION, "a red square")
        with monkeypatch.context() as patch:
            patch.setattr(OrtDecoder, "run", broken)
            with pytest.raises(BackendError, match="not finite"):
                each.image(PHOTO).score(QUESTION, ANSWERS)
        assert same(each.score(PHOTO, QUESTION, "a red square"), expected)
    assert slotted._batch.active == 0
