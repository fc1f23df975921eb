"""Text in, token ids out, and back."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from engines.errors import PromptError, TokenizerError

IMAGE_TOKEN = -200  # official: IMAGE_TOKEN_INDEX
PLACEHOLDER = "<image>"
_SLOT = "{prompt}"
_BROKEN = "\ufffd"  # what a decoder shows for the first bytes of a character
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte-fallback token


def _replace_each(error: UnicodeError) -> tuple[str, int]:
    """Of `codecs.register_error`: one U+FFFD for every byte that cannot be decoded, and where to go on."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return _BROKEN * (error.end - error.start), error.end


codecs.register_error("flexattention.each", _replace_each)


class Prompter:
    """The text side of a bundle."""

    def __init__(
        self, tokenizer: Path | None, *, template: str, bos_id: int | None, vocab: int, image_tokens: int
    ) -> None:
        """`tokenizer`: a tokenizer.json, or None for a bundle that takes raw ids only. `template` holds "<image>" and
        "{prompt}", each once. `vocab`: rows of the embedding table. Raises TokenizerError when the file cannot be read.
        """
        self._template, self._bos_id, self._vocab, self._image_tokens = template, bos_id, vocab, image_tokens
        try:
            self._tokenizer = Tokenizer.from_file(str(tokenizer)) if tokenizer else None
        except Exception as error:  # tokenizers raises plain Exception
            raise TokenizerError(f"{tokenizer} is no tokenizer: {error}", fix="rebuild the bundle") from error
        decoder = self._tokenizer.decoder if self._tokenizer else None
        self._byte_tokens = decoder is not None and decoder.decode(["<0x41>"]) == "A"
        added = self._tokenizer.get_added_tokens_decoder() if self._tokenizer else {}
        self._special = {token for token, entry in added.items() if entry.special}

    def encode(self, prompt: str, has_image: bool) -> list[int]:
        """The question in the bundle's template as token ids, -200 for the image.

        A prompt may place "<image>" itself; then the template's own is left out. Official (tokenizer_image_token):
        the pieces around the image are tokenised apart, and BOS comes once. Raises PromptError.
        """
        if not isinstance(prompt, str):
            raise PromptError(f"a prompt of type {type(prompt).__name__}", expected="str")
        placed = prompt.count(PLACEHOLDER)
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
        ids = [] if self._bos_id is None else [self._bos_id]
        for index, piece in enumerate(template.replace(_SLOT, prompt).split(PLACEHOLDER)):
            if index:
                ids.append(IMAGE_TOKEN)
            ids += self._required().encode(piece, add_special_tokens=False).ids
        return ids

    def expand(self, ids: Sequence[int], has_image: bool) -> tuple[np.ndarray, int]:
        """Check token ids and put the image in: ([n] int64 where -1-j is image feature j, position of feature 0).

        Raises PromptError for ids outside the vocabulary, and unless -200 comes once with an image, never without.
        """
        try:
            given = np.asarray(ids)
        except ValueError:  # lists of different lengths
            given = np.empty(0)
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
        try:
            text = tokenizer.decode(list(ids), skip_special_tokens=True)
        except OverflowError as error:
            raise PromptError(f"token ids {list(ids)!r:.60}", expected=f"0 .. {self._vocab - 1}") from error
        if _BROKEN not in text or not self._byte_tokens:
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


class TextStream:
    """Turns tokens into text pieces as soon as nothing that follows can change them.

    Held back: the bytes of an unfinished character, and what may be the beginning of a stop string.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str] | None, stop: Sequence[str]) -> None:
        """`decode`: ids -> text, None without a tokenizer. `stop`: what ends the text, and is no part of it."""
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []
        self._text = ""
        self._shown = 0
        self.stopped = False

    @property
    def text(self) -> str | None:
        """The text so far, cut before a stop string; None without a tokenizer."""
        return self._text if self._decode else None

    def push(self, token: int) -> str:
        """Add a token; returns the text it settles, often one word, sometimes nothing."""
        if self._decode is None or self.stopped:
            return ""
        self._ids.append(token)
        # Decoders look at neighbours (leading spaces, byte runs): decode everything, as answers are short.
        self._text = self._decode(self._ids)
        found = [at for stop in self._stop if (at := self._text.find(stop)) >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True
            return self._show(len(self._text))
        stable = len(self._text.rstrip(_BROKEN))
        return self._show(stable - self._partial_stop(self._text[:stable]))

    def finish(self) -> str:
        """The rest of the text, when no more tokens come."""
        return "" if self._decode is None else self._show(len(self._text))

    def _show(self, end: int) -> str:
        """What lies between the text given so far and `end`, given now."""
        piece = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _partial_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        ends = (size for stop in self._stop for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size]))
        return max(ends, default=0)


def _marked(tokens: Sequence[str]) -> list[str]:
    """The same tokens with U+FFFD in place of every byte token that belongs to no complete UTF-8 character."""
    marked: list[str] = []
    for is_byte, run in groupby(tokens, key=lambda token: _BYTE.fullmatch(token) is not None):
        if is_byte:
            text = bytes(int(token[3:5], 16) for token in run).decode("utf-8", "flexattention.each")
            for character in text:
                whole = character != _BROKEN
                marked += [f"<0x{byte:02X}>" for byte in character.encode()] if whole else [_BROKEN]
        else:
            marked += run
    return marked
