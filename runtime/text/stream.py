"""Tokens to text while they come: pieces as soon as they are settled, and where a stop string ends them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"  # what a decoder shows for the bytes of no whole character
_PARTIAL = 3  # bytes an unfinished character of UTF-8 has at most, each of them at least a part of one BROKEN
_WINDOW, _KEPT = 64, 32  # tokens decoded at most, where the text allows it; and kept of them as what stands before
_SETTLED = 8  # characters behind a cut: more than the bytes of one, so that none is in two parts


class TextStream:
    """Turns tokens into text pieces as soon as nothing that follows can change them.

    Held back: the bytes of an unfinished character, and what may be the beginning of a stop string. A token costs the
    same whatever came before it: only a window of the last tokens is decoded, only what is held back is searched.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str] | None, stop: Sequence[str]) -> None:
        """`decode`: ids -> text, None without a tokenizer. `stop`: what ends the text, and is no part of it."""
        self._decode, self._stop = decode, tuple(stop)
        self._window: list[int] = []  # the last tokens
        self._given: list[str] = []  # all text before what is below, piece by piece
        self._before = ""  # text of tokens before the window, from the first that was not given
        self._ending = ""  # text of the window
        self._shown = 0  # characters of the two that were given
        self.stopped = False

    @property
    def text(self) -> str | None:
        """The text so far, cut before a stop string; None without a tokenizer."""
        return "".join((*self._given, self._before, self._ending)) if self._decode else None

    def push(self, token: int) -> str:
        """Add a token; returns the text it settles, often one word, sometimes nothing."""
        if self._decode is None or self.stopped:
            return ""
        self._window.append(token)
        self._ending = self._decode(self._window)
        if len(self._window) >= _WINDOW:
            self._shorten(self._decode, self._window[-_KEPT:])
        whole = self._before + self._ending
        # A stop string cannot begin in what was given: its beginning would have been held back.
        found = [at for stop in self._stop if (at := whole.find(stop, self._shown)) >= 0]
        if found:
            self._before, self._ending, self.stopped = whole[: min(found)], "", True
            return self._show(min(found))
        stable = max(len(whole.rstrip(BROKEN)), len(whole) - _PARTIAL)
        return self._show(self._begin_of_stop(whole, stable))

    def finish(self) -> str:
        """The rest of the text, when no more tokens come."""
        return "" if self._decode is None else self._show(len(self._before) + len(self._ending))

    def _shorten(self, decode: Callable[[Sequence[int]], str], kept: list[int]) -> None:
        """Drop the tokens before `kept`, the end of the window, unless the text of all is another than that of the two
        parts, one after the other: a space between them apart, which decoders drop at either end of a text."""
        head, tail = decode(self._window[: -len(kept)]), decode(kept)
        cut = len(self._ending) - len(tail)
        apart = self._ending.startswith(head) and self._ending.endswith(tail) and len(tail) >= _SETTLED
        if not apart or cut < len(head) or self._ending[len(head) : cut].strip(" "):
            return  # another time: the next token moves the cut
        before = self._before + self._ending[:cut]
        given = min(self._shown, len(before))
        self._given.append(before[:given])
        self._before, self._shown = before[given:], self._shown - given
        self._window, self._ending = kept, tail

    def _show(self, end: int) -> str:
        """What lies between the text given so far and `end`, given now."""
        piece = (self._before + self._ending)[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _begin_of_stop(self, text: str, end: int) -> int:
        """Where the longest end of `text[:end]` begins that begins a stop string; `end` if there is none."""
        if not self._stop:
            return end
        longest = max(map(len, self._stop)) - 1
        for begin in range(max(self._shown, end - longest), end):
            held = text[begin:end]
            if any(stop.startswith(held) for stop in self._stop):
                return begin
        return end
