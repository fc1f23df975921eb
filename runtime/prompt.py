"""Text in, token ids out, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from engines.errors import PromptError, TokenizerError

IMAGE_TOKEN = -200  # official: IMAGE_TOKEN_INDEX
PLACEHOLDER = "<image>"
_BROKEN = "\ufffd"  # what a decoder shows for the first bytes of a character


class Prompter:
    """The text side of a bundle."""

    def __init__(
        self, tokenizer: Path | None, *, template: str, bos_id: int | None, vocab: int, image_tokens: int
    ) -> None:
        """`tokenizer`: a tokenizer.json, or None for a bundle that takes raw ids only. `template` holds "<image>" and
        "{prompt}". `vocab`: rows of the embedding table. Raises TokenizerError when the file cannot be read."""
        self._template, self._bos_id, self._vocab, self._image_tokens = template, bos_id, vocab, image_tokens
        try:
            self._tokenizer = Tokenizer.from_file(str(tokenizer)) if tokenizer else None
        except Exception as error:  # tokenizers raises plain Exception
            raise TokenizerError(f"{tokenizer} is no tokenizer: {error}", fix="rebuild the bundle") from error

    def encode(self, prompt: str, has_image: bool) -> list[int]:
        """The question in the bundle's template as token ids, -200 for the image.

        A prompt may place "<image>" itself; then the template's own is left out. Official (tokenizer_image_token):
        the pieces around the image are tokenised apart, and BOS comes once.
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
        before, after = template.split("{prompt}")
        ids = [] if self._bos_id is None else [self._bos_id]
        for index, piece in enumerate((before + prompt + after).split(PLACEHOLDER)):
            if index:
                ids.append(IMAGE_TOKEN)
            ids += self._required().encode(piece, add_special_tokens=False).ids
        return ids

    def expand(self, ids: Sequence[int], has_image: bool) -> tuple[np.ndarray, int]:
        """Check token ids and put the image in: ([n] int64 where -1-j is image feature j, position of feature 0)."""
        given = np.asarray(ids)
        if given.ndim != 1 or given.size == 0 or given.dtype.kind not in "iu":
            raise PromptError(f"input_ids {ids!r:.60}", expected="a non-empty list of integers")
        given = given.astype(np.int64)
        outside = given[((given < 0) & (given != IMAGE_TOKEN)) | (given >= self._vocab)]
        if outside.size:
            raise PromptError(
                f"token id {outside[0]}", expected=f"0 .. {self._vocab - 1}, or {IMAGE_TOKEN} where the image goes"
            )
        at = np.flatnonzero(given == IMAGE_TOKEN)
        if at.size > 1:
            raise PromptError(
                f"{at.size} images in input_ids", expected="one image per request", fix="ask once per image"
            )
        if at.size != has_image:
            found = "an image" if has_image else f"{IMAGE_TOKEN} in input_ids"
            missing = f"no {IMAGE_TOKEN} in input_ids" if has_image else "no image"
            raise PromptError(f"{found} but {missing}", expected="both or neither")
        if not has_image:
            return given, 0
        begin = int(at[0])
        return np.concatenate((given[:begin], -1 - np.arange(self._image_tokens), given[begin + 1 :])), begin

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids -> text, special tokens left out."""
        return self._required().decode(list(ids), skip_special_tokens=True)

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
        for stop in self._stop:
            at = self._text.find(stop)
            if at >= 0:
                self._text, self.stopped = self._text[:at], True
        if self.stopped:
            return self._show(len(self._text))
        stable = len(self._text.rstrip(_BROKEN))
        return self._show(stable - self._partial_stop(self._text[:stable]))

    def finish(self) -> str:
        """The rest of the text, when no more tokens come."""
        return "" if self._decode is None else self._show(len(self._text))

    def _show(self, end: int) -> str:
        piece = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _partial_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        ends = (size for stop in self._stop for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size]))
        return max(ends, default=0)
