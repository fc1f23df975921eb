"""A small SentencePiece model, trained here."""

from __future__ import annotations

import io
import random

from sentencepiece import SentencePieceTrainer

TEXT = "the image question answer cat attention curious human What is colour of a 2024 hello über naïve tab\tx"


def train(**changes: object) -> bytes:
    """A SentencePiece model with LLaMA's settings (see the trainer spec of its tokenizer.model), and `changes`."""
    random.seed(0)
    model = io.BytesIO()
    settings = {
        "vocab_size": 400,
        "model_type": "bpe",
        "byte_fallback": True,
        "character_coverage": 0.99,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "hard_vocab_limit": False,
        "num_threads": 1,
        "minloglevel": 2,
    }
    words = TEXT.split(" ")
    lines = (" ".join(random.choices(words, k=12)) for _ in range(1000))
    SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **{**settings, **changes})
    return model.getvalue()
