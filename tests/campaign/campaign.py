"""What is tried, and for how long: every target makes its own inputs and judges what is accepted."""

from __future__ import annotations

import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.campaign import bundles, checkpoints, images, options, prompts, seeds, server
from tests.campaign.trial import ANSWERED, KINDS, Outcome, trial

BATCH = 200  # examples that Hypothesis chooses with one seed
FEWEST = 21  # trials of a target
CHOSEN = settings(
    max_examples=BATCH,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
LISTED = 20  # faults of a target that are told in full

Try = Callable[[Any, Path], object]


@dataclass
class Result:
    """counts: trials by kind. faults: what was tried, and what became of it; each kind of fault once."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[str, Outcome]] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    slowest: float = 0.0

    def add(self, value: Any, outcome: Outcome) -> None:
        self.counts[outcome.kind] += 1
        self.slowest = max(self.slowest, outcome.seconds)
        if outcome.is_fault:
            kind = f"{outcome.kind} {re.sub(r'[0-9]+|/tmp/[^ :]*', '#', outcome.detail)[:60]}"
            if kind not in self.seen and len(self.faults) < LISTED:
                self.faults.append((f"{value!r}", outcome))
            self.seen.add(kind)


def run(name: str, made: Seeds, seconds: float, start: int = 0) -> Result:
    """Try the target `name` for so many seconds, and FEWEST times on a machine however slow. The same `start` tries the
    same examples in the same order."""
    strategy, attempt = TARGETS[name](made)
    result, end, batch = Result(name), time.monotonic() + seconds, start

    def goes_on() -> bool:
        return time.monotonic() < end or result.counts.total() < FEWEST

    def one(value: Any) -> None:
        if goes_on():
            result.add(value, trial(lambda folder: attempt(value, folder)))

    while goes_on():
        seed(batch)(CHOSEN(given(strategy)(one)))()
        batch += 1
    return result


@dataclass(frozen=True)
class Seeds:
    """What is damaged: made when first asked for, and kept in `folder`. What runs is ended by `ending`."""

    folder: Path
    ending: ExitStack = field(default_factory=ExitStack)

    @cached_property
    def sharded(self) -> Path:
        return _made(self.folder / "sharded", seeds.sharded_checkpoint)

    @cached_property
    def binary(self) -> Path:
        return _made(self.folder / "binary", seeds.torch_checkpoint)

    @cached_property
    def bundle(self) -> Path:
        return _made(self.folder / "bundle", lambda path: seeds.small_bundle(path, self.sharded))

    @cached_property
    def tokenizer(self) -> Path:
        return _made(self.folder / "tokenizer", prompts.real_model)

    @cached_property
    def answer(self) -> list[int]:
        """What the whole bundle answers, told by a process of its own: no engine may be open here."""
        outcome = trial(lambda _: bundles.answer(self.bundle))
        assert outcome.kind == ANSWERED, outcome
        return [int(token) for token in outcome.detail.strip("[]").split(",")]

    @cached_property
    def target(self) -> server.Target:
        """A server of the whole bundle, which lives as long as this."""
        bundle = self.bundle  # made here: a fork cannot, behind the threads of torch
        outcome = trial(lambda _: server.answer(bundle))
        assert outcome.kind == ANSWERED, outcome
        home = Path(tempfile.mkdtemp(prefix="server-", dir=self.folder))
        running, target = server.serve(bundle, home, outcome.detail)
        self.ending.callback(running.process.wait)
        self.ending.callback(running.process.kill)
        return target


def _sharded(made: Seeds) -> tuple[st.SearchStrategy, Try]:
    sharded = made.sharded
    return checkpoints.damages(sharded), lambda value, scratch: checkpoints.run(sharded, value[1], scratch)


def _binary(made: Seeds) -> tuple[st.SearchStrategy, Try]:
    binary = made.binary
    return checkpoints.torch_damages(binary), lambda value, scratch: checkpoints.run(binary, value[1], scratch)


def _bundles(made: Seeds) -> tuple[st.SearchStrategy, Try]:
    whole, answer = made.bundle, made.answer
    return bundles.damages(whole), lambda value, scratch: bundles.run(whole, answer, value[1], value[2], scratch)


def _tokenizers(made: Seeds) -> tuple[st.SearchStrategy, Try]:
    strategy = prompts.damages(made.sharded / "tokenizer.json")
    return strategy, lambda value, scratch: prompts.run_file(*value, seeds.GEOMETRY.vocab, scratch)


def _prompts(made: Seeds) -> tuple[st.SearchStrategy, Try]:
    ours, theirs = prompts.both(made.tokenizer)
    return prompts.TEXTS, lambda value, scratch: prompts.run_text(ours, theirs, value, scratch)


def _images(made: Seeds) -> tuple[st.SearchStrategy, Try]:
    return images.damages(), images.run


def _options(made: Seeds) -> tuple[st.SearchStrategy, Try]:
    whole, answer = made.bundle, made.answer
    return options.REQUESTS, lambda value, scratch: options.run(whole, answer, value, scratch)


def _http(made: Seeds) -> tuple[st.SearchStrategy, Try]:
    target = made.target
    return server.attacks(target), lambda value, scratch: server.run(target, value, scratch)


TARGETS: dict[str, Callable[[Seeds], tuple[st.SearchStrategy, Try]]] = {
    "checkpoints": _sharded,
    "pytorch_model.bin": _binary,
    "bundles": _bundles,
    "tokenizers": _tokenizers,
    "prompts": _prompts,
    "images": _images,
    "options": _options,
    "http": _http,
}


def markdown(results: list[Result]) -> str:
    """A table of the trials."""
    head = ["tried", "trials", *KINDS, "slowest"]
    rows = [
        [r.name, str(r.counts.total()), *(str(r.counts[kind]) for kind in KINDS), f"{r.slowest:.1f} s"] for r in results
    ]
    whole = Counter[str]()
    for result in results:
        whole.update(result.counts)
    rows.append(["**all**", str(whole.total()), *(str(whole[kind]) for kind in KINDS), ""])
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(head) - 1), *lines[1:]])


def _made(folder: Path, make: Callable[[Path], object]) -> Path:
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        make(folder)
    return folder
