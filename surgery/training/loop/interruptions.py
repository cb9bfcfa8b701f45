"""Defers Ctrl-C and termination requests to the end of a step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_REQUESTS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop; where it has a folder, its state is saved there.

    Attributes:
        number: of the signal that asked.
    """

    def __init__(self, number: int = signal.SIGINT):
        super().__init__()
        self.number = number


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Gathers requests to stop instead of raising them, so that a step is finished first; a second one ends at once.

    A hangup that is ignored, as `nohup` has it, stays ignored.
    """
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if not asked:
            asked.append(number)
        elif callable(handler := before[signal.Signals(number)]):  # of whoever called
            handler(number, frame)
        else:
            raise KeyboardInterrupt

    before: dict[signal.Signals, Any] = {}
    try:
        for number in _REQUESTS:
            if number is signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, ask)
    except ValueError:  # not in the main thread, which alone receives signals
        before = {}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
