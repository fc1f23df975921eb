"""`python -m runtime BUNDLE IMAGE` without a question: typed in a terminal, and through a pipe."""

from __future__ import annotations

import base64
import fcntl
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from PIL import Image

from runtime import Engine
from tests.engines.manifests import edit
from tests.geometries import tiny
from tests.paths import ROOT
from tests.runtime.questions import PHOTO, TALKATIVE

POSTER, TOWER = ROOT / "examples" / "poster.png", ROOT / "examples" / "tower.png"
RED, CYAN = "what number is in the red star?", "what number is in the cyan circle?"
LINE = [sys.executable, "-m", "runtime"]


class Typed:
    """A person at a terminal: types, and reads what is on the screen."""

    def __init__(self, *arguments: object, cwd: Path = ROOT) -> None:
        self.screen, ours = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "PYTHONPATH": str(ROOT)}
        line = [*LINE, *map(str, arguments)]
        self.process = subprocess.Popen(
            line,
            stdin=ours,
            stdout=ours,
            stderr=ours,
            cwd=cwd,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # else Ctrl-C would signal nobody
        )
        os.close(ours)
        self.unread = ""

    def __enter__(self) -> Typed:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.screen)

    def type(self, text: str, *, prompt: str | None = None) -> None:
        """Press the keys, once the prompt is there."""
        if prompt is not None:
            self.until(prompt)
        os.write(self.screen, text.encode())

    def until(self, pattern: str, seconds: float = 60) -> str:
        """What is shown up to and with the pattern, without the codes that move the cursor."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.unread)) is None:
            assert time.monotonic() < end, f"no {pattern!r} in {self.unread!r}"
            if select.select([self.screen], [], [], 0.1)[0]:
                try:
                    more = os.read(self.screen, 1 << 16).decode()
                except OSError:  # its end, on Linux
                    raise AssertionError(f"ended without {pattern!r}: {self.unread!r}") from None
                self.unread += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", more)
        shown, self.unread = self.unread[: found.end()], self.unread[found.end() :]
        return shown

    def ended(self) -> int:
        return self.process.wait(30)


def test_a_conversation_is_typed(default_bundle, tmp_path):
    """Question, picture, another image, errors in between, the line before with the arrow, the end with Ctrl-D."""
    shutil.copy(TOWER, tmp_path / "the tower.png")
    with Typed(default_bundle("fp16"), POSTER, cwd=tmp_path) as person:
        person.type(f"{RED}\r", prompt="poster.png>")
        assert "30" in person.until(r"\(\d+ tokens, \d+/s, [\d.]+ of 81 pages a layer\)").split(RED)[-1]
        person.type("/show\r", prompt="poster.png>")
        person.until("looked-1.png\n")
        with Image.open(tmp_path / "looked-1.png") as picture:
            assert picture.width > 300
        person.type("/show looked-1.png\r", prompt="poster.png>")
        person.until("there is such a file")
        person.type("/bud\t", prompt="poster.png>")  # completed
        person.until("/budget")
        person.type(" 2\r")
        person.until("at most 2 of 81 pages")
        person.type("/budget 82\r", prompt="poster.png>")
        person.until(r"expected: 0 \.\. 81")
        person.type("/image nowhere.png\r", prompt="poster.png>")
        person.until("nowhere.png does not exist")
        person.type("/image the\t", prompt="poster.png>")
        person.until("the tower.png")  # as Tab completes it: with a space
        person.type("\r")
        person.until("the tower.png, .*a new conversation")
        person.type("read the number on the green triangle.\r", prompt="tower.png>")
        assert "22" in person.until(r"\(\d+ tokens, \d+/s, [\d.]+ of 81 pages").split("triangle.")[-1]
        person.type("\x1b[A\x1b[A\r", prompt="tower.png>")  # the line before the last one
        person.until("a new conversation")
        person.type("/nonsense\r", prompt="tower.png>")
        person.until(r"no command /nonsense\n  expected: one of /image, /show, /budget")
        person.type(f"{POSTER}\r", prompt="tower.png>")  # a file that is dropped on the terminal
        person.until(re.escape(f"fix: /image {POSTER}"))
        person.type("half a ques\x03", prompt="tower.png>")
        person.until("Ctrl-D or /quit ends")
        person.type("\x04", prompt="tower.png>")
        assert person.ended() == 0
    assert not list(tmp_path.glob(".*"))  # nothing of what was typed is kept


def test_ctrl_c_stops_an_answer_and_no_more(random_model):
    """In the middle of an answer of thousands of tokens; the conversation is as it was before the question."""
    _, bundle = random_model("long", tiny(vocab=300, context=20_000), tokenizer=True)
    with Typed(bundle, "none", "--max-new-tokens", "15000") as person:
        person.type("tell me everything\r", prompt=">")
        person.until(r"everything\n[^\n]{5}")
        person.type("\x03")
        person.until(r"stopped: this question is no part of the conversation", seconds=20)
        person.type("/keep 1\r", prompt=">")
        person.until(r"expected: 0 \.\. 0")
        person.type("/quit\r", prompt=">")
        assert person.ended() == 0


def piped(bundle: Path, text: str | bytes, *arguments: object) -> subprocess.CompletedProcess:
    line = [*LINE, str(bundle), *map(str, arguments)]
    data = text if isinstance(text, bytes) else text.encode()
    return subprocess.run(line, input=data, capture_output=True, cwd=ROOT, timeout=120)


def test_lines_of_a_pipe_are_answered_one_by_one(default_bundle, tmp_path):
    """Standard output holds the answers and nothing else; a line that cannot be done is told, and by the status."""
    bundle, picture = default_bundle("fp16"), tmp_path / "looked.png"
    script = f"{RED}\n\n/image {TOWER}\nread the number on the green triangle.\n/show {picture}\n"
    result = piped(bundle, script, POSTER)
    assert result.returncode == 0 and result.stdout.decode() == f"30\n22\n{picture}\n", result.stderr
    result = piped(bundle, f"{RED}\n/what\n\xff\n".encode("latin-1") + CYAN.encode(), POSTER, "--page-budget", "8")
    assert result.returncode == 1 and result.stdout.decode().splitlines()[0] == "30"
    assert b"no command /what" in result.stderr and b"surrogates" in result.stderr and b"Traceback" not in result.stderr
    assert len(result.stdout.splitlines()) == 2


@pytest.fixture(scope="module")
def talk(random_model):
    """A bundle whose answers depend on what was said before."""
    return random_model("chat", TALKATIVE, tokenizer=True)[1]


@pytest.fixture
def photo(tmp_path) -> Path:
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_it_is_the_conversation_of_the_engine(talk, photo):
    """Turns, /retry, /clear and a budget: the answers that `Engine.chat` gives."""
    options = {"max_new_tokens": 6}
    chat = Engine(talk).chat(photo)
    expected = [chat.ask(question, **options).text for question in ("what?", "and where?")]
    again = Engine(talk).chat(photo, chat.messages[:2]).ask("and where?", page_budget=1, **options).text
    alone = Engine(talk).generate(photo, "and where?", page_budget=1, **options).text
    lines = "what?\nand where?\n/budget 1\n/retry\n/clear\nand where?\n/budget none\n/retry\n/quit\nwhat?\n"
    result = piped(talk, lines, photo, "--max-new-tokens", 6)
    found = result.stdout.decode()
    last = Engine(talk).generate(photo, "and where?", **options).text
    assert result.returncode == 0 and found == "".join(f"{text}\n" for text in (*expected, again, alone, last))


def test_a_conversation_too_long_says_what_to_forget_and_that_works(talk, photo):
    result = piped(talk, "tell me more\n" * 12, photo, "--max-new-tokens", 100)
    assert result.returncode == 1
    keep = re.search(rb"fix: (/keep (\d+))", result.stderr)
    answered = result.stdout.count(b"\n")
    told = "tell me more\n" * (answered + 1) + f"{keep[1].decode()}\n/retry\n"
    result = piped(talk, told, photo, "--max-new-tokens", 100)
    assert result.stderr.count(b"error:") == 1 and b"turns are kept" in result.stderr, result.stderr
    assert 0 < int(keep[2]) < answered
    chat = Engine(talk).chat(photo)
    expected = [chat.ask("tell me more", max_new_tokens=100).text for _ in range(answered)]
    chat.keep(int(keep[2]))
    expected.append(chat.ask("tell me more", max_new_tokens=100).text)  # /retry takes no answered turn away
    assert result.stdout.decode() == "".join(f"{text}\n" for text in expected)


def test_without_a_template_for_turns_each_question_is_asked_alone(talk, photo, tmp_path):
    bundle = shutil.copytree(talk, tmp_path / "bundle")
    edit(bundle, lambda manifest: manifest["prompt"].update(turn=None))
    engine = Engine(bundle)
    assert engine.manifest.prompt.turn is None
    result = piped(bundle, "what?\nand where?\n/keep 1\n/clear\n/retry\n", photo, "--max-new-tokens", 5)
    answers = [engine.generate(photo, text, max_new_tokens=5).text for text in ("what?", "and where?")]
    assert result.stdout.decode() == "".join(f"{text}\n" for text in answers)
    assert result.stderr.count(b"each question is asked alone") == 1
    assert b"/keep without a conversation" in result.stderr and b"no question to ask again" in result.stderr


def test_images_are_pasted_as_text(talk, photo):
    data = base64.b64encode(photo.read_bytes()).decode()
    assert "//" in data, "what a path would not keep"
    for text in (data, f"DATA:image/png;base64,{data}", f"'{photo}'", str(photo).replace("photo", "ph\\oto")):
        result = piped(talk, f"/image {text}\nwhat?\n", "none", "--max-new-tokens", 4)
        expected = Engine(talk).generate(photo, "what?", max_new_tokens=4).text
        assert result.stdout.decode() == f"{expected}\n" and b"140 x 90: a new" in result.stderr, result.stderr


WRONG = [  # a line, and what is said of it
    ("/show", "/show before an answer"),
    ("/image", "/image without an image"),
    ("/image 'unclosed", "does not exist"),
    ("/image ~nobody-of-this-name/x.png", "does not exist"),
    ("/budget -1", "0 .. "),
    ("/budget ten", "0 .. "),
    ("/budget " + "9" * 5000, "0 .. "),
    ("/keep", "0 .. 0"),
    ("/retry", "no question to ask again"),
    ("/" + "x" * 5000, "no command /xxx"),
    ("/", "no command /"),
    ("what?\n/show x.foo", "a picture: .png"),
    ("/show /nowhere/x.png", "mkdir -p /nowhere"),
    ("/show " + "x" * 5000 + ".png", "cannot be written"),
    ("/show .", "a file name in a folder"),
    ("/image none\n/show", "/show without an image"),
]


def test_a_wrong_line_is_told_and_the_next_one_done(talk, photo):
    result = piped(talk, "".join(f"{line}\n/help\n" for line, _ in WRONG), photo, "--max-new-tokens", 2)
    assert result.returncode == 1 and b"Traceback" not in result.stderr
    told = result.stderr.decode().split("/image PATH")  # the first line of /help
    assert len(told) == len(WRONG) + 1
    for (line, text), said in zip(WRONG, told, strict=False):
        assert said.count("error: ") == 1 and text in said and len(said) < 2000, (line[:80], said)


def test_the_end_of_the_reader_is_the_end(talk, photo):
    ask = f"printf 'what?\\n%.0s' {{1..50}} | {sys.executable} -m runtime {talk} {photo} --max-new-tokens 2 | true"
    line = ["bash", "-c", f"{ask}; exit ${{PIPESTATUS[1]}}"]
    result = subprocess.run(line, capture_output=True, cwd=ROOT, timeout=120)
    assert result.returncode == 141 and b"Traceback" not in result.stderr
    closed = subprocess.run([*LINE, str(talk), str(photo)], stdin=subprocess.DEVNULL, capture_output=True, cwd=ROOT)
    assert closed.returncode == 0 and not closed.stdout


def test_ctrl_c_ends_what_nobody_types(random_model):
    _, bundle = random_model("long", tiny(vocab=300, context=20_000), tokenizer=True)
    line = [*LINE, str(bundle), "none", "--max-new-tokens", "15000"]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as run:
        run.stdin.write(b"tell me everything\n")
        run.stdin.flush()
        run.stdout.read(20)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=30)
    assert run.returncode == 130 and said.endswith(b"interrupted\n") and b"Traceback" not in said


def test_a_terminal_without_the_extra_is_told(talk, photo, tmp_path):
    """Only a terminal needs it: a pipe is read without."""
    (tmp_path / "prompt_toolkit").mkdir()
    hide = "import sys, runpy; sys.modules['prompt_toolkit'] = None; sys.argv = sys.argv[1:]; "
    program = f"{hide}sys.argv[0] = '-m'; runpy.run_module('runtime', run_name='__main__')"
    line = [sys.executable, "-c", program, "runtime", str(talk), str(photo), "--max-new-tokens", "2"]
    screen, ours = pty.openpty()
    result = subprocess.run(line, stdin=ours, capture_output=True, cwd=ROOT, timeout=60)
    os.close(ours)
    os.close(screen)
    assert result.returncode == 1 and b"pip install '.[chat]'" in result.stderr and b"Traceback" not in result.stderr
    result = subprocess.run(line, input=b"what?\n", capture_output=True, cwd=ROOT, timeout=60)
    assert result.returncode == 0 and result.stdout.count(b"\n") == 1
