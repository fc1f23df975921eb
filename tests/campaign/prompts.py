"""Texts of all kinds, held against SentencePiece; and damaged tokenizer files."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from engines.errors import PromptError
from export.checkpoint.tokenizer import read_tokenizer
from runtime.text.prompter import IMAGE_TOKEN, Prompter
from tests.campaign.mutate import damaged_text
from tests.campaign.trial import Wrong
from tests.checkpoints import TEMPLATE

SPECIALS = ("<s>", "</s>", "<unk>", "<image>", "<pad>", "<0x41>", "<0xFF>", "{prompt}", "\u2581")
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=30), st.sampled_from([*SPECIALS, " ", "  ", "\n", "USER:", "ASSISTANT:", "\ud83d", "\u0301"])
    ),
    max_size=8,
).map("".join)
LARGE = 32_000  # pieces of the real model


def real_model(folder: Path) -> Path:
    """A folder with a tokenizer.model as Llama has it, and its conversion."""
    folder.mkdir()
    found = find_spec("mistral_common")
    assert found and found.origin, "needs mistral-common<1.9"
    (folder / "tokenizer.model").write_bytes((Path(found.origin).parent / "data" / "tokenizer.model.v1").read_bytes())
    converted = read_tokenizer(folder, LARGE)
    assert converted is not None
    (folder / "tokenizer.json").write_bytes(converted.content)
    return folder


def prompter(file: Path, vocab: int) -> Prompter:
    return Prompter(file, template=TEMPLATE, bos_id=1, vocab=vocab, image_tokens=4, ends=(2,))


def both(folder: Path) -> tuple[Prompter, SentencePieceProcessor]:
    """The text side of a bundle with the real model's tokenizer, and SentencePiece."""
    theirs = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ours = prompter(folder / "tokenizer.json", LARGE)
    ours.encode("</s>", True)  # makes what it needs for control tokens as text: once, not in every trial
    return ours, theirs


def run_text(ours: Prompter, theirs: SentencePieceProcessor, text: str, scratch: Path) -> str:
    """Encode a prompt; Wrong unless it is what SentencePiece, which knows no special tokens, makes of the pieces."""
    found = ours.encode(text, True)
    before, after = TEMPLATE.split("<image>")
    expected = [1, *theirs.encode(before), IMAGE_TOKEN, *theirs.encode(after.replace("{prompt}", text))]
    if found != expected:
        raise Wrong(f"encoded otherwise than by SentencePiece: {text!r}, {found} in place of {expected}")
    if ours.decode(found[found.index(IMAGE_TOKEN) + 1 :]) != theirs.decode(expected[expected.index(IMAGE_TOKEN) + 1 :]):
        raise Wrong(f"decoded otherwise than by SentencePiece: {text!r}, {ours.decode(found[2:])!r}")
    return f"{len(found)} tokens"


def damages(file: Path) -> st.SearchStrategy[tuple[bytes, str]]:
    """A tokenizer.json that is none, or another one; and a text for it."""
    return st.tuples(damaged_text(json.loads(file.read_text())), TEXTS)


def run_file(data: bytes, text: str, vocab: int, scratch: Path) -> str:
    """Open a damaged tokenizer and use it."""
    (scratch / "tokenizer.json").write_bytes(data)
    opened = prompter(scratch / "tokenizer.json", vocab)
    try:
        ids = opened.encode(text, True)
    except PromptError:
        ids = [1, 2, 3]
    if not all(id == IMAGE_TOKEN or 0 <= id < vocab for id in ids):
        opened.expand(ids, True)  # which refuses them
        raise Wrong(f"ids {ids} outside the vocabulary were let through")
    return f"accepted: {opened.decode([id for id in ids if id != IMAGE_TOKEN])!r:.100}"
