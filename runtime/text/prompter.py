"""Text in, token ids out, and back."""

from __future__ import annotations

import codecs
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer

from engines.checks import is_integer, shown
from engines.errors import FlexError, PromptError, TokenizerError
from engines.tokenizer_file import read_tokenizer_file
from runtime.text.control import SPECIAL, PlainTokenizer, more_than, unknown_id, without_control
from runtime.text.conversation import Conversation, Prompt
from runtime.text.stream import BROKEN, TextStream

IMAGE_TOKEN = -200  # official: IMAGE_TOKEN_INDEX
PLACEHOLDER = "<image>"
_QUESTION, _ANSWER = "{prompt}", "{answer}"  # fields of a template
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
        turn: str | None = None,
        system: str | None = None,
        bos_id: int | None,
        vocab: int,
        image_tokens: int,
        ends: Collection[int] = (),
    ) -> None:
        """`tokenizer`: a tokenizer.json, or None for a bundle that takes raw ids only; its padding and truncation are
        ignored. `template`, `turn`, `system`: see engines.bundle.manifest.Prompt. `vocab`: rows of the embedding table.
        `ends`: ids that end an answer. Raises TokenizerError when the file cannot be read.
        """
        self._template, self._turn, self._system = template, turn, system
        self._bos_id, self._vocab, self._image_tokens = bos_id, vocab, image_tokens
        self._tokenizer: Tokenizer | None = None
        self._plain: PlainTokenizer | None = None  # made when a prompt first needs it
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
            given = {token for token in (bos_id, *ends, unknown_id(settings["model"])) if token is not None}
            texts = {token: opened.id_to_token(token) for token in self._special | named | given}
            self._control = {token: text for token, text in texts.items() if text}
            self.longest = max(map(len, opened.get_vocab()), default=0)
            self._tokenizer = opened

    def encode(self, prompt: Prompt, has_image: bool, *, special_tokens: bool = False) -> list[int]:
        """The question, or the conversation that ends with one, in the bundle's template as token ids, -200 for the
        image. See `encode_turns`. Raises PromptError."""
        return self.encode_turns(Conversation.read(prompt), has_image, special_tokens=special_tokens)[0]

    def encode_turns(
        self, asked: Conversation, has_image: bool, *, special_tokens: bool = False, answer: str | None = None
    ) -> tuple[list[int], list[int]]:
        """(token ids with -200 for the image, for each turn of the history how many ids came before its answer).

        `answer`: of the question, behind it as the answers of the history are behind theirs (officially a space is
        between them; nothing where the bundle knows no turns); it is one more turn. A token that spans the seam belongs
        to the answer.

        What a user types is text: "</s>" is four characters, and "<image>" a word. With `special_tokens` it is read as
        the official code reads it: control tokens are those, and a prompt may place "<image>" itself; then the
        template's own is left out. Official (tokenizer_image_token): the pieces around the image are tokenised apart,
        each of them whole, all turns of a conversation together, and BOS comes once. Raises PromptError.
        """
        ids, ends = [] if self._bos_id is None else [self._bos_id], list[int]()
        for index, piece in enumerate(self._pieces(asked, answer, has_image, special_tokens)):
            if index:
                ids.append(IMAGE_TOKEN)
            found, turns = self._ids_of(piece, special_tokens)
            ends += [len(ids) + turn for turn in turns]
            ids += found
        return ids, ends

    def _pieces(
        self, asked: Conversation, answer: str | None, has_image: bool, special_tokens: bool
    ) -> list[list[_Part]]:
        """The parts of the text before the image and of the text behind it; of all the text without an image."""
        parts = self._parts(asked, answer)
        for part in parts:
            _require_characters(part.text)
        placed = sum(part.text.count(PLACEHOLDER) for part in parts if part.typed) if special_tokens else 0
        if placed > 1:
            raise PromptError(
                f"{placed} images in the prompt", expected="one image per request", fix="ask once per image"
            )
        if placed and not has_image:
            raise PromptError(f"{PLACEHOLDER} in the prompt but no image", fix="pass an image")
        pieces: list[list[_Part]] = [[]]
        for part in parts:
            if not part.typed and (placed or not has_image):
                part = replace(part, text=part.text.replace(f"{PLACEHOLDER}\n", "").replace(PLACEHOLDER, ""))
            split = part.text.split(PLACEHOLDER) if special_tokens or not part.typed else [part.text]
            pieces[-1].append(replace(part, text=split[0]))
            pieces += [[replace(part, text=text, turn=False)] for text in split[1:]]
        return pieces

    def _parts(self, asked: Conversation, answer: str | None) -> list[_Part]:
        """The template with everything in its place, and the answer behind it."""
        questions = [*(question for question, _ in asked.history.turns), asked.question]
        typed = {_QUESTION: questions[0]}
        if asked.history.system is not None:
            if self._system is None:
                raise PromptError(
                    "a system message, but this bundle's template has no system text that it could replace",
                    fix="put it in front of the first question",
                )
            typed[self._system] = asked.history.system
        parts = _filled(self._template, typed)
        for (_, earlier), question in zip(asked.history.turns, questions[1:], strict=True):
            if self._turn is None:
                raise PromptError(
                    "a conversation, but this bundle's template is for one question",
                    fix="ask each question alone; or name extra.turn_template in the checkpoint's config.json, if the "
                    "model was trained for conversations, and rebuild",
                )
            first, *others = _filled(self._turn, {_QUESTION: question, _ANSWER: earlier})
            parts += [replace(first, turn=True), *others]
        if answer is not None:
            between = "" if self._turn is None else self._turn[: self._turn.index(_ANSWER)]
            parts += [_Part(between, False, turn=True), _Part(answer, True)]
        return parts

    def _ids_of(self, piece: Sequence[_Part], special_tokens: bool) -> tuple[list[int], list[int]]:
        """Token ids of a piece, and how many of them come before each of its turns.

        Template and what was typed are encoded as one, since tokens may span their seams. Without `special_tokens` only
        the template's control tokens are any; what was typed without some is encoded as officially, by the same
        tokenizer.
        """
        encoding = self._encoding(_text(piece))
        typed = any(part.typed for part in piece)
        if special_tokens or not typed or self._control.keys().isdisjoint(encoding.ids):
            return encoding.ids, _before_turns(piece, encoding)
        own = Counter(self._encoding(_text([part for part in piece if not part.typed])).ids)
        if more_than(own, encoding.ids, self._control):
            if self._plain is None:
                with _typed(PromptError, "this tokenizer cannot read control tokens as text", fix=SPECIAL):
                    self._plain = without_control(self._required(), self._control)
            plain = self._plain
            piece = [part if part.typed else replace(part, text=plain.named(part.text)) for part in piece]
            encoding = self._encoding(_text(piece), plain.tokenizer)
            control = {token: text for token, text in self._control.items() if token != plain.unknown}
            if left := more_than(own, encoding.ids, control):
                raise PromptError(f"the tokenizer has no other way to write {left!r} than that token", fix=SPECIAL)
        return encoding.ids, _before_turns(piece, encoding)

    def _encoding(self, text: str, tokenizer: Tokenizer | None = None) -> Encoding:
        """`text` as the tokenizer encodes it, control tokens included."""
        tokenizer = tokenizer or self._required()
        fix = "leave out characters the tokenizer does not know, or rebuild with one that has an unknown token"
        with _typed(PromptError, "the tokenizer cannot encode this prompt", fix=fix):
            return tokenizer.encode(text, add_special_tokens=False)

    def expand(self, ids: Sequence[int], has_image: bool) -> tuple[np.ndarray, int]:
        """Check token ids and put the image in: ([n] int64 where -1-j is image feature j, position of feature 0).

        Raises PromptError for ids outside the vocabulary, and unless -200 comes once with an image, never without.
        """
        given = self._integers(ids, "input_ids")
        self._require_known(given[given != IMAGE_TOKEN], f", or {IMAGE_TOKEN} where the image goes")
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

    def continuation(self, ids: Sequence[int]) -> np.ndarray:
        """Token ids that follow a prompt, checked: [n] int64. PromptError for none, and for ids outside the vocabulary,
        of which an image is one."""
        given = self._integers(ids, "continuation_ids")
        self._require_known(given, ": an image stands in a prompt alone" if IMAGE_TOKEN in given else "")
        return given.astype(np.int64)

    def _integers(self, ids: Sequence[int], name: str) -> np.ndarray:
        """`ids`, which an error calls by `name`, as an array. PromptError for anything but a list of integers."""
        given = _array(ids)
        if given.ndim != 1 or given.size == 0 or given.dtype.kind not in "iu":
            raise PromptError(f"{name} {shown(ids)}", expected="a non-empty list of integers")
        return given

    def _require_known(self, ids: np.ndarray, besides: str) -> None:
        """PromptError, which says what is allowed `besides`, when one of the ids is outside the vocabulary."""
        outside = ids[(ids < 0) | (ids >= self._vocab)]
        if outside.size:
            raise PromptError(f"token id {outside[0]}", expected=f"0 .. {self._vocab - 1}{besides}")

    def pieces(self, ids: Sequence[int]) -> list[str] | None:
        """Each token as the vocabulary spells it, bytes and spaces with its marks; "" for an id that the tokenizer does
        not know. None without a tokenizer."""
        if self._tokenizer is None:
            return None
        return [self._tokenizer.id_to_token(token) or "" for token in ids]

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

    def captions(self, ids: Iterable[int]) -> list[str]:
        """The text of each token by itself, for pictures of where it looked. Raises PromptError for a negative id."""
        return [self.decode([token]) for token in ids]

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


@dataclass(frozen=True)
class _Part:
    """A piece of text: the template's, or `typed`. turn: an answer of the history begins with it."""

    text: str
    typed: bool
    turn: bool = False


def _filled(template: str, slots: Mapping[str, str]) -> list[_Part]:
    """`template` with the texts of `slots`, found -> put there."""
    split = re.split(f"({'|'.join(map(re.escape, slots))})", template)
    return [_Part(slots[text], True) if text in slots else _Part(text, False) for text in split]


def _text(parts: Sequence[_Part]) -> str:
    return "".join(part.text for part in parts)


def _before_turns(piece: Sequence[_Part], encoding: Encoding) -> list[int]:
    """How many tokens of a piece end before each of its turns begins."""
    lengths = accumulate((len(part.text) for part in piece), initial=0)
    begins = [begin for begin, part in zip(lengths, piece, strict=False) if part.turn]
    if not begins:
        return []
    ends = [end for _, end in encoding.offsets]
    return [bisect_right(ends, begin) for begin in begins]


def _require_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"half a character at position {error.start} of the prompt",
            expected="text without lone surrogates",
            fix="decode the prompt as UTF-8, or prompt.encode('utf-16', 'surrogatepass').decode('utf-16')",
        ) from error


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
