"""Text that comes piece by piece: the same as the whole, whatever the tokens, at the same cost for each."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models

from export.checkpoint.tokenizer import read_tokenizer
from runtime.text.prompter import Prompter
from runtime.text.stream import TextStream
from tests.checkpoints import write_tokenizer

VOCAB = 300


def made(folder, kind: str) -> Prompter:
    """Every way in which decoders look at a token's neighbours."""
    if kind == "byte level":
        write_tokenizer(folder, VOCAB)
    elif kind == "sentencepiece":
        stream = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["what number is in the red square? a chat between a curious human"] * 20),
            model_writer=stream, vocab_size=VOCAB, model_type="bpe", byte_fallback=True, character_coverage=0.99,
            normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        (folder / "tokenizer.model").write_bytes(stream.getvalue())
        (folder / "tokenizer.json").write_bytes(read_tokenizer(folder, VOCAB).content)
    else:
        words = ["<unk>", *(f"{mark}{n}" for n in range(VOCAB // 4) for mark in ("##", "", "\u2581", "w")), ".", ","]
        tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.decoder = {
            "wordpiece": decoders.WordPiece(),
            "metaspace": decoders.Metaspace(),
            "ctc": decoders.CTC(),
        }[kind]
        tokenizer.save(str(folder / "tokenizer.json"))
    options = {"template": "<image>{prompt}", "bos_id": None, "vocab": 400, "image_tokens": 4}
    return Prompter(folder / "tokenizer.json", **options)


@pytest.fixture(scope="module", params=["byte level", "sentencepiece", "wordpiece", "metaspace", "ctc"])
def prompter(request, tmp_path_factory) -> Prompter:
    return made(tmp_path_factory.mktemp("tokenizer"), request.param)


def answers(prompter: Prompter, count: int) -> list[list[int]]:
    """Random tokens; runs of bytes, of which some are characters; one token again and again; and text."""
    rng = np.random.default_rng(3)
    size = prompter._tokenizer.get_vocab_size()
    text = "naïve 日本語 👍🏽 what number  is in the red   square? \n\n" * 20
    found = [prompter._tokenizer.encode(text, add_special_tokens=False).ids]
    for _ in range(count):
        length = int(rng.integers(60, 400))
        low = int(rng.integers(0, size - 4))
        high = int(rng.integers(low + 1, size + 1))
        found.append(rng.integers(low, high, length).tolist())
        found.append(np.repeat(rng.integers(0, size, 4), 90).tolist())
    return found


def test_long_answers_are_what_their_tokens_decode_to(prompter):
    for ids in answers(prompter, 25):
        stream = prompter.text_stream(())
        shown = [stream.push(token) for token in ids]
        assert stream.text == prompter.decode(ids)
        assert "".join(shown) + stream.finish() == stream.text


def cut_by_hand(prompter: Prompter, ids: list[int], stop: tuple[str, ...]) -> tuple[str, int | None]:
    """The text before the first stop string, and after how many tokens it was there, by decoding all of them anew."""
    for count in range(1, len(ids) + 1):
        text = prompter.decode(ids[:count])
        if found := [at for each in stop if (at := text.find(each)) >= 0]:
            return text[: min(found)], count
    return prompter.decode(ids), None


def test_stop_strings_are_found_as_by_searching_everything(prompter):
    rng = np.random.default_rng(4)
    stopped = 0
    for ids in answers(prompter, 8):
        ids = ids[:150]
        text = prompter.decode(ids)
        for _ in range(4):
            begins = rng.integers(0, max(len(text) - 60, 1), 3)
            drawn = [text[at : at + int(rng.integers(1, 60))] for at in begins]
            stop = (*(each for each in drawn if each and "\ufffd" not in each), "never there")
            expected, count = cut_by_hand(prompter, ids, stop)
            stream, shown, taken = prompter.text_stream(stop), "", 0
            for token in ids:
                shown, taken = shown + stream.push(token), taken + 1
                assert expected.startswith(shown)  # nothing of a stop string is ever shown
                if stream.stopped:
                    break
            stopped += stream.stopped
            assert (taken if stream.stopped else None) == count
            assert shown + stream.finish() == expected == stream.text
    assert stopped > 10


@pytest.mark.parametrize("kind", ["text", "bytes that are no character", "one stop string all the time"])
def test_a_token_costs_the_same_however_long_the_answer(kind, tmp_path):
    """How many tokens are decoded for each that comes; and the time, in which searching everything would show."""
    prompter = made(tmp_path, "sentencepiece")
    texts = {"text": "what number is in the red square? ", "one stop string all the time": "aaaaaaaa"}
    ids = prompter._tokenizer.encode(texts.get(kind, "x"), add_special_tokens=False).ids
    ids = (ids if kind in texts else [prompter._tokenizer.token_to_id("<0xFF>")]) * 10_000
    decoded = []

    def decode(window: list[int]) -> str:
        decoded.append(len(window))
        return prompter.decode(window)

    stream = TextStream(decode, ("a" * 1024 + "b", "never there"))
    begun = time.perf_counter()
    for token in ids[:10_000]:
        stream.push(token)
    assert max(decoded) <= 80 and sum(decoded) <= 80 * 10_000
    assert time.perf_counter() - begun < 60  # 1 s here; a quadratic one takes minutes
    assert stream.text == prompter.decode(ids[:10_000])


def test_an_answer_that_is_held_back_whole_comes_at_the_end(tmp_path):
    prompter = made(tmp_path, "sentencepiece")
    text = "a" * 900
    ids = prompter._tokenizer.encode(text, add_special_tokens=False).ids
    stream = prompter.text_stream(("a" * 1024,))
    assert [stream.push(token) for token in ids] == [""] * len(ids)
    assert stream.finish() == text == stream.text
