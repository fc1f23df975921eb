"""`--fit`: the choices with which a configuration fits, what each of them gives, and which board holds it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from engines.sizing.choices import Choice, made, without
from engines.sizing.fit import (
    Assessment,
    Room,
    changes,
    choices_for,
    larger_than,
    measured,
    require_served,
    room_of,
)
from engines.sizing.needs import Configuration


@dataclass(frozen=True)
class Gain:
    """What a choice gives where it was made: what all the others together would lack without it.

    words: of the command line. request, builder: bytes it saves. faster: tokens per second at most that it adds to the
    slowest step, None when the bandwidth is unknown.
    """

    choice: Choice
    words: str
    request: int
    builder: int
    faster: float | None


@dataclass(frozen=True)
class Fitting:
    """A configuration made to fit. asked: what it was. assessment: of what fits, or of the smallest where none does.
    gains: of the choices made, none where none does. larger: the smallest target of the same kind that can be fitted
    where this one cannot."""

    asked: Configuration
    assessment: Assessment
    gains: tuple[Gain, ...]
    larger: str | None


def fit(c: Configuration, room: Room, kept: Collection[str] = ()) -> Fitting:
    """The choices with which `c` fits, builder and all, each of them needed; the smallest there is where none does.

    kept: knobs of the choices (engines.sizing.choices) that are not to be touched. OptionError when the target does
    not serve the precision.
    """
    require_served(c, room)
    choices = choices_for(c, room, kept)
    assessment = measured(made(c, choices), room)
    larger = None
    if not assessment.fits:
        rooms = map(room_of, larger_than(room))
        holds = (
            each
            for each in rooms
            if each.serves(c.precision) and measured(made(c, choices_for(c, each, kept)), each).fits
        )
        larger = next((each.name for each in holds), None)
    gains = tuple(_gain(c, choices, each, assessment) for each in choices) if assessment.fits else ()
    return Fitting(c, assessment, gains, larger)


def _gain(c: Configuration, choices: tuple[Choice, ...], choice: Choice, a: Assessment) -> Gain:
    other = measured(made(c, without(choices, choice)), a.room)
    faster = a.speed[0] - other.speed[0] if a.speed and other.speed else None
    words = changes(other.configuration, a.configuration)
    return Gain(choice, words, other.total - a.total, other.builder - a.builder, faster)
