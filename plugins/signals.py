"""How a command that writes files ends when the system asks it to: as after Ctrl-C, so that it cleans up."""

from __future__ import annotations

import signal
from types import FrameType

# Asked to end, and: its terminal was closed. Not every system has the second.
ENDINGS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def interrupt_when_asked_to_end() -> None:
    """From now on SIGTERM and SIGHUP raise KeyboardInterrupt in the main thread, once: a terminal that closes, or a
    service manager, sends several, and the second must not end the cleaning up. A signal that is ignored, as nohup has
    SIGHUP, stays ignored. For command lines: call it in the main thread."""
    for each in ENDINGS:
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    for each in ENDINGS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt
