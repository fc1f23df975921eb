"""A tokenizer to which control tokens are letters, so that what a user types is text."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from engines.errors import PromptError

SPECIAL = "leave it out of the prompt, or pass special_tokens=True (--special-tokens) for the control token"


def unknown_id(model: Mapping[str, Any]) -> int | None:
    """Id of the unknown token, from the model's part of a tokenizer.json."""
    if "unk_id" in model:
        return None if model["unk_id"] is None else int(model["unk_id"])
    vocab = model["vocab"]
    return vocab.get(model.get("unk_token")) if isinstance(vocab, dict) else None


@dataclass(frozen=True)
class PlainTokenizer:
    """A tokenizer in which every control token has a `name` that nobody can type; see without_control."""

    tokenizer: Tokenizer
    names: dict[str, str]
    unknown: int | None  # id of the unknown token

    def named(self, text: str) -> str:
        """`text` with the names of its control tokens in their place, the longest where several could be meant."""
        texts = sorted(self.names, key=len, reverse=True)
        return re.sub("|".join(map(re.escape, texts)), lambda found: self.names[found[0]], text)


def without_control(tokenizer: Tokenizer, control: Mapping[int, str]) -> PlainTokenizer:
    """The same tokenizer, to which the texts of `control` (id -> text) are letters. Raises PromptError.

    It is not enough to let them be no added tokens: a Unigram model finds the pieces of its vocabulary in any text. So
    each gets another name: letters, which normalisers leave alone, drawn at random, so that no prompt can hold them.
    """
    names = {text: "".join(secrets.choice(string.ascii_lowercase) for _ in range(24)) for text in control.values()}
    settings = json.loads(tokenizer.to_str())
    model, unknown = settings["model"], unknown_id(settings["model"])
    for token in settings["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(text, text): index for text, index in vocab.items()}
    else:
        model["vocab"] = [[names.get(text, text), *rest] for text, *rest in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if names.keys().isdisjoint((*pair, "".join(pair)))]
    plain = Tokenizer.from_str(json.dumps(settings))
    moved = [text for index, text in control.items() if plain.token_to_id(names[text]) != index]
    if moved:
        raise PromptError(f"the token {moved[0]!r} has another id without its name", fix=SPECIAL)
    return PlainTokenizer(plain, names, unknown)


def more_than(own: Counter[int], ids: Sequence[int], control: Mapping[int, str]) -> str | None:
    """Text of a control token that `ids` hold more often than `own` counts; None if there is none."""
    counts = Counter(ids)
    return next((text for token, text in control.items() if counts[token] > own[token]), None)
