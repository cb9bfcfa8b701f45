"""The progress display on a terminal: one line for each task, removed when the task ends.

A line is made for the width that there is: what is being done gives way first, then the bar; the clock never breaks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

PATIENCE = 0.4  # seconds before anything is shown: a command that is done by then needs no sign of life
SETTLED = 3.0  # seconds of work from which the time that is left can be estimated
MOST = 3  # tasks shown at once, the innermost
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
BAR = 24  # columns of a bar, where there is room


@dataclass
class Job:
    """One task on the screen.

    Attributes:
        description: what is being done.
        total: number of steps, where known.
        done: steps so far.
        began: `time.monotonic` of its start.
        first: steps and time at the first advance, from which the rate is counted: a resumed run begins far on.
    """

    description: str
    total: float | None
    done: float = 0.0
    began: float = field(default_factory=time.monotonic)
    first: tuple[float, float] | None = None

    def advance(self, steps: float, now: float) -> None:
        """Come `steps` further."""
        self.done += steps
        self.first = self.first or (self.done, now)

    def left(self, now: float) -> float | None:
        """Seconds until it is done; None while nothing can be estimated."""
        if self.total is None or self.first is None:
            return None
        steps, since = self.done - self.first[0], now - self.first[1]
        return (self.total - self.done) * since / steps if steps > 0 and since >= SETTLED else None


def line(job: Job, width: int, now: float) -> Text:
    """A task in one line of at most `width` columns.

    Example:
        >>> str(line(Job("Fitting", None, began=0.0), 40, 75.0)).split()[1:]
        ['Fitting', '1:15']
    """
    spinner = SPINNER[int(now * 10) % len(SPINNER)]
    end = clock(now - job.began)
    if (left := job.left(now)) is not None:
        end = f"{end}, {clock(left)} left"
    if job.total and job.done:
        part = min(job.done / job.total, 1.0)
        end = f"{part:4.0%}  {end}"
        if (room := min(BAR, width - 28 - len(end))) >= 8:
            filled = round(part * room)
            bar = Text.assemble(("━" * filled, "cyan"), ("━" * (room - filled), "dim"), "  ", end)
        else:
            bar = Text(end)
    else:
        bar = Text(end)
    words = width - cell_len(bar.plain) - 4
    if words < 8:
        return Text(f"{spinner} {job.description}"[:width], no_wrap=True, overflow="crop")
    fits = cell_len(job.description) <= words
    shown = job.description if fits else set_cell_size(job.description, words - 1) + "…"
    return Text.assemble(spinner, " ", shown, "  ", bar, no_wrap=True, overflow="crop")


def clock(seconds: float) -> str:
    """A time, as short as it can be.

    Example:
        >>> clock(75), clock(3675)
        ('1:15', '1:01:15')
    """
    minutes, rest = divmod(max(int(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Screen:
    """A `surgery.util.progress.Reporter` that shows tasks on a terminal, or that the command is starting."""

    def __init__(self, console: Console):
        self._console, self._jobs = console, {0: Job("Starting", None)}
        self._next, self._lock, self._live = 1, threading.RLock(), None
        self._closed = False
        self._wait()

    def start(self, description: str, total: float | None) -> object:
        """See `surgery.util.progress.Reporter`."""
        with self._lock:
            key, self._next = self._next, self._next + 1
            self._jobs[key] = Job(description, total)
            self._jobs[0].description = "Working"
        return key

    def advance(self, key: object, steps: float) -> None:
        """See `surgery.util.progress.Reporter`."""
        with self._lock:
            self._jobs[key].advance(steps, time.monotonic())  # type: ignore[index]

    def describe(self, key: object, description: str) -> None:
        """See `surgery.util.progress.Reporter`."""
        with self._lock:
            self._jobs[key].description = description  # type: ignore[index]

    def finish(self, key: object) -> None:
        """See `surgery.util.progress.Reporter`."""
        with self._lock:
            del self._jobs[key]  # type: ignore[arg-type]

    def pause(self) -> None:
        """Take everything off the screen, for `PATIENCE` seconds at least."""
        self._timer.cancel()
        with self._lock:
            live, self._live = self._live, None
        if live is not None:
            live.stop()
        if not self._closed:
            self._wait()

    def close(self) -> None:
        """Take everything off the screen, for good."""
        self._closed = True
        self.pause()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._lines(options.max_width)

    def _lines(self, width: int) -> Iterator[Text]:
        with self._lock:
            jobs = list(self._jobs.values())
        now = time.monotonic()
        for job in (jobs[1:] or jobs)[-MOST:]:
            yield line(job, width, now)

    def _wait(self) -> None:
        self._timer = threading.Timer(PATIENCE, self._open)
        self._timer.daemon = True
        self._timer.start()

    def _open(self) -> None:
        with self._lock:
            if self._closed or self._live is not None:
                return
            self._live = Live(
                self, console=self._console, transient=True, refresh_per_second=8, redirect_stdout=False
            )
            self._live.start(refresh=True)
