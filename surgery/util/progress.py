"""Progress of long work, reported to whoever listens; silent by default.

Library code wraps its long loops in `track` or `task` and imports no terminal library for it. A program
that wants to show progress, such as the command line, installs a `Reporter` with `reporting`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

T = TypeVar("T")


class Reporter(Protocol):
    """Who shows progress. Each task has a key that `start` returns; tasks may be nested."""

    def start(self, description: str, total: float | None) -> object:
        """A task begins; `total` is its number of steps, where known. Returns the task's key."""
        ...

    def advance(self, key: object, steps: float) -> None:
        """A task has come `steps` further."""
        ...

    def describe(self, key: object, description: str) -> None:
        """A task is now doing something that is better said in other words."""
        ...

    def finish(self, key: object) -> None:
        """A task has ended, or was given up."""
        ...


_latest = ""
_reporter: ContextVar[Reporter | None] = ContextVar("surgery_progress", default=None)


class Task:
    """One piece of work under way."""

    def __init__(self, reporter: Reporter | None, key: object):
        self._reporter, self._key = reporter, key

    def advance(self, steps: float = 1) -> None:
        """Say that the work has come `steps` further."""
        if self._reporter is not None:
            self._reporter.advance(self._key, steps)

    def describe(self, description: str) -> None:
        """Say in other words what the work is doing now."""
        _note(description)
        if self._reporter is not None:
            self._reporter.describe(self._key, description)


def _note(description: str) -> None:
    global _latest
    _latest = description


def latest() -> str:
    """What was begun last, by its description: what a program was at when it had to stop."""
    return _latest


def reporter() -> Reporter | None:
    """Who is shown progress now."""
    return _reporter.get()


@contextmanager
def task(description: str, total: float | None = None) -> Iterator[Task]:
    """Report a piece of work.

    Args:
        description: what is being done, a few words.
        total: number of steps, where known.

    Example:
        >>> with task("Fitting banks", total=3) as work:
        ...     work.advance(2)
    """
    _note(description)
    reporter = _reporter.get()
    if reporter is None:
        yield Task(None, None)
        return
    key = reporter.start(description, total)
    try:
        yield Task(reporter, key)
    finally:
        reporter.finish(key)


def track(iterable: Iterable[T], description: str, total: float | None = None) -> Iterator[T]:
    """Iterate, one step of progress for each item that was worked on.

    Args:
        iterable: the work's items.
        description: what is being done, a few words.
        total: number of items, where it is not `len(iterable)`.

    Example:
        >>> list(track("ab", "Counting"))
        ['a', 'b']
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with task(description, total) as work:
        for item in iterable:
            yield item
            work.advance()


@contextmanager
def reporting(reporter: Reporter | None) -> Iterator[None]:
    """Show the progress of all work inside to `reporter`; None silences it."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)
