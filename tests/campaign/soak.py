"""An engine that is used for long: memory, descriptors and answers of many requests, threads, opens and a fork."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hypothesis import given, seed, settings

from engines.errors import FlexError
from engines.memory import release_freed
from runtime import Engine
from tests.campaign import server
from tests.campaign.campaign import CHOSEN
from tests.campaign.trial import Wrong
from tests.paths import ROOT

PICTURE = ROOT / "examples" / "poster.png"
PROMPT = "what numbers are in the red star and the cyan circle?"
ANSWER = "30 and 98"  # of the default model
REQUESTS, OPENS, THREADS = 2000, 100, 4
ATTACKS, LEFT = 1000, 50
WARM_UP = 10  # share of the requests before memory is first looked at


def _entries(folder: str) -> int:
    return len(list(Path(folder).iterdir()))


@dataclass(frozen=True)
class Use:
    """What a process holds. rss: bytes of memory. descriptors, threads: counts."""

    rss: int
    descriptors: int
    threads: int

    @classmethod
    def now(cls, process: int | None = None) -> Use:
        """Of another process, or of this one after what is not needed is freed."""
        if process is None:
            gc.collect()
            release_freed()
        folder = f"/proc/{process or 'self'}"
        status = Path(folder, "status").read_text().split()
        rss = int(status[status.index("VmRSS:") + 1]) * 1024
        return cls(rss, _entries(f"{folder}/fd"), _entries(f"{folder}/task"))


@dataclass(frozen=True)
class Figures:
    """Of one way of use: how often, how long it took, how many answers were not the right one, and how much more the
    process held at the end than after the first tenth."""

    name: str
    count: int
    seconds: float
    wrong: int
    rss: int
    descriptors: int
    threads: int

    def row(self) -> str:
        held = f"{self.rss / 1e6:+.1f} MB | {self.descriptors:+d} | {self.threads:+d}"
        return f"| {self.name} | {self.count} | {self.seconds:.0f} s | {self.wrong} | {held} |"


HEAD = "| use | times | took | wrong | memory | descriptors | threads |\n|---|---:|---:|---:|---:|---:|---:|"


def _measured(name: str, count: int, once, process: int | None = None) -> Figures:
    """once(index) -> whether the answer was right, so many times; what is held is held by `process`."""
    started, wrong, before = time.monotonic(), 0, None
    for index in range(count):
        if index == count // WARM_UP:
            before = Use.now(process)
        wrong += not once(index)
    after = Use.now(process)
    assert before is not None
    return Figures(
        name,
        count,
        time.monotonic() - started,
        wrong,
        after.rss - before.rss,
        after.descriptors - before.descriptors,
        after.threads - before.threads,
    )


def requests(bundle: Path, count: int = REQUESTS) -> Figures:
    """Requests with an image each, every third dropped half-way, every tenth refused."""
    engine = Engine(bundle)

    def once(index: int) -> bool:
        if index % 10 == 9:
            try:
                engine.generate(PICTURE, PROMPT, temperature=-1)
            except FlexError:
                return True
            return False
        if index % 3 == 2:
            stream = engine.stream(PICTURE, PROMPT)
            return ANSWER.startswith(next(iter(stream)).strip())
        return engine.generate(PICTURE, PROMPT).text == ANSWER

    return _measured("requests to one engine", count, once)


def opens(bundle: Path, count: int = OPENS) -> Figures:
    """Engines opened, asked once, and closed."""

    def once(index: int) -> bool:
        with Engine(bundle) as engine:
            return engine.generate(PICTURE, PROMPT).text == ANSWER

    return _measured("engines opened and closed", count, once)


def threads(bundle: Path, count: int = REQUESTS // 10) -> Figures:
    """One engine, asked by several threads at once, each with a view of its own."""
    engine = Engine(bundle)

    def once(index: int) -> bool:
        right: list[bool] = []

        def ask() -> None:
            with engine.image(PICTURE) as view:
                right.append(view.ask(PROMPT).text == ANSWER)

        asking = [threading.Thread(target=ask) for _ in range(THREADS)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        return right == [True] * THREADS

    return _measured(f"{THREADS} threads at once", count, once)


def served(target: server.Target, requests: int = ATTACKS, left: int = LEFT) -> list[Figures]:
    """Hostile requests to a server one after the other, and answers that are left in the middle, four at a time."""
    attacks: list[server.Attack] = []
    chosen = settings(CHOSEN, max_examples=requests)
    seed(0)(chosen(given(server.attacks(target))(lambda attack: attacks.append(attack))))()
    scratch, told = Path(), set[str]()

    def once(index: int) -> bool:
        return stood(attacks[index % len(attacks)])

    def stood(attack: server.Attack) -> bool:
        try:
            server.run(target, attack, scratch)
        except server.Refused:
            return True
        except Wrong as wrong:
            if str(wrong) not in told:
                print(f"WRONG: {wrong}\n  {attack!r:.600}", file=sys.stderr)
            told.add(str(wrong))
            return False
        return True

    def leave(index: int) -> bool:
        with ThreadPoolExecutor(THREADS) as pool:
            return all(pool.map(stood, [server.disconnect(target)] * THREADS))

    return [
        _measured("malformed requests to a server", requests, once, target.pid),
        _measured(f"{THREADS} answers at once, left in the middle", left, leave, target.pid),
    ]


def forked(bundle: Path, seconds: float = 30.0) -> str:
    """What a process that was forked from one with an open engine gets of it: an answer, or a typed error."""
    engine = Engine(bundle)
    assert engine.generate(PICTURE, PROMPT).text == ANSWER
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            said = engine.generate(PICTURE, PROMPT).text
        except FlexError as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    end = time.monotonic() + seconds
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > end:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return "hung"
        time.sleep(0.05)
    with os.fdopen(reading) as pipe:
        return pipe.read()
