"""Bounds the time and memory of one tier of tracing."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_EVERY = 16  # calls between two looks at the memory, which cost more than a look at the clock


class OutOfBoundsError(Exception):
    """A trace hit its bound; never seen outside of tracing."""


@dataclass(frozen=True)
class Bounds:
    """What one way of tracing may take.

    Attributes:
        seconds: of wall time.
        memory: GiB by which the process may grow.
    """

    seconds: float = 120.0
    memory: float = 16.0


class Watch:
    """Looks at clock and memory while a module is traced.

    Example:
        >>> Watch(Bounds(seconds=10)).check()
    """

    def __init__(self, bounds: Bounds):
        self.bounds, self.calls = bounds, 0
        self.began, self.resident = time.monotonic(), _resident()

    def check(self) -> None:
        """Raise where a bound is hit.

        Raises:
            OutOfBoundsError: saying which.
        """
        if time.monotonic() - self.began > self.bounds.seconds:
            raise OutOfBoundsError(f"took more than {self.bounds.seconds:g} s")
        self.calls += 1
        if self.calls % _EVERY == 0 and _resident() - self.resident > self.bounds.memory * 2**30:
            raise OutOfBoundsError(f"took more than {self.bounds.memory:g} GiB of memory")


def _resident() -> int:
    """Resident bytes of this process; 0 where the system does not tell, so that memory has no bound there."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0
