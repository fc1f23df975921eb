"""Two minutes of the campaign: nothing untyped, hung, crashed or silently wrong.

`python -m tests.campaign --long` is the same for an hour.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.campaign import checkpoints, server, soak
from tests.campaign.campaign import TARGETS, Seeds, run
from tests.campaign.trial import Unjudged, Wrong, trial
from tests.conftest import once

SECONDS = 10.0  # of each target


@pytest.fixture(scope="module")
def made(shared) -> Iterator[Seeds]:
    seeds = Seeds(once(shared / "campaign", lambda folder: folder.mkdir()))
    with seeds.ending:
        yield seeds


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_goes_wrong(name, made):
    result = run(name, made, SECONDS)
    assert result.counts["unjudged"] <= result.counts.total() / 4, result.counts
    assert not result.faults, "\n".join(f"{outcome}\n  {value[:500]}" for value, outcome in result.faults)


def test_what_is_whole_is_accepted(made):
    """Else every trial would be refused for a reason of its own, and nothing be tried."""
    for folder in (made.sharded, made.binary):
        outcome = trial(lambda scratch, folder=folder: checkpoints.run(folder, lambda copy: None, scratch))
        assert outcome.kind == "answered" and outcome.detail == "accepted, and transformers agrees", outcome


def raises(error: BaseException):
    raise error


def fills(_):
    return bytearray(1 << 34)


@pytest.mark.parametrize(
    ("attempt", "kind"),
    [
        (lambda _: "fine", "answered"),
        (lambda _: raises(ValueError("x")), "untyped"),
        (lambda _: raises(KeyboardInterrupt()), "untyped"),
        (lambda _: raises(Wrong("other")), "wrong"),
        (lambda _: raises(Unjudged("nobody knows")), "unjudged"),
        (lambda _: soak.time.sleep(60), "hung"),
        (lambda _: soak.os.kill(soak.os.getpid(), 9), "crashed"),
        (lambda _: soak.os._exit(3), "crashed"),
        (fills, "untyped"),
    ],
)
def test_a_fault_is_one(attempt, kind):
    """The harness tells every kind of fault from an answer."""
    outcome = trial(attempt, seconds=2)
    assert outcome.kind == kind and outcome.is_fault == (kind not in ("answered", "unjudged")), outcome


def test_an_engine_that_is_used_for_long(default_bundle):
    bundle = default_bundle("fp16")
    for figures in (soak.requests(bundle, 80), soak.opens(bundle, 10)):
        assert figures.wrong == 0 and figures.descriptors <= 0 and figures.threads <= 0, figures
        assert figures.rss < 8e6, figures
    # With threads the memory moves by 50 MB either way; an image that is kept, of 3 MB, is 60 MB more each time.
    levels = []
    for _ in range(5):
        figures = soak.threads(bundle, 5)
        assert figures.wrong == 0 and figures.descriptors <= 0 and figures.threads <= 0, figures
        levels.append(soak.Use.now().rss)
    assert min(levels[-2:]) < min(levels[:2]) + 60e6, levels


def test_a_server_that_is_attacked(made):
    """A share of what `--soak` does to it."""
    for figures in soak.served(made.target, requests=60, left=5):
        assert figures.wrong == 0 and figures.descriptors <= 2 and figures.threads <= 4, figures
        assert figures.rss < 40e6, figures
    _, metrics = server.ask(made.target.address, server.request("/metrics", method="GET"))
    stopped = re.search(rb'flex_answers_total\{end="cancelled"\} (\d+)', metrics)
    assert stopped and int(stopped[1]) > 5, "answers were left behind their end, not in the middle"


@pytest.mark.parametrize(
    ("then", "http", "status", "body", "right"),
    [
        ("read", True, 400, b'{"error": {"message": "m", "type": "t", "param": null, "code": "c", "fix": null}}', True),
        ("read", True, 400, b"Bad request", False),
        ("read", False, 400, b"Bad request", True),
        ("read", True, 400, b'{"error": {"message": "m", "type": "t", "param": null, "code": "c"}}', False),
        ("read", False, 500, b"", False),
        ("read", True, 0, b"", False),
        ("end", False, 0, b"", True),
        ("read", True, 302, b"", False),
        ("read", True, 200, b"{}", False),
        ("read", True, 200, b'data: {"choices": []}\n\ndata: [DONE]\n\n', True),
        ("read", True, 200, b'data: {"choices": []}\n\n', False),
        ("read", True, 404, server.SECRET.encode(), False),
    ],
)
def test_a_wrong_response_is_one(then, http, status, body, right):
    attack = server.Attack("test", b"", then, http, judge=server._answered)
    if right:
        server.judged(attack, status, body)
    else:
        with pytest.raises(Wrong):
            server.judged(attack, status, body)


def test_an_engine_that_was_forked(default_bundle):
    """Never a wait: the threads of an engine stay in the process that opened it."""
    outcome = trial(lambda _: soak.forked(default_bundle("fp16"), seconds=10))
    assert outcome.kind == "answered" and outcome.detail.startswith(("BackendError", "OptionError", soak.ANSWER)), (
        outcome
    )
