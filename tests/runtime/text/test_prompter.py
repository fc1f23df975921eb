"""Prompts to ids, the image's place among them, and ids back to text piece by piece."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from export.checkpoint.tokenizer import read_tokenizer
from runtime import PromptError, TokenizerError
from runtime.text.prompter import IMAGE_TOKEN, Prompter
from runtime.text.stream import TextStream
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
    ids = prompter.encode("see <image> there", has_image=True, special_tokens=True)
    assert ids == [1, *pieces(prompter, "USER: see "), IMAGE_TOKEN, *pieces(prompter, " there ASSISTANT:")]
    with pytest.raises(PromptError, match="no image"):
        prompter.encode("see <image> there", has_image=False, special_tokens=True)
    with pytest.raises(PromptError, match="2 images"):
        prompter.encode("<image><image>", has_image=True, special_tokens=True)
    with pytest.raises(PromptError, match="type int"):
        prompter.encode(5, has_image=False)


TYPED = ["</s>", "<s>", "<unk>", "<pad>", "<image>", "</s> red", "red</s>square", "<s><s>", "red <image> square </s>"]


@pytest.mark.parametrize("text", TYPED)
def test_what_a_user_types_is_text(prompter, text):
    """No control token comes of it, and the template's image stays where it is; with special_tokens as officially."""
    plain = prompter.encode(text, has_image=True)
    assert [token for token in plain[1:] if token in prompter._special] == []
    assert plain.count(IMAGE_TOKEN) == 1
    assert plain[: plain.index(IMAGE_TOKEN)] == [1, *pieces(prompter, "USER: ")]
    tail = prompter._tokenizer.decode(plain[plain.index(IMAGE_TOKEN) + 1 :], skip_special_tokens=False)
    assert tail.strip() == f"{text} ASSISTANT:"
    official = prompter.encode(text.replace("<image>", ""), has_image=False, special_tokens=True)
    assert official == [1, *pieces(prompter, f"USER: {text.replace('<image>', '')} ASSISTANT:")]


@pytest.mark.parametrize("text", [*TEXTS, "a < b > c", "</", "s>", "<s", "{prompt}", "<|im_end|>"])
def test_ordinary_prompts_are_encoded_as_officially(prompter, text):
    for has_image in (True, False):
        plain = prompter.encode(text, has_image)
        assert plain == prompter.encode(text, has_image, special_tokens=True)


def saved(folder, model, *, special=("<unk>", "</s>"), added=(), normalizer=None, pre=None, decoder=None) -> Path:
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens(list(added))
    for name, part in (("normalizer", normalizer), ("pre_tokenizer", pre), ("decoder", decoder)):
        if part is not None:
            setattr(tokenizer, name, part)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


LETTERS = [*"abcdefghijklmnopqrstuvwxyz</>:", "\u2581", "USER", "ASSISTANT"]


def every_model(folder) -> dict[str, Path]:
    """Models that find a control token's text in their own vocabulary, whatever is added to it."""
    named = {text: index for index, text in enumerate(["<unk>", "</s>", *LETTERS])}
    folders = [folder / name for name in ("unigram", "words", "whole words", "merged", "normalised", "not added")]
    for each in folders:
        each.mkdir()
    spaces = pre_tokenizers.Metaspace()
    unigram = [(text, -1.0 - index) for text, index in named.items()]
    merges = [("<", "/"), ("</", "s"), ("</s", ">")]
    joined = named | {text: len(named) + index for index, text in enumerate(("</", "</s"))}
    return {
        "unigram": saved(folders[0], models.Unigram(unigram, unk_id=0), pre=spaces),
        "words": saved(folders[1], models.WordLevel(named, unk_token="<unk>"), pre=pre_tokenizers.WhitespaceSplit()),
        "whole words": saved(
            folders[2],
            models.BPE(named, [], unk_token="<unk>", ignore_merges=True),
            pre=pre_tokenizers.WhitespaceSplit(),
        ),
        "merged": saved(folders[3], models.BPE(joined, merges, unk_token="<unk>")),
        "normalised": saved(
            folders[4],
            models.BPE(named, [], unk_token="<unk>"),
            special=["<unk>", AddedToken("</s>", normalized=True, special=True)],
            normalizer=normalizers.Lowercase(),
        ),
        "not added": saved(folders[5], models.Unigram(unigram, unk_id=0), special=(), pre=spaces),
    }


def test_models_that_would_find_a_control_token_by_themselves(tmp_path):
    for name, path in every_model(tmp_path).items():
        prompter = Prompter(path, template="<image>{prompt}", bos_id=None, vocab=400, image_tokens=4, ends=(1,))
        for prompt in ("a</s>b", "</s>", "a </s> b </s>", "x<unk>"):
            official = prompter.encode(prompt, False, special_tokens=True)
            assert (1 in official) == ("</s>" in prompt), name
            assert 1 not in prompter.encode(prompt, False), name
        assert prompter.encode("abc", False) == prompter.encode("abc", False, special_tokens=True)
        assert 0 in prompter.encode("\u4e16", False)  # an unknown character is the unknown token, now as before
        if name == "normalised":  # which makes "</S>" one, too
            assert 1 in prompter.encode("</S>", False, special_tokens=True) and 1 not in prompter.encode("</S>", False)


def test_an_end_token_that_is_not_special_is_no_text_either(tmp_path):
    """Added tokens may be ordinary words of a model; those that end an answer, and "<image>", are not."""
    words = {text: index for index, text in enumerate(["<unk>", *LETTERS])}
    added = ["</s>", "<image>", "<tool>"]
    path = saved(tmp_path, models.BPE(words, [], unk_token="<unk>"), special=["<unk>"], added=added)
    end, image, tool = range(len(words), len(words) + 3)
    prompter = Prompter(path, template="<image>{prompt}", bos_id=None, vocab=400, image_tokens=4, ends=(end,))
    ids = prompter.encode("a</s>b<image>c<tool>", False)
    assert end not in ids and image not in ids and tool in ids
    assert prompter._tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "") == "a</s>b<image>c<tool>"


def test_padding_and_truncation_of_the_file_are_ignored(prompter, tmp_path):
    text = "what number is in the red square?"
    expected = prompter.encode(text, False)
    tokenizer = Tokenizer.from_str(prompter._tokenizer.to_str())
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert make(tmp_path / "tokenizer.json", vocab=400).encode(text, False) == expected


def test_a_character_without_a_token_and_without_an_unknown_token(tmp_path):
    path = saved(tmp_path, models.Unigram([(text, -1.0) for text in LETTERS], unk_id=None), special=())
    prompter = Prompter(path, template="<image>{prompt}", bos_id=None, vocab=400, image_tokens=4)
    assert len(prompter.encode("abc", False)) == 3
    for special_tokens in (True, False):
        with pytest.raises(PromptError, match="cannot encode") as caught:
            prompter.encode("a\U0001f600", False, special_tokens=special_tokens)
        assert "unknown token" in caught.value.fix
    assert len(prompter.encode("abc", False)) == 3


def test_a_panic_of_the_tokenizer_is_an_error(tmp_path):
    """Rust's panics are no Exception; here a piece of no length. Ctrl-C and an exit are not taken for one."""
    path = saved(tmp_path, models.WordLevel({"a": 0}, unk_token="a"), special=())
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"pre_tokenizer": {"type": "FixedLength", "length": 0}}))
    prompter = Prompter(path, template="<image>{prompt}", bos_id=None, vocab=400, image_tokens=4)
    with pytest.raises(PromptError, match="cannot encode"):
        prompter.encode("abc", False)
    for signal in (KeyboardInterrupt, SystemExit):
        prompter._tokenizer = Raising(signal)
        for call in (lambda: prompter.encode("abc", False), lambda: prompter.decode([1])):
            with pytest.raises(signal):
                call()
    prompter._tokenizer = Raising(BaseException)  # such as a panic
    with pytest.raises(PromptError):
        prompter.decode([1])


class Raising:
    """In place of a tokenizer."""

    def __init__(self, error: type[BaseException]) -> None:
        self._error = error

    def encode(self, *_: object, **named: object) -> None:
        raise self._error

    decode = encode


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
        ([1, [2]], False), ([2**64 - 200], True), ([2**70], False), (None, False), (b"ab", False), ("ab", False),
        ([1, True], False), ([range(10**9)], False), ({1, 2}, False), (iter([1]), False), ([10**30], False),
        ([-(10**30)], False), (np.array(5), False), (np.array([[1]]), False), (np.array([1.0]), False),
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


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "",
        "[]",
        "null",
        "not JSON",
        "\xff",
        '{"model": null}',
        '{"model": {"type": "BPE", "vocab": 5, "merges": []}}',
        '{"model": {"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.0]]}}',
        '{"model": {"type": "Unigram", "unk_id": 1e99, "vocab": []}}',
        "[" * 100_000,
    ],
)
def test_unreadable_tokenizer(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text, encoding="latin-1")
    with pytest.raises(TokenizerError):
        make(tmp_path / "tokenizer.json")


def test_a_tokenizer_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "nowhere", Path("/dev/zero")):
        with pytest.raises(TokenizerError):
            make(path)


def test_no_bos(tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert make(tmp_path / "tokenizer.json", bos=None).encode("", False) == []
