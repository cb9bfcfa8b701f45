"""Prints tables and sentences on stdout, progress and errors on stderr, or one JSON document."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from surgery.util.progress import reporting
from surgery.util.text import printable
from surgery.util.wording import count as count
from surgery.util.wording import percent as percent
from surgery.util.wording import size as size

from .screen import Screen

FIRST = os.environ.get("RANK", "0") == "0"  # of several processes one speaks

WIDE = 160  # columns where the output is no terminal

typed: list[str] = []  # the arguments of the command that is running

interrupted = "nothing was left half-written"  # what the last line says after Ctrl-C

out = Console(
    highlight=False, markup=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE
)
err = Console(stderr=True, highlight=False, markup=False)


class _Printable:
    """Anything with its control characters written out; what styles it stays."""

    def __init__(self, inner: ConsoleRenderable):
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style, control in console.render(self.inner, options):
            yield Segment(text if control else printable(text), style, control)


class _PrintableHook(RenderHook):
    """Names and texts come from files of anybody, and a terminal obeys control characters."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Printable(each) for each in renderables]


for each in (out, err):
    each.push_render_hook(_PrintableHook())


def shape(sizes: Sequence[int]) -> str:
    """`(384, 1536)` as `384x1536`; a scalar as `-`."""
    return "x".join(map(str, sizes)) or "-"


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table; `>` in front of a column's name aligns it to the right, `~` lets it give way to others."""
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


def show(*what: Any) -> None:
    """Anything on stdout, such as a table."""
    clear()
    out.print(*what)


def say(text: str = "", style: str | None = None) -> None:
    """One paragraph on stdout; a path longer than the screen stays one word, so that it can be copied."""
    lines = [
        textwrap.fill(
            line, out.width, replace_whitespace=False, break_long_words=False, break_on_hyphens=False
        )
        for line in text.split("\n")
    ]
    clear()
    out.print(Text("\n".join(lines), style=style or ""), soft_wrap=True)


def complain(text: str) -> None:
    """One line on stderr."""
    clear()
    err.print(Text(f"surgery: {text}"), soft_wrap=True)


def heading(text: str) -> None:
    """A heading with a free line above."""
    show()
    show(Text(text, style="bold"))


def command(*words: object) -> None:
    """A command to paste, quoted for a shell and never wrapped by the screen.

    Args:
        words: the command's; a single one is a line as it is.
    """
    line = str(words[0]) if len(words) == 1 else shlex.join(str(word) for word in words)
    clear()
    out.print(Text(f"  {line}", style="cyan"), soft_wrap=True)


def again(*more: str) -> str:
    """The command that is running, with other options at its end; these options alone where others launched it.

    Args:
        more: one option with its value, in place of an earlier value.
    """
    if "WORLD_SIZE" in os.environ or not typed:
        return shlex.join(more)
    kept = [word for n, word in enumerate(typed) if word != more[0] and (n == 0 or typed[n - 1] != more[0])]
    return shlex.join(["surgery", *kept, *more])


@contextlib.contextmanager
def going_on(out: str | Path | None) -> Iterator[None]:
    """Inside, a run that may keep a journal; where it is interrupted, the last line says how to go on with it.

    Args:
        out: the folder that is written.
    """
    global interrupted
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        from surgery.disk.claims import work_place
        from surgery.pipeline.going_on import JOURNAL

        if out is not None and (kept := work_place(out) / JOURNAL).is_dir():
            interrupted = f"what was made is in {kept}, go on with {shlex.join(['surgery', *typed])}"
        raise


def emit(document: Any) -> None:
    """The one JSON document of a `--json` run; JSON knows no NaN and no infinity, so these become null."""
    from surgery.util.showing import finite

    clear()
    json.dump(finite(document), sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


@contextlib.contextmanager
def working(*, quiet: bool = False, json_wanted: bool = False) -> Iterator[None]:
    """Run library work: progress on stderr, and nothing but ours on stdout when JSON is wanted."""
    stdout = contextlib.redirect_stdout(sys.stderr) if json_wanted else contextlib.nullcontext()
    with stdout, alive(quiet=quiet):
        yield


@contextlib.contextmanager
def alive(*, quiet: bool = False) -> Iterator[None]:
    """Show on a terminal that work goes on, from `PATIENCE` seconds on; what is shown already is left as it is."""
    if quiet or showing() or not err.is_terminal or not FIRST:
        yield
        return
    screen = Screen(err)
    _screens.append(screen)
    try:
        with reporting(screen):
            yield
    finally:
        _screens.remove(screen)
        screen.close()


def showing() -> bool:
    """Whether progress is on the screen now."""
    return bool(_screens)


def clear() -> None:
    """Take progress off the screen, before something is printed that stays; it comes back where work goes on."""
    for screen in _screens:
        screen.pause()


_screens: list[Screen] = []
