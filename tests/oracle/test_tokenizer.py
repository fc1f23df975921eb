"""Our conversion of a real SentencePiece model against SentencePiece and against transformers' tokenizers.

The model is the one mistral-common ships: 32,000 pieces with byte fallback, built as Llama's is.

Known differences, tested below: SentencePiece knows no special tokens in a text, so a typed "<s>" is letters to it, and
to the runtime unless it is asked for special tokens; the official (slow) tokenizer and the tokenizer.json read the
token. transformers 5 makes its fast Llama tokenizer of a tokenizer.model
without the scores of the pieces, and so joins the spaces of a run, which SentencePiece does not.
"""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from engines.bundle.manifest import PROMPT_TEMPLATE, SYSTEM_PROMPT, TURN_TEMPLATE
from export.checkpoint.tokenizer import read_tokenizer
from runtime.text.conversation import Conversation
from runtime.text.prompter import IMAGE_TOKEN, Prompter
from tests.paths import ROOT

SPECIAL = ("<s>", "</s>", "<unk>")
# First and last character of some blocks: Latin to Hangul, symbols, private use, emoji, old scripts, ideographs beyond.
BLOCKS = [
    (0x20, 0x7E), (0xA1, 0xFF), (0x100, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x530, 0x58F),
    (0x590, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x10A0, 0x10FF), (0x1E00, 0x1EFF),
    (0x2000, 0x206F), (0x2190, 0x22FF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xF8FF),
    (0xFE00, 0xFEFF), (0x10330, 0x1034A), (0x1F300, 0x1F6FF), (0x20000, 0x2A6DF), (0x00, 0x1F),
]  # fmt: skip
SPACES = (" ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u200b", "\u2581")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder with a tokenizer.model."""
    pytest.importorskip("transformers")
    found = find_spec("mistral_common")  # only its data is wanted
    if found is None:
        pytest.skip("needs mistral-common<1.9: pip install 'flexattention-deploy[test]'")
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(Path(found.origin).parent / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def ours(model) -> Tokenizer:
    found = read_tokenizer(model, 32_000)
    assert (found.bos_id, found.eos_ids, found.notes) == (1, (2,), ())
    return Tokenizer.from_buffer(found.content)


@pytest.fixture(scope="module")
def sentencepiece(model):
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(model / "tokenizer.model"))


@pytest.fixture(scope="module")
def slow(model):
    """What is left of the official code's tokenizer in transformers 5: SentencePiece, special tokens cut out before."""
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return SentencePieceBackend(vocab_file=str(model / "tokenizer.model"), legacy=True, **names)


@pytest.fixture(scope="module")
def fast(model):
    from transformers.models.llama.tokenization_llama import LlamaTokenizer

    return LlamaTokenizer.from_pretrained(str(model), legacy=True)


def texts() -> list[str]:
    """Lines of this repository; words of one script, and of several; the same between all kinds of white space."""
    rng = np.random.default_rng(4)

    def word(block: tuple[int, int]) -> str:
        return "".join(map(chr, rng.integers(block[0], block[1] + 1, rng.integers(1, 9))))

    def sentence(blocks: list[tuple[int, int]]) -> str:
        words = [word(blocks[int(rng.integers(len(blocks)))]) for _ in range(rng.integers(1, 9))]
        gaps = [SPACES[int(rng.integers(len(SPACES)))] if rng.random() < 0.4 else " " for _ in range(len(words) + 1)]
        if rng.random() < 0.5:
            gaps[0] = gaps[-1] = ""
        return "".join(gap + word for gap, word in zip(gaps, words, strict=False)) + gaps[-1]

    lines = [
        line
        for path in ("README.md", "tests/oracle/test_tokenizer.py")
        for line in (ROOT / path).read_text().splitlines()
    ]
    found = [*lines, *(sentence([block]) for block in BLOCKS for _ in range(20))]
    found += [sentence(BLOCKS) for _ in range(400)]
    found += [a + b + c for a in SPACES for b in ("x", "7", "", "é") for c in SPACES]
    return [text for text in dict.fromkeys(found) if not any(token in text for token in SPECIAL)]


def test_ids_and_texts(ours, sentencepiece, slow):
    """Encoded as SentencePiece and the official tokenizer do, decoded as SentencePiece does."""
    asked, fallback = texts(), 0
    assert len(asked) > 1000
    for text in asked:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == sentencepiece.encode(text), text
        assert ids == slow.encode(text, add_special_tokens=False), text
        assert ours.decode(ids) == sentencepiece.decode(ids), text
        fallback += any(sentencepiece.is_byte(token) for token in ids)
    assert fallback > 100  # texts with characters that only bytes can spell


def test_every_piece(ours, sentencepiece):
    """Alone, a piece has the id and the text that it has in SentencePiece."""
    assert ours.get_vocab_size() == sentencepiece.get_piece_size() == 32_000
    for index in range(3, 32_000):
        assert ours.id_to_token(index) == sentencepiece.id_to_piece(index)
        if not sentencepiece.is_byte(index):
            assert ours.decode([index]) == sentencepiece.decode([index])


def test_special_tokens_in_a_text(ours, sentencepiece, slow):
    for text in ("<s>", "a <s> b", "x</s>y", "</s>hello", "<unk> k", "<s><s> \n</s>", "é<s>  😀"):
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == slow.encode(text, add_special_tokens=False), text
        assert ids != sentencepiece.encode(text)


@pytest.fixture(scope="module")
def prompter(model, tmp_path_factory) -> Prompter:
    """The text side of a bundle whose template is the prompt alone."""
    out = tmp_path_factory.mktemp("prompter")
    (out / "tokenizer.json").write_bytes(read_tokenizer(model, 32_000).content)
    options = {"bos_id": None, "vocab": 32_000, "image_tokens": 4, "ends": (2,)}
    return Prompter(out / "tokenizer.json", template="<image>{prompt}", **options)


def test_a_prompt_is_text_to_sentencepiece_and_to_the_runtime(prompter, sentencepiece, slow):
    """Typed special tokens, alone, at either end, in runs and in the words of many scripts, are letters. With
    special_tokens they are what the official tokenizer makes of them."""
    rng = np.random.default_rng(5)
    typed = [*SPECIAL, "<pad>", "<image>", "<0x0A>", "[INST]", "</", "<", ">", "s>", "</s", "<</s>>"]
    words = [*texts()[::7], " ", "\n", ""]
    asked = [*typed, *("".join(pair) for pair in product(typed, repeat=2))]
    for _ in range(400):
        parts = [words[int(rng.integers(len(words)))] for _ in range(3)]
        marks = [typed[int(rng.integers(len(typed)))] for _ in range(2)]
        asked.append("".join(part + mark for part, mark in zip(parts, [*marks, ""], strict=True)))
    specials = 0
    for text in asked:
        assert prompter.encode(text, False) == sentencepiece.encode(text), text
        official = [] if "<image>" in text else [prompter.encode(text, False, special_tokens=True)]
        assert official in ([], [slow.encode(text, add_special_tokens=False)]), text
        specials += any(special in text for special in SPECIAL)
    assert specials > 200


def test_ordinary_prompts_are_encoded_as_officially(prompter, slow):
    for text in texts()[::3]:
        official = slow.encode(text, add_special_tokens=False)
        assert prompter.encode(text, False) == official, text
        if "<image>" not in text:  # which would place one
            assert prompter.encode(text, False, special_tokens=True) == official, text


def test_control_tokens_of_the_template_stay(model, sentencepiece, tmp_path):
    """Those of a chat template are control tokens around a prompt in which the same are letters."""
    (tmp_path / "tokenizer.json").write_bytes(read_tokenizer(model, 32_000).content)
    template = "system</s><s>[INST] <image>\n{prompt} [/INST]</s> said"
    options = {"bos_id": 1, "vocab": 32_000, "image_tokens": 4, "ends": (2,)}
    prompter = Prompter(tmp_path / "tokenizer.json", template=template, **options)
    for prompt in ("what?", "a</s>b", "</s>", "<s>x<unk>", "<image>", ""):
        parts = ("system", "[INST] ", f"\n{prompt} [/INST]", " said")
        system, begin, asked, end = (sentencepiece.encode(part) for part in parts)
        assert prompter.encode(prompt, True) == [1, *system, 2, 1, *begin, IMAGE_TOKEN, *asked, 2, *end], prompt


def test_fast_tokenizer_of_transformers(ours, fast):
    """Equal on texts without runs of spaces; at a run it joins what has the lower id, not what has the better score."""
    asked = [text for text in texts() if "  " not in f" {text} ".replace("\u2581", " ")]
    assert len(asked) > 500
    for text in asked:
        assert ours.encode(text, add_special_tokens=False).ids == fast.encode(text, add_special_tokens=False), text
    run = [tokenizer.encode("a  b", add_special_tokens=False) for tokenizer in (ours, fast)]
    assert run[0].tokens == ["\u2581a", "\u2581", "\u2581b"]
    assert fast.convert_ids_to_tokens(run[1]) == ["\u2581a", "\u2581\u2581", "b"]


class Official:
    """What transformers 4.37.2's LlamaTokenizer (use_fast=False) makes of a text, on SentencePiece alone: it cuts out
    the special tokens, then encodes what is between them, each by itself. Without legacy, the dummy space is its own,
    before the whole text, and SentencePiece's is off."""

    def __init__(self, file: Path, legacy: bool) -> None:
        from sentencepiece import SentencePieceProcessor
        from sentencepiece.sentencepiece_model_pb2 import ModelProto

        proto = ModelProto.FromString(file.read_bytes())
        if not legacy:
            proto.normalizer_spec.add_dummy_prefix = False
        self.model, self.legacy = SentencePieceProcessor(model_proto=proto.SerializeToString()), legacy

    def tokens(self, text: str) -> list[str]:
        if text and not self.legacy:
            text = "\u2581" + text.replace("\u2581", " ")
        found: list[str] = []
        for piece in re.split("(<s>|</s>|<unk>)", text):
            found += [piece] if piece in SPECIAL else self._between(piece) if piece else []
        if not self.legacy and len(found) > 1 and found[0] == "\u2581" and found[1] in SPECIAL:
            found = found[1:]
        return found

    def _between(self, piece: str) -> list[str]:
        tokens: list[str] = self.model.encode(piece, out_type=str)
        if self.legacy or not piece.startswith(("\u2581", " ")):
            return tokens
        cut = len(self.model.encode("<unk>", out_type=str))
        return self.model.encode("<unk>" + piece, out_type=str)[cut:]


def conversations() -> list[str]:
    """Official ones, of what people write in many scripts; and special tokens wherever they may stand."""
    rng, words = np.random.default_rng(6), [*texts()[::11], "", " ", "a"]

    def some() -> str:
        return words[int(rng.integers(len(words)))]

    found = []
    for _ in range(300):
        text = f"\n{some()} ASSISTANT:"  # behind the image
        for _ in range(rng.integers(1, 4)):
            text += TURN_TEMPLATE.format(answer=some().strip(), prompt=some())
        found += [text, f"{SYSTEM_PROMPT} USER: {text}"]
    for _ in range(300):
        marks = [SPECIAL[int(rng.integers(3))] for _ in range(rng.integers(1, 5))]
        found.append("".join(some() + mark for mark in marks) + some())
    return [*found, "</s>", "</s></s>", " </s> a", "a</s>USER: b", "</s>\u2581a"]


@pytest.mark.parametrize("legacy", [True, False, None])
def test_conversations_are_encoded_as_officially(model, tmp_path, legacy):
    """With the legacy of tokenizer_config.json, which is true where it says nothing, behind every </s>."""
    shutil.copy(model / "tokenizer.model", tmp_path / "tokenizer.model")
    if legacy is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
    ours = Tokenizer.from_buffer(read_tokenizer(tmp_path, 32_000).content)
    official = Official(model / "tokenizer.model", legacy is not False)
    behind = 0
    for text in conversations():
        found = ours.encode(text, add_special_tokens=False).tokens
        assert found == official.tokens(text), text
        behind += ("</s>", "\u2581US") in pairwise(found)
    assert behind == 0 if legacy is False else behind > 200
    tokens = ours.encode(TURN_TEMPLATE.format(answer="yes", prompt="no?"), add_special_tokens=False).tokens
    user = ["USER"] if legacy is False else ["\u2581US", "ER"]
    assert tokens[tokens.index("</s>") + 1 :][: len(user)] == user


@pytest.mark.parametrize("legacy", [True, False])
def test_single_questions_do_not_depend_on_legacy(model, tmp_path, legacy, sentencepiece):
    shutil.copy(model / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
    ours = Tokenizer.from_buffer(read_tokenizer(tmp_path, 32_000).content)
    for text in texts():
        found = ours.encode(text, add_special_tokens=False).ids
        assert found == sentencepiece.encode(text), text
        assert ours.decode(found) == sentencepiece.decode(found), text


def vicuna(questions: list[str], answers: list[str]) -> str:
    """The official conv_templates["vicuna_v1"] (SeparatorStyle.TWO: " " behind a question, "</s>" behind an answer)."""
    said, text = [f"<image>\n{questions[0]}", *questions[1:]], SYSTEM_PROMPT + " "
    for question, answer in zip(said, [*answers, None], strict=True):
        text += "USER: " + question + " " + "ASSISTANT:"
        text += "" if answer is None else " " + answer + "</s>"
    return text


@pytest.mark.parametrize("legacy", [True, False])
def test_messages_become_the_official_conversation(model, tmp_path, legacy):
    """From tokenizer.model and messages to the ids that the official code feeds its model."""
    shutil.copy(model / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
    (tmp_path / "tokenizer.json").write_bytes(read_tokenizer(tmp_path, 32_000).content)
    texts_of = {"template": PROMPT_TEMPLATE, "turn": TURN_TEMPLATE, "system": SYSTEM_PROMPT}
    options = {"bos_id": 1, "vocab": 32_000, "image_tokens": 4, "ends": (2,)}
    prompter = Prompter(tmp_path / "tokenizer.json", **texts_of, **options)
    official = Official(model / "tokenizer.model", legacy)
    rng, words = np.random.default_rng(7), [text for text in texts()[::11] if text and "<image>" not in text]
    for turns in (1, 2, 3, 4) * 40:
        said = [words[int(rng.integers(len(words)))] for _ in range(2 * turns - 1)]
        roles = ("user", "assistant") * turns
        messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
        before, behind = (
            [official.model.piece_to_id(token) for token in official.tokens(piece)]
            for piece in vicuna(said[::2], said[1::2]).split("<image>")
        )
        assert prompter.encode(messages, True) == [1, *before, IMAGE_TOKEN, *behind], messages
        assert behind.count(2) == turns - 1


@pytest.mark.parametrize("legacy", [True, False])
def test_options_have_the_tokens_of_the_official_vstar_script(model, tmp_path, legacy):
    """It tokenises prompt and option as one text, and takes what comes after "ASSISTANT" ":"."""
    shutil.copy(model / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
    (tmp_path / "tokenizer.json").write_bytes(read_tokenizer(tmp_path, 32_000).content)
    texts_of = {"template": PROMPT_TEMPLATE, "turn": TURN_TEMPLATE, "system": SYSTEM_PROMPT}
    options = {"bos_id": 1, "vocab": 32_000, "image_tokens": 4, "ends": (2,)}
    prompter = Prompter(tmp_path / "tokenizer.json", **texts_of, **options)
    official = Official(model / "tokenizer.model", legacy)
    question = "What is the color of the dog?\nAnswer the question using a single word or phrase."
    prompt = prompter.encode(question, True)
    asked = [
        "white",
        "The color of the dog is white.",
        "A",
        "7",
        "on the left",
        "\U0001f7e5 \u8d64\u3044",
        *texts()[::9],
    ]
    assert len(asked) > 150
    for option in filter(None, asked):
        whole = vicuna([question], []).split("<image>")[1] + f" {option}"
        tokens = official.tokens(whole)
        after = next(at for at, pair in enumerate(pairwise(tokens), 2) if pair == ("ANT", ":"))
        ids, (begin,) = prompter.encode_turns(Conversation(question), True, answer=option)
        assert ids[:begin] == prompt, option
        assert ids[begin:] == [official.model.piece_to_id(token) for token in tokens[after:]], option
