"""A conversation: what was asked and answered before a question, read from messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from engines.checks import shown
from engines.errors import PromptError

_MESSAGES = 'messages such as {"role": "user", "content": "..."}'


class Message(TypedDict):
    """role: "system", "user" or "assistant". content: text."""

    role: str
    content: str


Prompt = str | Sequence[Mapping[str, object]]  # a question, or the messages of a conversation that ends with one


@dataclass(frozen=True)
class History:
    """What was said before a question. turns: questions with their answers, the oldest first. system: what takes the
    place of the template's own system text; None: nothing does."""

    turns: tuple[tuple[str, str], ...] = ()
    system: str | None = None

    @classmethod
    def read(cls, messages: object) -> History:
        """Of messages: a system's, if any, then a user's and an assistant's in turn. Raises PromptError."""
        system, said = _read(messages, expected=f"a list of {_MESSAGES}")
        if len(said) % 2:
            raise PromptError("a conversation whose last message is the user's", expected="an answer to each question")
        return cls(tuple(zip(said[::2], said[1::2], strict=True)), system)

    @property
    def messages(self) -> list[Message]:
        """The same as messages."""
        said: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        for question, answer in self.turns:
            said += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return said

    def last(self, turns: int) -> History:
        """The same without all but the last so many turns."""
        return History(self.turns[len(self.turns) - turns :] if turns else (), self.system)


@dataclass(frozen=True)
class Conversation:
    """A question, and what was said before it."""

    question: str
    history: History = History()

    @classmethod
    def read(cls, prompt: object) -> Conversation:
        """Of a `Prompt`: text is a question alone; of messages the last is the question. Raises PromptError."""
        if isinstance(prompt, str):
            return cls(prompt)
        system, said = _read(prompt, expected=f"str, or {_MESSAGES}")
        if not said:
            raise PromptError("a conversation without a question", expected="a user's message at its end")
        if len(said) % 2 == 0:
            raise PromptError("a conversation that ends with an answer", expected="a user's message at its end")
        turns = tuple(zip(said[:-1:2], said[1::2], strict=True))
        return cls(said[-1], History(turns, system))

    @property
    def prompt(self) -> str | list[Message]:
        """The `Prompt` that reads as this: the question alone, or messages where something was said before."""
        if self.history == History():
            return self.question
        return [*self.history.messages, {"role": "user", "content": self.question}]

    @property
    def characters(self) -> int:
        """Of all its texts."""
        history = self.history
        return (
            len(self.question)
            + len(history.system or "")
            + sum(len(question) + len(answer) for question, answer in history.turns)
        )


def _read(messages: object, *, expected: str) -> tuple[str | None, list[str]]:
    """The system's text, and what user and assistant said in turn, beginning with the user. PromptError for anything
    else, which says what was `expected`."""
    if not isinstance(messages, Sequence) or isinstance(messages, bytes | bytearray | memoryview | str):
        raise PromptError(f"a conversation of type {type(messages).__name__}", expected=expected)
    system, said = None, list[str]()
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise PromptError(f"message {index} is {shown(message)}", expected=_MESSAGES)
        role, content = message["role"], message["content"]
        if not isinstance(content, str):
            raise PromptError(f"message {index} has a content of type {type(content).__name__}", expected="str")
        if role == "system" and index == 0:
            system = content
            continue
        expected = ("user", "assistant")[len(said) % 2]
        if role != expected:
            raise PromptError(
                f"message {index} is of the role {shown(role)}",
                expected=f"{expected!r}: user and assistant take turns, behind at most one system message",
            )
        said.append(content)
    return system, said
