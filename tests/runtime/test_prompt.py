"""Prompts to ids, the image's place among them, and ids back to text piece by piece."""

from __future__ import annotations

import io

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from export.checkpoint.tokenizer import read_tokenizer
from runtime import PromptError, TokenizerError
from runtime.prompt import IMAGE_TOKEN, Prompter, TextStream
from tests.checkpoints import write_tokenizer

TEMPLATE = "USER: <image>\n{prompt} ASSISTANT:"
TEXTS = [
    "hello",
    " what is {this}?",
    "naïve café",
    "ok 👍🏽 done 👨\u200d👩\u200d👧",
    "  two  spaces ",
    "日本語",
    "line\nbreak",
    "",
]


@pytest.fixture(scope="module", params=["byte level", "sentencepiece"])
def prompter(request, tmp_path_factory) -> Prompter:
    """Both kinds of tokenizer in the field: byte-level BPE, and SentencePiece BPE with byte fallback (LLaMA)."""
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "byte level":
        write_tokenizer(folder, 300)
        return make(folder / "tokenizer.json")
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["what number is in the red square? a chat between a curious human"] * 20),
        model_writer=stream, vocab_size=300, model_type="bpe", byte_fallback=True, character_coverage=0.99,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(stream.getvalue())
    (folder / "tokenizer.json").write_bytes(read_tokenizer(folder, 400).content)
    return make(folder / "tokenizer.json", vocab=400)


def make(path, vocab: int = 300, bos: int | None = 1) -> Prompter:
    return Prompter(path, template=TEMPLATE, bos_id=bos, vocab=vocab, image_tokens=4)


def pieces(prompter: Prompter, text: str) -> list[int]:
    return prompter._tokenizer.encode(text, add_special_tokens=False).ids


def test_template_and_image(prompter):
    ids = prompter.encode("hello {world}", has_image=True)
    before, after = pieces(prompter, "USER: "), pieces(prompter, "\nhello {world} ASSISTANT:")
    assert ids == [1, *before, IMAGE_TOKEN, *after]  # official: the pieces are tokenised apart, BOS once
    assert prompter.encode("hello", has_image=False) == [1, *pieces(prompter, "USER: hello ASSISTANT:")]


def test_a_prompt_may_place_the_image(prompter):
    ids = prompter.encode("see <image> there", has_image=True)
    assert ids == [1, *pieces(prompter, "USER: see "), IMAGE_TOKEN, *pieces(prompter, " there ASSISTANT:")]
    with pytest.raises(PromptError, match="no image"):
        prompter.encode("see <image> there", has_image=False)
    with pytest.raises(PromptError, match="2 images"):
        prompter.encode("<image><image>", has_image=True)
    with pytest.raises(PromptError, match="type int"):
        prompter.encode(5, has_image=False)


def test_expand(prompter):
    ids, begin = prompter.expand([1, 7, IMAGE_TOKEN, 9], has_image=True)
    assert ids.tolist() == [1, 7, -1, -2, -3, -4, 9] and ids.dtype == np.int64 and begin == 2
    ids, begin = prompter.expand((3, 4), has_image=False)
    assert ids.tolist() == [3, 4] and begin == 0


@pytest.mark.parametrize(
    ("ids", "has_image"),
    [
        ([], False), ([1, IMAGE_TOKEN], False), ([1], True), ([IMAGE_TOKEN, IMAGE_TOKEN], True), ([-1], False),
        ([10_000], False), ([1.5], False), (["a"], False), ([[1, 2]], False), (5, False), ([True], False),
        ([1, [2]], False), ([2**64 - 200], True), ([2**70], False), (None, False),
    ],
)  # fmt: skip
def test_bad_ids(prompter, ids, has_image):
    with pytest.raises(PromptError):
        prompter.expand(ids, has_image)


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_are_the_whole_text(prompter, text):
    ids = pieces(prompter, text)
    stream = prompter.text_stream(())
    shown = [stream.push(token) for token in ids]
    assert not any("\ufffd" in piece for piece in shown)  # never half a character
    assert "".join(shown) + stream.finish() == prompter.decode(ids) == stream.text


def test_text_comes_as_soon_as_it_is_settled(prompter):
    stream = prompter.text_stream(())
    ids = pieces(prompter, "what number is in the red square?")
    shown = [stream.push(token) for token in ids]
    assert all(shown[1:]) and stream.finish() == ""


def test_an_unfinished_character_comes_at_the_end(prompter):
    ids = pieces(prompter, "👍")[:-1]
    stream = prompter.text_stream(())
    assert all(not stream.push(token).strip() for token in ids)
    assert "\ufffd" in stream.finish()


@pytest.mark.parametrize("text", ["👍🏽", "日本語", "a 日本 é"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_cut_answer_keeps_its_whole_characters(prompter, text, cut):
    ids = pieces(prompter, text)[:-cut]
    stream = prompter.text_stream(())
    shown = "".join([stream.push(token) for token in ids]) + stream.finish()
    assert shown == prompter.decode(ids) == stream.text
    assert text.startswith(shown.rstrip("\ufffd"))


def test_any_tokens_stream_as_they_decode(prompter):
    random = np.random.default_rng(0)
    for _ in range(500):
        ids = random.integers(0, 300, 12).tolist()
        stream = prompter.text_stream(())
        assert "".join([stream.push(token) for token in ids]) + stream.finish() == prompter.decode(ids)


def test_decode_refuses_what_is_no_token(prompter):
    with pytest.raises(PromptError, match="-200"):
        prompter.decode([5, IMAGE_TOKEN])


def test_a_lone_surrogate(prompter):
    with pytest.raises(PromptError, match="half a character at position 1"):
        prompter.encode("a\ud800", has_image=False)


def test_the_text_is_cut_before_the_stop_string_that_begins_first():
    stream = TextStream(lambda ids: "abXcdYef" if len(ids) > 1 else "ab", ("cdY", "XcdYe"))
    assert stream.push(1) + stream.push(2) + stream.finish() == "ab" == stream.text


@pytest.mark.parametrize("stop", ["red", "d sq", "the red square?"])
def test_stop_strings(prompter, stop):
    text = "what number is in the red square? yes"
    stream = prompter.text_stream((stop, "never"))
    shown, taken = "", 0
    for token in pieces(prompter, text):
        shown += stream.push(token)
        taken += 1
        assert stop not in shown
        if stream.stopped:
            break
    assert stream.stopped and taken < len(pieces(prompter, text)) + 1
    assert shown + stream.finish() == text[: text.find(stop)] == stream.text


def test_the_beginning_of_a_stop_string_that_does_not_come_is_shown(prompter):
    stream = prompter.text_stream(("square!",))
    shown = "".join(stream.push(token) for token in pieces(prompter, "the red square"))
    assert "square" not in shown
    assert shown + stream.finish() == "the red square" and not stream.stopped


def test_without_tokenizer():
    prompter = Prompter(None, template=TEMPLATE, bos_id=1, vocab=300, image_tokens=4)
    for call in (
        lambda: prompter.encode("x", True),
        lambda: prompter.decode([1]),
        lambda: prompter.text_stream(("a",)),
    ):
        with pytest.raises(PromptError, match="no tokenizer"):
            call()
    stream = prompter.text_stream(())
    assert stream.push(5) == "" and stream.finish() == "" and stream.text is None


def test_unreadable_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError):
        make(tmp_path / "tokenizer.json")


def test_no_bos(tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert make(tmp_path / "tokenizer.json", bos=None).encode("", False) == []
