"""What a command leaves behind: its exit status, and one message."""

from __future__ import annotations

import sys

import pytest

from engines.errors import OptionError
from plugins.command import run


def failing(error: BaseException):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "status", "said"),
    [
        (lambda: None, 0, ""),
        (lambda: 1, 1, ""),
        (failing(OptionError("batch 0", fix="leave it out")), 1, "error: batch 0\n  fix: leave it out\n"),
        (failing(KeyboardInterrupt()), 130, "interrupted; nothing was written\n"),
        (failing(SystemExit(2)), 2, ""),
        (failing(SystemExit()), 0, ""),
    ],
)
def test_status_and_message(capsys, main, status, said):
    assert run(main, "interrupted; nothing was written") == status
    assert capsys.readouterr() == ("", said)


def test_other_errors_are_not_hidden():
    for error in (ZeroDivisionError(), OSError(28, "No space left on device"), BrokenPipeError(32, "Broken pipe")):
        with pytest.raises(type(error)):  # also those of a file that is not standard output
            run(failing(error))


def test_standard_streams_are_given_back(capsys):
    before = sys.stdout, sys.stderr
    assert run(lambda: print("text")) == 0
    with pytest.raises(ZeroDivisionError):
        run(failing(ZeroDivisionError()))
    assert (sys.stdout, sys.stderr) == before and capsys.readouterr().out == "text\n"
