"""What a run of the tests left out, in one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest


def in_one_line(reports: Iterable[pytest.TestReport | pytest.CollectReport]) -> str:
    """Skipped tests counted by reason, the commonest first; of a reason what comes before a colon. "" when none were.

    A file that is skipped as a whole never says how many tests it holds: it counts as a file.
    """
    tests: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for report in reports:
        text = report.longrepr[2].removeprefix("Skipped: ")
        (files if isinstance(report, pytest.CollectReport) else tests)[text.split(": ")[0].splitlines()[0]] += 1
    counts = [f"{count} test{'s' * (count > 1)} ({reason})" for reason, count in tests.most_common()]
    counts += [f"{count} file{'s' * (count > 1)} ({reason})" for reason, count in files.most_common()]
    return "skipped: " + ", ".join(counts) if counts else ""
