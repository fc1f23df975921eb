"""Text in, token ids out, and back."""

from __future__ import annotations

import codecs
import json
import re
import secrets
import string
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from engines.checks import is_integer
from engines.errors import FlexError, PromptError, TokenizerError
from engines.tokenizer_file import read_tokenizer_file
from runtime.text.stream import BROKEN, TextStream

IMAGE_TOKEN = -200  # official: IMAGE_TOKEN_INDEX
PLACEHOLDER = "<image>"
_SLOT = "{prompt}"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte-fallback token


def _replace_each(error: UnicodeError) -> tuple[str, int]:
    """Of `codecs.register_error`: one U+FFFD for every byte that cannot be decoded, and where to go on."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return BROKEN * (error.end - error.start), error.end


codecs.register_error("flexattention.each", _replace_each)


class Prompter:
    """The text side of a bundle."""

    def __init__(
        self,
        tokenizer: Path | None,
        *,
        template: str,
        bos_id: int | None,
        vocab: int,
        image_tokens: int,
        ends: Collection[int] = (),
    ) -> None:
        """`tokenizer`: a tokenizer.json, or None for a bundle that takes raw ids only; its padding and truncation are
        ignored. `template` holds "<image>" and "{prompt}", each once. `vocab`: rows of the embedding table. `ends`: ids
        that end an answer. Raises TokenizerError when the file cannot be read.
        """
        self._template, self._bos_id, self._vocab, self._image_tokens = template, bos_id, vocab, image_tokens
        self._tokenizer: Tokenizer | None = None
        self._plain: _Plain | None = None  # made when a prompt first needs it
        self._byte_tokens, self._special, self._control = False, set[int](), dict[int, str]()
        self.longest = 0  # characters of the longest token
        if tokenizer is None:
            return
        data, settings = read_tokenizer_file(tokenizer, fix="rebuild the bundle")
        with _typed(TokenizerError, f"{tokenizer} is no tokenizer", fix="rebuild the bundle"):
            opened = Tokenizer.from_buffer(data)
            opened.no_padding()  # left over from training
            opened.no_truncation()
            decoder, added = opened.decoder, opened.get_added_tokens_decoder()
            self._byte_tokens = decoder is not None and decoder.decode(["<0x41>"]) == "A"
            self._special = {token for token, entry in added.items() if entry.special}
            named = {token for token, entry in added.items() if entry.content == PLACEHOLDER}
            given = {token for token in (bos_id, *ends, _unknown(settings["model"])) if token is not None}
            texts = {token: opened.id_to_token(token) for token in self._special | named | given}
            self._control = {token: text for token, text in texts.items() if text}
            self.longest = max(map(len, opened.get_vocab()), default=0)
            self._tokenizer = opened

    def encode(self, prompt: str, has_image: bool, *, special_tokens: bool = False) -> list[int]:
        """The question in the bundle's template as token ids, -200 for the image.

        What a user types is text: "</s>" is four characters, and "<image>" a word. With `special_tokens` it is read as
        the official code reads it: control tokens are those, and a prompt may place "<image>" itself; then the
        template's own is left out. Official (tokenizer_image_token): the pieces around the image are tokenised apart,
        each of them whole, and BOS comes once. Raises PromptError.
        """
        if not isinstance(prompt, str):
            raise PromptError(f"a prompt of type {type(prompt).__name__}", expected="str")
        placed = prompt.count(PLACEHOLDER) if special_tokens else 0
        if placed > 1:
            raise PromptError(
                f"{placed} images in the prompt", expected="one image per request", fix="ask once per image"
            )
        if placed and not has_image:
            raise PromptError(f"{PLACEHOLDER} in the prompt but no image", fix="pass an image")
        template = self._template
        if placed or not has_image:
            template = template.replace(f"{PLACEHOLDER}\n", "").replace(PLACEHOLDER, "")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"half a character at position {error.start} of the prompt",
                expected="text without lone surrogates",
                fix="decode the prompt as UTF-8, or prompt.encode('utf-16', 'surrogatepass').decode('utf-16')",
            ) from error
        if special_tokens:
            pieces = [self._ids(piece) for piece in template.replace(_SLOT, prompt).split(PLACEHOLDER)]
        else:
            pieces = [self._ids_of_text(piece, prompt) for piece in template.split(PLACEHOLDER)]
        ids = [] if self._bos_id is None else [self._bos_id]
        for index, piece in enumerate(pieces):
            ids += [IMAGE_TOKEN, *piece] if index else piece
        return ids

    def _ids(self, text: str, tokenizer: Tokenizer | None = None) -> list[int]:
        """`text` as the tokenizer encodes it, control tokens included."""
        tokenizer = tokenizer or self._required()
        fix = "leave out characters the tokenizer does not know, or rebuild with one that has an unknown token"
        with _typed(PromptError, "the tokenizer cannot encode this prompt", fix=fix):
            return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def _ids_of_text(self, piece: str, prompt: str) -> list[int]:
        """A piece of the template with `prompt` in its slot, where only the template's control tokens are any.

        Piece and prompt are encoded as one, since tokens may span their seam; a prompt without control tokens therefore
        is encoded as officially, by the same tokenizer.
        """
        ids = self._ids(piece.replace(_SLOT, prompt))
        if _SLOT not in piece or self._control.keys().isdisjoint(ids):
            return ids
        own = Counter(self._ids(piece.replace(_SLOT, "")))
        if not _more(ids, own, self._control):
            return ids
        if self._plain is None:
            with _typed(PromptError, "this tokenizer cannot read control tokens as text", fix=_SPECIAL):
                self._plain = _without_control(self._required(), self._control)
        plain = self._plain
        ids = self._ids(plain.template(piece).replace(_SLOT, prompt), plain.tokenizer)
        if left := _more(ids, own, {token: text for token, text in self._control.items() if token != plain.unknown}):
            raise PromptError(f"the tokenizer has no other way to write {left!r} than that token", fix=_SPECIAL)
        return ids

    def expand(self, ids: Sequence[int], has_image: bool) -> tuple[np.ndarray, int]:
        """Check token ids and put the image in: ([n] int64 where -1-j is image feature j, position of feature 0).

        Raises PromptError for ids outside the vocabulary, and unless -200 comes once with an image, never without.
        """
        given = _array(ids)
        if given.ndim != 1 or given.size == 0 or given.dtype.kind not in "iu":
            raise PromptError(f"input_ids {ids!r:.60}", expected="a non-empty list of integers")
        outside = given[((given < 0) & (given != IMAGE_TOKEN)) | (given >= self._vocab)]
        if outside.size:
            raise PromptError(
                f"token id {outside[0]}", expected=f"0 .. {self._vocab - 1}, or {IMAGE_TOKEN} where the image goes"
            )
        given = given.astype(np.int64)  # only now: a large unsigned id would wrap around, to -200 for instance
        at = np.flatnonzero(given == IMAGE_TOKEN)
        if at.size > 1:
            raise PromptError(
                f"{at.size} images in input_ids", expected="one image per request", fix="ask once per image"
            )
        if at.size != has_image:
            found = "an image" if has_image else f"{IMAGE_TOKEN} in input_ids"
            missing = f"no {IMAGE_TOKEN} in input_ids" if has_image else "no image"
            fix = f"put {IMAGE_TOKEN} where the image goes" if has_image else f"pass an image, or remove {IMAGE_TOKEN}"
            raise PromptError(f"{found} but {missing}", expected="both or neither", fix=fix)
        if not has_image:
            return given, 0
        begin = int(at[0])
        return np.concatenate((given[:begin], -1 - np.arange(self._image_tokens), given[begin + 1 :])), begin

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids -> text, special tokens left out, one U+FFFD for each byte token that is in no whole character (as
        sentencepiece, the official decoder, does). Raises PromptError for a negative id."""
        tokenizer = self._required()
        with _typed(PromptError, f"token ids {list(ids)!r:.60}", expected=f"0 .. {self._vocab - 1}"):
            text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
            if BROKEN not in text or not self._byte_tokens:
                return text
            # `tokenizers` gives up a whole run of byte tokens for one bad byte, good characters included.
            tokens = [tokenizer.id_to_token(token) for token in ids if token not in self._special]
            return str(tokenizer.decoder.decode(_marked([token for token in tokens if token is not None])))

    def text_stream(self, stop: Sequence[str]) -> TextStream:
        """A fresh stream for one answer. Without a tokenizer it stays silent, and stop strings are a PromptError."""
        if stop:
            self._required()
        return TextStream(self.decode if self._tokenizer else None, stop)

    def _required(self) -> Tokenizer:
        if self._tokenizer is None:
            raise PromptError(
                "this bundle has no tokenizer",
                fix="pass input_ids=, or put tokenizer.json or tokenizer.model into the checkpoint and rebuild",
            )
        return self._tokenizer


_SPECIAL = "leave it out of the prompt, or pass special_tokens=True (--special-tokens) for the control token"


@contextmanager
def _typed(
    error: type[FlexError], found: str, *, expected: str | None = None, fix: str | None = None
) -> Iterator[None]:
    """`error` for whatever `tokenizers` raises: plain exceptions, and when Rust panics what is no Exception at all."""
    try:
        yield
    except (FlexError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as failure:
        raise error(f"{found}: {failure!s:.200}", expected=expected, fix=fix) from failure


def _array(ids: object) -> np.ndarray:
    """A list of integers, or an array, as an array; an empty one for anything else."""
    if hasattr(ids, "__array__"):
        return np.asarray(ids)
    # One by one, since NumPy takes True for 1, and would spell out a range inside a list, of whatever length.
    listed = isinstance(ids, Sequence) and not isinstance(ids, str | bytes | bytearray) and all(map(is_integer, ids))
    return np.asarray(ids) if listed else np.empty(0)


def _unknown(model: Mapping[str, Any]) -> int | None:
    """Id of the unknown token, from the model's part of a tokenizer.json."""
    if "unk_id" in model:
        return None if model["unk_id"] is None else int(model["unk_id"])
    vocab = model["vocab"]
    return vocab.get(model.get("unk_token")) if isinstance(vocab, dict) else None


@dataclass(frozen=True)
class _Plain:
    """A tokenizer in which every control token has a `name` that nobody can type; see _without_control."""

    tokenizer: Tokenizer
    names: dict[str, str]
    unknown: int | None  # id of the unknown token

    def template(self, text: str) -> str:
        """`text` with the names of its control tokens in their place, the longest where several could be meant."""
        texts = sorted(self.names, key=len, reverse=True)
        return re.sub("|".join(map(re.escape, texts)), lambda found: self.names[found[0]], text)


def _without_control(tokenizer: Tokenizer, control: Mapping[int, str]) -> _Plain:
    """The same tokenizer, to which the texts of `control` (id -> text) are letters.

    It is not enough to let them be no added tokens: a Unigram model finds the pieces of its vocabulary in any text. So
    each gets another name: letters, which normalisers leave alone, drawn at random, so that no prompt can hold them.
    """
    names = {text: "".join(secrets.choice(string.ascii_lowercase) for _ in range(24)) for text in control.values()}
    settings = json.loads(tokenizer.to_str())
    model, unknown = settings["model"], _unknown(settings["model"])
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
        raise PromptError(f"the token {moved[0]!r} has another id without its name", fix=_SPECIAL)
    return _Plain(plain, names, unknown)


def _more(ids: Sequence[int], than: Counter[int], control: Mapping[int, str]) -> str | None:
    """Text of a control token that `ids` hold more often than `than`; None if there is none."""
    counts = Counter(ids)
    return next((text for token, text in control.items() if counts[token] > than[token]), None)


def _marked(tokens: Sequence[str]) -> list[str]:
    """The same tokens with U+FFFD in place of every byte token that belongs to no complete UTF-8 character."""
    marked: list[str] = []
    for is_byte, run in groupby(tokens, key=lambda token: _BYTE.fullmatch(token) is not None):
        if is_byte:
            text = bytes(int(token[3:5], 16) for token in run).decode("utf-8", "flexattention.each")
            for character in text:
                whole = character != BROKEN
                marked += [f"<0x{byte:02X}>" for byte in character.encode()] if whole else [BROKEN]
        else:
            marked += run
    return marked
