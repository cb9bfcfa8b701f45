"""Turns signals that end the process into exceptions with exit codes, so that cleaning up happens."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
_REQUESTS = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
WORDS = {128 + number: f"ended by {number.name}" for number in _REQUESTS} | {INTERRUPTED: "interrupted"}
"""What the last line says, by exit code."""


@contextmanager
def requests_raise() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `SystemExit` with 128 and their number, as Ctrl-C raises `KeyboardInterrupt`.

    One that is ignored, as `nohup` has it, stays ignored; so does a second one while the first is cleaned up after.
    """

    def end(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {}
    with contextlib.suppress(ValueError):  # not in the main thread, which alone receives signals
        for number in _REQUESTS:
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
