"""The tokenizer that fits the questions."""

from __future__ import annotations

import re
import string
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from export.default_model.asking import names, patterns, unknown
from export.default_model.asking.question import COLUMNS, ROWS
from export.default_model.scenes import COLOURS, SHAPES

SPECIAL = ("<unk>", "<s>", "</s>")


@cache
def known_words() -> frozenset[str]:
    """Every word that questions and answers are made of, words that are unknown on purpose aside."""
    texts = [text for group in patterns.TRAIN.values() for pattern in group for text in patterns.expand(pattern)]
    texts += [text for texts in patterns.RELATIONS.values() for text in texts]
    texts += [text for several in names.SHAPE_NAMES.values() for pair in several for text in pair]
    texts += [text for pair in names.THING + names.ONE for text in pair]
    texts += [text for several in names.COLOUR_NAMES.values() for text in several]
    texts += ["answer yes no nothing anything there is are a an and the at centre first second larger", unknown.ANSWER]
    texts += [*ROWS, *COLUMNS, *COLOURS, *SHAPES]
    return frozenset(word for text in texts for word in re.findall("[a-z]+", text.replace("{r}", "")))


def build_tokenizer() -> Tokenizer:
    """Whole words where the questions use them, single characters elsewhere; digits always stand alone."""
    vocabulary = [(token, 0.0) for token in SPECIAL]
    vocabulary += [(f"\u2581{word}", -4.0) for word in sorted(known_words())]
    vocabulary += [(f"\u2581{digit}", -5.0) for digit in string.digits]
    vocabulary += [
        (character, -9.0) for character in ["\u2581", *string.ascii_lowercase, *string.digits, *".,:;?!'\"()-+/"]
    ]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace("\n", " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return tokenizer
