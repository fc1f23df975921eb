"""Requests that share decode steps: rows of one decoder, taken and left while the others go on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np

from engines.backend import Image, KeptCache, Model, Step
from engines.errors import FlexError
from runtime.answer import Decoding, Token
from runtime.request import Request, shared_runs


@dataclass(eq=False)
class _Seat:
    """A request in the batch. image: of one row; None for text alone. row: None while it waits for one. settled: the
    row has its image, and what others had prefilled. known: how many of its ids the row's cache holds; reused: how many
    it did then. told: tokens nobody has taken yet.
    """

    decoding: Decoding
    image: Image[Any] | None
    row: int | None = None
    settled: bool = False
    known: int = 0
    reused: int = 0
    told: deque[Token] = field(default_factory=deque)
    error: FlexError | None = None

    @property
    def request(self) -> Request:
        """What is to be answered."""
        return self.decoding.request

    @property
    def prefilled(self) -> bool:
        """Whether all ids but the last are in the cache, so that it can step."""
        return self.settled and self.known == len(self.request.ids) - 1


@dataclass
class _Row:
    """What a row of the slots holds. image: which, without keeping it. ids: prefilled, [n] int64, in `runs`. seat:
    whose it is at the moment."""

    image: Callable[[], Image[Any] | None] = lambda: None
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    runs: tuple[int, ...] = ()
    seat: _Seat | None = None


@dataclass(frozen=True)
class _Kept:
    """What a row held of an image before another came into it. ids, runs: as in `_Row`. cache: the slots' own."""

    ids: np.ndarray
    runs: tuple[int, ...]
    cache: KeptCache


class Batch:
    """The rows of one model, and the requests that take turns in them.

    Nobody runs it: whoever waits for a token makes the next step, for all. So a lone request pays for no thread, and
    with several readers, each in its own thread, one works and the others find their tokens ready.

    A request takes the free row that holds most of it, or a copy of what another row holds, is prefilled there run by
    run, at most a chunk between two steps, and leaves at once when it has its last token or nobody wants it. Rows do
    not see each other. When a row is given to another image, what it held of the one before is put aside, as long as
    that image lives: with more images than rows none is prefilled again.

    steps: that were made so far.
    """

    def __init__(self, model: Model[Any], slots: int, chunk: int) -> None:
        """`slots`: requests at a time. `chunk`: tokens prefilled between two steps, at most. Raises BackendError."""
        self._model, self._slots, self._chunk = model, model.slots(slots), chunk
        self._rows, self._seats = [_Row() for _ in range(slots)], list[_Seat]()  # those that have a row, by arrival
        self._waiting: deque[_Seat] = deque()
        self._kept: WeakKeyDictionary[Image[Any], _Kept] = WeakKeyDictionary()
        self.steps = 0
        self._stepping, self._changing = threading.Lock(), threading.Lock()

    @property
    def active(self) -> int:
        """Requests that have a row."""
        return len(self._seats)

    @property
    def free(self) -> int:
        """Rows that no request has or waits for."""
        with self._changing:
            return max(0, len(self._rows) - len(self._seats) - len(self._waiting))

    def decode(self, decoding: Decoding, image: Callable[[], Image[Any] | None]) -> Generator[Token | None]:
        """Make the steps of `decoding` beside the others; like runtime.decode.decode. `image`: encodes it, of one row,
        when the request gets in line; None for text alone."""
        with self._seated(decoding, image()) as seat:
            yield None
            while (token := self._next(seat)) is not None:
                yield token
        yield from decoding.rest()
        decoding.finish(seat.reused)

    @contextmanager
    def _seated(self, decoding: Decoding, image: Image[Any] | None) -> Iterator[_Seat]:
        seat = _Seat(decoding, image)
        with self._changing:
            self._waiting.append(seat)
        try:
            yield seat
        finally:
            with self._changing:
                if seat in self._waiting:
                    self._waiting.remove(seat)
                self._leave(seat)

    def _leave(self, seat: _Seat) -> None:
        """Free the row of a seat; what it was prefilled with stays known. The caller holds `_changing`."""
        if seat.row is not None:
            row = self._rows[seat.row]
            row.seat = None
            if seat.settled:  # else the row holds what it held before
                row.ids, row.runs = seat.request.ids[: seat.known], seat.request.runs
            self._seats.remove(seat)
            seat.row = None

    def _next(self, seat: _Seat) -> Token | None:
        """The next token of a request, or None behind its last. Raises what ended it."""
        while not seat.told:
            if seat.error is not None:
                raise seat.error
            if seat.decoding.done:
                return None
            with self._stepping:
                if not (seat.told or seat.error or seat.decoding.done):  # by whom it had to wait for
                    self._advance()
        return seat.told.popleft()

    def _advance(self) -> None:
        """One boundary: let requests in, prefill a chunk for one of them, and step with all that are ready."""
        with self._changing:
            while self._waiting and any(row.seat is None for row in self._rows):
                self._enter(self._waiting.popleft())
            seats = list(self._seats)
        room = self._chunk
        while joining := self._joining([seat for seat in seats if not seat.prefilled and seat.error is None], room):
            room -= len(joining) * max(map(self._piece, joining))
            self._guarded(joining, partial(self._prefill, joining))
        ready = [seat for seat in seats if seat.prefilled and not seat.decoding.done and seat.error is None]
        if ready:
            self._guarded(ready, partial(self._step, ready))

    def _enter(self, seat: _Seat) -> None:
        """Give a request a row: of the free ones that which holds most of it, the lowest of equal ones."""
        free = [index for index, row in enumerate(self._rows) if row.seat is None]
        seat.row = max(free, key=lambda index: (self._held(seat, index), -index))
        self._rows[seat.row].seat = seat
        self._seats.append(seat)

    def _held(self, seat: _Seat, index: int) -> int:
        """How many of a request's ids a row holds, whoever has it; -1 with another image."""
        row = self._rows[index]
        if seat.image is not None and seat.image is not row.image():
            return -1
        if row.seat is None or row.seat is seat:
            return seat.request.known(row.ids, row.runs)
        return seat.request.known(row.seat.request.ids[: row.seat.known], row.seat.request.runs)

    def _settle(self, seat: _Seat) -> None:
        """Give a request's row its image, and what another row has already prefilled for it."""
        target = seat.row
        if seat.settled or target is None:
            return
        held = [self._held(seat, index) for index in range(len(self._rows))]
        source = max(range(len(held)), key=held.__getitem__)
        row, known = self._rows[target], max(0, held[target])
        aside = self._aside(seat)
        if seat.image is not row.image():
            self._keep(target)
        if held[source] > held[target] and held[source] >= aside:
            self._slots.copy(source, target, held[source], image=held[target] < 0)
            known = held[source]
        elif seat.image is not None:
            if held[target] < 0:
                self._slots.load(target, seat.image)
            if aside > known:
                self._kept[seat.image].cache.restore(target, aside)
                known = aside
        row.ids, row.runs = seat.request.ids[:known], seat.request.runs
        if seat.image is not None:
            row.image = ref(seat.image)
        seat.known = seat.reused = known
        seat.settled = True

    def _keep(self, index: int) -> None:
        """Put aside what a row holds of its image, up to its latest question, unless it is elsewhere, too."""
        row = self._rows[index]
        image, worth = row.image(), max((end for end in row.runs[:-1] if end <= len(row.ids)), default=0)
        if image is None or not (row.ids[:worth] < 0).any():  # a row of text keeps the image that was loaded
            return
        others = [(each.ids, each.runs) for each in self._rows if each is not row and each.image() is image]
        if (kept := self._kept.get(image)) is not None:
            others.append((kept.ids, kept.runs))
        if worth > max((shared_runs(row.ids, row.runs, *other) for other in others), default=0):
            cache = self._slots.keep(index, worth)
            if cache is not None:
                self._kept[image] = _Kept(row.ids[:worth].copy(), row.runs, cache)

    def _aside(self, seat: _Seat) -> int:
        """How many of a request's ids are put aside."""
        kept = None if seat.image is None else self._kept.get(seat.image)
        return 0 if kept is None else seat.request.known(kept.ids, kept.runs)

    def kept_bytes(self, image: Image[Any]) -> int:
        """Bytes that are put aside for an image."""
        kept = self._kept.get(image)
        return 0 if kept is None else kept.cache.nbytes

    def _joining(self, seats: list[_Seat], room: int) -> list[_Seat]:
        """Of those that are to be prefilled, by arrival, those that share the next run: the first that `room` tokens
        suffice for, and all whose next piece is about as long, as far as they do. Their rows have their image
        afterwards."""
        together = list[_Seat]()
        for index, seat in enumerate(seats):
            if not seat.settled and not self._is_due(seat, seats[:index]):
                continue
            self._guarded([seat], partial(self._settle, seat))
            if seat.row is None or seat.prefilled:  # an error, or another row had all of it
                continue
            pieces = [self._piece(each) for each in [*together, seat]]
            if 2 * min(pieces) > max(pieces) and max(pieces) * len(pieces) <= room:
                together.append(seat)
        return together

    def _is_due(self, seat: _Seat, ahead: list[_Seat]) -> bool:
        """Whether nobody ahead is about to prefill more of a request than there is now: a copy is sooner there."""
        others = [each.request for each in ahead if each.image is seat.image]
        coming = [seat.request.known(other.ids[:-1], other.runs) for other in others]
        held = max(self._held(seat, row) for row in range(len(self._rows)))
        return max(coming, default=0) <= max(held, self._aside(seat))

    def _piece(self, seat: _Seat) -> int:
        """How many tokens of a request come next: to the end of a run, a chunk at most. The pieces are the same
        whatever happens to be known."""
        for begin, end in pairwise((0, *seat.request.runs)):
            if seat.known < end:
                return min(end - seat.known, self._chunk - (seat.known - begin) % self._chunk)
        return 0

    def _prefill(self, seats: list[_Seat]) -> None:
        """The next piece of one request in its own row, or of several side by side."""
        pieces = {seat.row: seat.request.ids[seat.known : seat.known + self._piece(seat)] for seat in seats}
        rows, longest = max(row for row in pieces if row is not None) + 1, max(map(len, pieces.values()))
        room = self._slots.first(rows).capacity - longest
        lengths = [self._length(row) for row in self._rows]
        with self._timed("prefill", seats):
            if 2 * len(seats) > rows and max(lengths) <= room:
                self._slots.length[:] = lengths
                ids, valid = np.zeros((rows, longest), np.int64), np.zeros(rows, np.int64)
                for row, piece in pieces.items():
                    ids[row, : len(piece)], valid[row] = piece, len(piece)
                self._slots.first(rows).run(ids, lengths=valid)
            else:
                for seat in seats:
                    assert seat.row is not None
                    decoder = self._slots.row(seat.row)
                    decoder.length[:] = seat.known
                    decoder.run(pieces[seat.row][None])
        for seat in seats:
            seat.known += len(pieces[seat.row])

    def _length(self, row: _Row) -> int:
        """Tokens that count in a row; who writes behind them does no harm."""
        if row.seat is None or not row.seat.settled:
            return len(row.ids)
        return row.seat.known + row.seat.decoding.fed

    def _step(self, seats: list[_Seat]) -> None:
        """One step of the lowest rows that hold all of these seats; whoever else is among them stays as it is."""
        by_row = {seat.row: seat for seat in seats if seat.row is not None}
        if not by_row:  # all have left meanwhile
            return
        rows = max(by_row) + 1
        self._slots.length[:] = [self._length(row) for row in self._rows]
        tokens, budgets = np.zeros((rows, 1), np.int64), np.zeros(rows, np.int64)
        for index, seat in by_row.items():
            tokens[index], budgets[index] = seat.decoding.latest, seat.request.page_budget
        with self._timed("decode", seats):
            step = self._slots.first(rows).run(tokens, budgets)
        self.steps += 1
        for index, seat in by_row.items():
            self._guarded([seat], partial(self._take, seat, step.rows(slice(index, index + 1))))

    @contextmanager
    def _timed(self, stage: str, seats: list[_Seat]) -> Iterator[None]:
        """Count the time of a block for each of these: what they share takes all of it."""
        started = perf_counter()
        try:
            yield
        finally:
            device_ms = self._model.device_ms()
            for seat in seats:
                seat.decoding.clock.add(stage, 1000 * (perf_counter() - started), device_ms)

    def _take(self, seat: _Seat, step: Step) -> None:
        """What a step says to one of its rows."""
        told = seat.decoding.take(step)
        if seat.decoding.done:
            with self._changing:
                self._leave(seat)
        seat.told.append(told)

    def _guarded(self, seats: list[_Seat], work: Callable[[], None]) -> None:
        """An error of a run ends those it was for, and nobody else."""
        try:
            work()
        except FlexError as error:
            for seat in seats:
                seat.error = error
                with self._changing:
                    self._leave(seat)
