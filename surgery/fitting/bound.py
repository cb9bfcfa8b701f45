"""A bound on the memory of a run: estimated before anything is written, and measured while it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from surgery.disk.aside import FEWEST
from surgery.errors import MemoryLimitError, PlanError
from surgery.util import progress
from surgery.util.wording import size

EVERY = 0.05  # seconds between two measurements
LARGEST = 8  # bytes that a fit takes at once for each element of the largest tensor: its gradient, twice
KEPT = 1  # things that a fit keeps of each tensor and that stay in memory, as they are too small for a file
WRITTEN = 4  # bytes that are held at once for each element of a tensor that is compared and written
RUNNING = 300_000_000  # bytes of outputs, of what a backward pass keeps, and of what the allocator keeps
ALL = 16  # bytes for each element of all tensors, where everything that a fit makes is kept in memory


def anonymous() -> int:
    """Bytes that this process holds besides pages of files."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import psutil

    return psutil.Process().memory_info().rss


def fits(elements: Sequence[int], memory: int, *, lossless: bool = False) -> bool:
    """Whether a fit of some tensors fits into memory without files.

    Args:
        elements: of each tensor of all members.
        memory: bytes that the process may hold.
        lossless: whether nothing is rounded, so that weights stay in their files.

    Raises:
        PlanError: where it fits with files neither.
    """
    now, largest = anonymous(), max(elements, default=0)
    least = now + taken(elements, lossless=lossless)
    if least > memory:
        raise PlanError(
            f"A fit of members whose largest tensor has {largest:,} elements takes about {size(least)} of memory, "
            f"but `memory` is {size(memory)}; {_enough(least)}."
        )
    return lossless or now + ALL * sum(elements) + RUNNING <= memory


def taken(elements: Sequence[int], *, lossless: bool = False) -> int:
    """Bytes that a fit takes besides what the process holds before, with what it makes in files.

    Args:
        elements: of each tensor of all members.
        lossless: whether nothing is rounded, so that weights stay in their files.

    Example:
        >>> taken([10**8]) < 2 * 10**9
        True
    """
    largest = max(elements, default=0)
    if lossless:
        return WRITTEN * largest + RUNNING
    return LARGEST * largest + KEPT * sum(min(4 * count, FEWEST) for count in elements) + RUNNING


def _enough(least: int) -> str:
    """What to give where that many bytes are needed."""
    return f"give `memory={-(-least // 10**6)}MB` or more"


class _Watched:
    """A reporter of progress that ends a run which has gone beyond its bound, where it says how far it is."""

    def __init__(self, inner: progress.Reporter | None, limit: int, follows: Callable[[], int] | None):
        self.inner, self.limit, self.follows, self.peak = inner, limit, follows, 0

    def _check(self) -> None:
        if self.peak > self.limit:
            peak, self.peak = self.peak, 0  # what cleans up reports progress too
            advice = (
                "give more, take fewer members at a time, or an error of 0, which leaves weights in their files"
                if self.follows is None
                else f"what follows takes about {size(more := self.follows())} besides, so {_enough(peak + more)}"
            )
            raise MemoryLimitError(
                f"`memory` is {size(self.limit)}, but {size(peak)} were held (the last step was: {progress.latest()}): "
                f"{advice}."
            )

    def start(self, description: str, total: float | None) -> object:
        self._check()
        return self.inner.start(description, total) if self.inner else None

    def advance(self, key: object, steps: float) -> None:
        if self.inner:
            self.inner.advance(key, steps)
        self._check()

    def describe(self, key: object, description: str) -> None:
        if self.inner:
            self.inner.describe(key, description)
        self._check()

    def finish(self, key: object) -> None:
        if self.inner:
            self.inner.finish(key)


@contextmanager
def within(memory: int | None, follows: Callable[[], int] | None = None) -> Iterator[None]:
    """Inside, a run that holds more than `memory` bytes ends at its next step.

    Args:
        memory: bytes; None for no bound.
        follows: gives the bytes that later steps take besides, so that the error says how many are enough.

    Raises:
        MemoryLimitError: naming the step.
    """
    if memory is None:
        yield
        return
    watched, done = _Watched(progress.reporter(), memory, follows), threading.Event()
    watched.peak = anonymous()  # the first step may be over before the thread looks

    def watch() -> None:
        while not done.wait(EVERY):
            watched.peak = max(watched.peak, anonymous())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        with progress.reporting(watched):
            yield
    finally:
        done.set()
        thread.join()
