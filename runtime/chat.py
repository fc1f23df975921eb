"""`Chat`: questions about one image, each with those before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engines.checks import require_integer
from runtime.answer import Answer
from runtime.decode import Stream
from runtime.score.walk import Score
from runtime.text.conversation import History, Message


class Chat:
    """A conversation about one image, or none.

    Official: the whole conversation is the prompt, and only the answer that is being made reads hi-res pages. So what
    was prefilled for a question stays in the cache of the image's view, and an earlier answer is prefilled again as
    text. The answer to a question is the one that a fresh request with the same messages gets.
    """

    def __init__(
        self,
        stream: Callable[..., Stream],
        score: Callable[..., list[Score]],
        messages: Sequence[Mapping[str, object]] = (),
    ) -> None:
        """`stream`, `score`: of the image's `ImageView`. `messages`: what was said before, a "system" message, if any,
        then those of "user" and "assistant" in turn, an answer to each question. Raises PromptError."""
        self._stream, self._score = stream, score
        self._history = History.read(messages)
        self._running: tuple[str, Stream] | None = None

    @property
    def messages(self) -> list[Message]:
        """What was said, {"role": ..., "content": text}, in whole turns: an answer that was not read to its end is no
        part of it."""
        return self._settled().messages

    def ask(self, question: str, **options: Any) -> Answer:
        """Answer the next question; options and errors of `Engine.generate`, and ContextError when the conversation is
        too long, which says how many turns `keep` may keep. After an error the conversation is as it was."""
        return self.stream(question, **options).answer()

    def stream(self, question: str, **options: Any) -> Stream:
        """Like `ask`, as an iterator of text pieces. The turn counts once it is read to its end; asking again before
        that drops it."""
        history = self._settled()
        self._running = None
        stream = self._stream([*history.messages, {"role": "user", "content": question}], **options)
        self._running = question, stream
        return stream

    def score(self, question: str, continuations: Sequence[str], **options: Any) -> list[Score]:
        """How likely each of several answers to the next question is; see ImageView.score. The conversation stays as it
        is, without the question."""
        asked: Message = {"role": "user", "content": question}
        return self._score([*self._settled().messages, asked], continuations, **options)

    def keep(self, turns: int) -> None:
        """Forget all but the last so many turns, 0 .. all. What a system message said stays. Raises OptionError."""
        history = self._settled()
        turns = require_integer(turns, f"turns={turns!r}", 0)
        self._history = history.last(min(turns, len(history.turns)))

    def _settled(self) -> History:
        """The history, with the answer that was running if it has come to its end."""
        if self._running is not None:
            question, stream = self._running
            if (answer := stream.finished) is not None:
                # Official: what the model wrote, without the space before it.
                turn = question, (answer.text or "").strip()
                self._history = History((*self._history.turns, turn), self._history.system)
                self._running = None
        return self._history
