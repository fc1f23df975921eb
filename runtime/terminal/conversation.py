"""A conversation about an image in the terminal: what is typed is asked, and commands begin with a slash."""

from __future__ import annotations

import io
import itertools
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from engines.checks import require_integer
from engines.errors import ContextError, FlexError, ImageError, OptionError
from flexattention_deploy import require_extra
from runtime.answer import Token
from runtime.chat import Chat
from runtime.decode import Stream
from runtime.engine import Engine
from runtime.image import load_image
from runtime.terminal.show import draw_selection, require_writable, write_picture

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer

COMMANDS = {  # name -> what comes behind it, what it does
    "/image": ("PATH", "talk about another image: a file, a data: URL, or none"),
    "/show": ("[FILE]", "write a picture of the pages that the last answer read"),
    "/budget": ("[N|none]", "pages each layer reads at most from now on; none: the bundle's"),
    "/retry": ("", "ask the last question again"),
    "/keep": ("N", "forget all but the last N turns"),
    "/clear": ("", "begin the conversation about this image again"),
    "/help": ("", "list the commands"),
    "/quit": ("", "end, as Ctrl-D does"),
}
_PATHS = ("/image", "/show")  # what comes behind these is completed as a path

Reader = Callable[[str], str | None]  # prompt -> the next line; None at the end


@dataclass(frozen=True)
class Lines:
    """Where lines come from. read: gives the next one. typed: by a person in a terminal, who sees what is written."""

    read: Reader
    typed: bool


def open_lines() -> Lines:
    """What is typed, with editing, history and completion, where standard input is a terminal; else its lines as they
    are. Ends the process, or raises ImportError, where a terminal needs the extra `chat` and does not have it."""
    if sys.stdin is None:  # closed, `<&-`
        return Lines(lambda _: None, typed=False)
    if not sys.stdin.isatty():
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # bytes of no character are an error of that question
        return Lines(lambda _: sys.stdin.readline() or None, typed=False)
    require_extra("chat")
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.output import create_output

    session: PromptSession[str] = PromptSession(
        history=InMemoryHistory(),
        completer=_completer(),
        complete_while_typing=False,  # on Tab: most of what is typed is a question
        output=create_output(always_prefer_tty=True),  # `... | tee answers`: the prompt is no part of them
    )

    def read(prompt: str) -> str | None:
        try:
            return session.prompt(prompt)
        except EOFError:
            return None

    return Lines(read, typed=True)


def _completer() -> Completer:
    """Of commands, and of paths behind those that take one."""
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    class Commands(Completer):
        paths = PathCompleter(expanduser=True)

        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
            text = document.text_before_cursor
            name, space, argument = text.partition(" ")
            if space and name in _PATHS:
                yield from self.paths.get_completions(Document(argument), complete_event)
            elif text.startswith("/") and not space:
                yield from (Completion(each, -len(text)) for each in COMMANDS if each.startswith(text))

    return Commands()


class Conversation:
    """Questions and commands, one line each. Answers, and the paths of pictures, go to standard output; errors and
    everything else to standard error."""

    def __init__(
        self, engine: Engine, image: PIL.Image.Image | None, source: str, *, exif: bool, options: dict[str, Any]
    ) -> None:
        """image: what it begins with, upright, RGB; None for text alone. source: the text that it was read from. exif:
        whether images to come are turned upright. options: fields of runtime.request.Options, for every question."""
        self._engine, self._exif, self._options = engine, exif, dict(options)
        self._open(image, source)

    def _open(self, image: PIL.Image.Image | None, source: str) -> None:
        self._image, self._name = image, Path(source).name[-30:] if os.path.lexists(source) else "image"
        self._view = self._engine.image(image)
        self._clear()

    def _clear(self) -> None:
        self._chat: Chat | None = self._view.chat() if self._engine.manifest.prompt.turn is not None else None
        self._question: str | None = None  # the last one
        self._whole = False  # whether it was answered to the end, and so is a part of the conversation
        self._tokens: list[Token] = []  # of the last answer

    def run(self, lines: Lines) -> int:
        """Until the lines end. The exit status: 1 when nobody watched and a line could not be done."""
        if lines.typed:
            _say(f"{self._engine.manifest.name}: ask something; /help lists the commands, Ctrl-D ends")
        if self._chat is None:
            _say("this bundle has no template for conversations: each question is asked alone")
        failed = False
        while True:
            try:
                line = lines.read("> " if self._image is None else f"{self._name}> ")
                if line is None or line.strip() in ("/quit", "/exit"):
                    return int(failed and not lines.typed)
                self._do(line.strip(), lines.typed)
            except FlexError as error:
                failed = True
                _say(f"error: {error}")
            except KeyboardInterrupt:
                if not lines.typed:
                    raise
                _say("stopped; Ctrl-D or /quit ends")

    def _do(self, line: str, typed: bool) -> None:
        """One line."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if not line.startswith("/"):
            if line:
                self._ask(line, typed)
        elif name not in COMMANDS:
            fix = f"/image {line}" if os.path.lexists(line) else "/help"
            raise OptionError(f"no command {name:.40}", expected=f"one of {', '.join(COMMANDS)}", fix=fix)
        elif name == "/retry":
            self._retry(typed)
        elif name == "/help":
            for command, (takes, does) in COMMANDS.items():
                _say(f"{f'{command} {takes}':<18}{does}")
        elif name == "/clear":
            self._clear()
        else:
            takes_text = {
                "/image": self._take_image,
                "/show": self._show,
                "/budget": self._set_budget,
                "/keep": self._keep,
            }
            takes_text[name](argument)

    def _ask(self, question: str, typed: bool) -> None:
        """Stream the answer."""
        stream = self._stream(question)
        self._question, self._whole, self._tokens = question, False, []
        with _stopping(stream, typed) as stopped:
            try:
                for token in stream.steps():
                    print(token.text, end="", flush=True)
                    if token.id is not None:
                        self._tokens.append(token)
                    if stopped():
                        break
            finally:
                print(flush=True)
        answer = stream.finished
        self._whole = answer is not None
        if typed and answer is not None:
            stats = answer.stats
            read = stats.pages_read if self._image is not None else stats.pages_read[:0]
            pages = f", {read.mean():.1f} of {self._cells} pages a layer" if read.size else ""
            _say(f"({len(answer.token_ids)} tokens, {stats.tokens_per_second:.0f}/s{pages})")
        elif typed:
            _say("(stopped: this question is no part of the conversation)")

    @property
    def _cells(self) -> int:
        return self._engine.geometry.cells**2

    def _stream(self, question: str) -> Stream:
        if self._chat is None:
            return self._view.stream(question, **self._options)
        try:
            return self._chat.stream(question, **self._options)
        except ContextError as error:
            if error.turns is None:
                raise
            fix = f"/keep {error.turns} forgets all but the last {error.turns} turns; then ask again, or /retry"
            self._question, self._whole = question, False
            raise ContextError(error.found, expected=error.expected, fix=fix) from None

    def _retry(self, typed: bool) -> None:
        if self._question is None:
            raise OptionError("no question to ask again", expected="a question first")
        before = self._chat
        if before is not None and self._whole and before.messages:  # none: /keep 0 forgot it
            self._chat = self._view.chat(before.messages[:-2])
        try:
            self._ask(self._question, typed)
        except FlexError:
            self._chat = before  # an error leaves the conversation as it was
            raise

    def _take_image(self, argument: str) -> None:
        source = _path(argument)
        if not source:
            raise ImageError("/image without an image", expected="a file, a data: URL, or none", fix="/image photo.jpg")
        image = None if source == "none" else load_image(source, exif=self._exif)
        self._view.close()
        self._open(image, source)
        size = "text alone" if image is None else f"{self._name}, {image.width} x {image.height}"
        _say(f"{size}: a new conversation")

    def _show(self, argument: str) -> None:
        if self._image is None:
            raise OptionError("/show without an image", fix="/image photo.jpg")
        if not self._tokens:
            raise OptionError("/show before an answer", expected="an answer first")
        path = Path(_path(argument)) if argument else _unused("looked")
        require_writable(path, "/show")
        if os.path.lexists(path):
            raise OptionError(f"/show {path}: there is such a file", expected="a new name", fix="/show alone finds one")
        cells = np.stack([token.cells for token in self._tokens])
        captions = self._engine.prompter.captions(token.id for token in self._tokens if token.id is not None)
        write_picture(draw_selection(self._image, cells, captions), path, "/show")
        print(path, flush=True)

    def _set_budget(self, argument: str) -> None:
        most = self._engine.manifest.page_budget
        if argument:
            none = argument.lower() == "none"
            meaning = ", or none for the bundle's"
            self._options["page_budget"] = None if none else _integer(argument, "/budget", most, meaning)
        budget = self._options.get("page_budget")
        _say(f"each layer reads at most {most if budget is None else budget} of {self._cells} pages")

    def _keep(self, argument: str) -> None:
        if self._chat is None:
            raise OptionError("/keep without a conversation", expected="a bundle with a template for conversations")
        turns = _integer(argument, "/keep", len(self._chat.messages) // 2, ": there are so many turns")
        self._chat.keep(turns)
        _say(f"the last {turns} turns are kept")


def _integer(text: str, command: str, most: int, meaning: str) -> int:
    try:
        value: object = int(text)
    except ValueError:  # no number, or one of more digits than Python reads
        value = text
    try:
        return require_integer(value, f"{command} {text:.40}".strip(), 0, most)
    except OptionError as error:
        raise OptionError(error.found, expected=f"0 .. {most}{meaning}") from None


def _path(typed: str) -> str:
    """A path as people type it, or as a terminal pastes a file that is dropped on it: quoted, or with backslashes."""
    if os.path.lexists(typed):
        return typed
    try:
        words = shlex.split(typed)
        if len(words) != 1:
            return typed
        return str(Path(words[0]).expanduser()) if words[0].startswith("~") else words[0]
    except (ValueError, RuntimeError):  # a quotation mark that is not closed; the home of nobody
        return typed


def _unused(stem: str) -> Path:
    """A name in the current folder that no file has."""
    return next(path for n in itertools.count(1) if not os.path.lexists(path := Path(f"{stem}-{n}.png")))


@contextmanager
def _stopping(stream: Stream, typed: bool) -> Iterator[Callable[[], bool]]:
    """Lend whether Ctrl-C was pressed: the answer then ends after the token that is being made, and nothing is cut in
    two. Pressed again, it is KeyboardInterrupt at once. Where nobody types, it is that the first time. The stream is
    closed behind it."""
    pressed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.getsignal(signal.SIGINT)
    if typed:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        if typed:
            signal.signal(signal.SIGINT, before)
        stream.close()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
