"""What a command line shows of a long task."""

import sys

from engines import progress


def test_a_bar_is_not_in_what_a_command_prints(capsys):
    """`... > table.md` keeps the table alone."""
    with progress.progress("decoder: building") as show:
        show(0.5)
    found = capsys.readouterr()
    assert found.out == "" and "decoder: building" in found.err


def test_progress_without_rich_is_lines_with_the_time_left(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress("decoder: building") as show:
        for now[0], part in ((1.0, 0.1), (6.0, 0.25), (7.0, 0.3), (12.0, 0.5)):
            show(part)
    assert capsys.readouterr().err.splitlines() == [
        "decoder: building",
        "decoder: building: 25 %, about 18 s left",
        "decoder: building: 50 %, about 12 s left",
    ]
