"""What the verbs print: tables and sentences on stdout, progress and errors on stderr, or one JSON
document."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Task as ProgressTask
from rich.table import Table
from rich.text import Text

from surgery.progress import reporting

PATIENCE = 2.0  # seconds of work before progress is shown

FIRST = os.environ.get("RANK", "0") == "0"  # of several processes one speaks

WIDE = 160  # columns where the output is no terminal

interrupted = "nothing was left half-written"  # what the last line says after Ctrl-C

out = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE)
err = Console(stderr=True, highlight=False)


def size(amount: float) -> str:
    """Bytes for people, in powers of ten.

    Example:
        >>> size(90_868_376)
        '90.9 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def count(number: int) -> str:
    """A number of parameters for people.

    Example:
        >>> count(22_713_216), count(384)
        ('22.7M', '384')
    """
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= max(limit, 1e4):
            return f"{number / limit:.1f}{unit}"
    return str(number)


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction in percent; what is not zero never reads as zero.

    Example:
        >>> percent(0.26), percent(0), percent(1e-7)
        ('26.0%', '0%', '<0.1%')
    """
    if fraction == 0:
        return "0%"
    smallest = 10.0**-digits
    return f"<{smallest:.{digits}f}%" if abs(fraction) * 100 < smallest else f"{fraction * 100:.{digits}f}%"


def shape(sizes: Sequence[int]) -> str:
    """`(384, 1536)` as `384x1536`; a scalar as `-`."""
    return "x".join(map(str, sizes)) or "-"


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table; `>` in front of a column's name aligns it to the right, `~` lets it give way to
    others."""
    made = Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="dim",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in columns:
        right, yields = column.startswith(">"), column.startswith("~")
        made.add_column(column.lstrip(">~"), justify="right" if right else "left", no_wrap=not yields)
    return made


def clipped(text: str) -> Text:
    """Text of one line, for a column that gives way."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def say(text: str = "", style: str | None = None) -> None:
    """One paragraph on stdout."""
    out.print(Text(text, style=style or ""))


def heading(text: str) -> None:
    """A heading with a free line above."""
    out.print()
    out.print(Text(text, style="bold"))


def command(text: str) -> None:
    """A command to paste: never wrapped by the screen."""
    out.print(Text(f"  {text}", style="cyan"), soft_wrap=True)


def emit(document: Any) -> None:
    """The one JSON document of a `--json` run; JSON knows no NaN and no infinity, so these become null."""
    json.dump(_finite(document), sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def working(*, quiet: bool = False, json_wanted: bool = False) -> Iterator[None]:
    """Run library work: progress on stderr, and nothing but ours on stdout when JSON is wanted."""
    reporter = None if quiet or not err.is_terminal or not FIRST else TerminalReporter(err)
    stdout = contextlib.redirect_stdout(sys.stderr) if json_wanted else contextlib.nullcontext()
    with stdout, reporting(reporter):
        try:
            yield
        finally:
            if reporter is not None:
                reporter.close()


class TerminalReporter:
    """Bars with the time left, for tasks that have lasted longer than `PATIENCE`."""

    def __init__(self, console: Console):
        self._progress = _PatientProgress(
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            _TimeLeftColumn(),
            console=console,
            transient=True,
            refresh_per_second=5,
        )
        self._open: set[object] = set()
        self._timer: threading.Timer | None = None

    def start(self, description: str, total: float | None) -> object:
        """See `surgery.progress.Reporter`."""
        if not self._open:
            self._timer = threading.Timer(PATIENCE, self._progress.start)
            self._timer.daemon = True
            self._timer.start()
        key = self._progress.add_task(description, total=total)
        self._open.add(key)
        return key

    def advance(self, key: Any, steps: float) -> None:
        """See `surgery.progress.Reporter`."""
        self._progress.advance(key, steps)

    def describe(self, key: Any, description: str) -> None:
        """See `surgery.progress.Reporter`."""
        self._progress.update(key, description=description)

    def finish(self, key: Any) -> None:
        """See `surgery.progress.Reporter`."""
        self._open.discard(key)
        self._progress.remove_task(key)
        if not self._open:
            self.close()

    def close(self) -> None:
        """Take everything off the screen."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
            self._timer = None
        self._progress.stop()


class _TimeLeftColumn(TimeRemainingColumn):
    """The part done and the time left, for tasks whose number of steps is known."""

    def render(self, task: ProgressTask) -> Text:
        if task.total is None:
            return Text("")
        left = super().render(task) if task.completed else Text("-:--:--")
        return Text.assemble(f"{task.percentage:3.0f}%, ", left, " left")


class _PatientProgress(Progress):
    """Shows no task before its time."""

    def get_renderables(self) -> Iterator[Any]:
        tasks = [task for task in self.tasks if (task.elapsed or 0) >= PATIENCE]
        if tasks:
            yield self.make_tasks_table(tasks)
