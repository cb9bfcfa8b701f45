"""What all benchmarks share: options, a header that says how a result came about, timing in turns, printing.

Importing this does not import torch, so that a benchmark may start processes from a small one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

PACKAGES = ("torch", "transformers", "timm", "safetensors")


@dataclass(frozen=True)
class Timing:
    """Seconds of one competitor: the median over rounds, and the fastest and slowest round."""

    median: float
    fastest: float
    slowest: float


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn at random")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of PyTorch")
    parser.add_argument("--fast", action="store_true", help="tiny models and few rounds: does it run at all?")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return parser


def make_header(name: str, options: argparse.Namespace, argv: Sequence[str] | None) -> dict[str, Any]:
    """Command, date, versions and threads of a run."""
    arguments = sys.argv[1:] if argv is None else argv
    return {
        "command": " ".join([f"python -m benchmarks.{name}", *arguments]),
        "date": date.today().isoformat(),
        "python": sys.version.split()[0],
        **{package: version(package) for package in PACKAGES},
        "threads": options.threads,
        "seed": options.seed,
    }


def run_cells(
    run: Callable[..., dict[str, Any]],
    cells: Sequence[tuple[Any, ...]],
    jobs: int,
    kept: Path | None,
    minutes: float | None = None,
) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Run cells of a table in processes, the first ones first, and keep each as it ends.

    Args:
        run: of a module; what it returns is JSON.
        cells: its arguments.
        jobs: processes at a time.
        kept: a file that finished cells are added to, a line each, and not run again from; none for no file.
        minutes: after which no cell begins; None for no end.

    Returns:
        what was found, by cell; without those that did not begin or failed.
    """
    done: dict[str, dict[str, Any]] = {}
    if kept is not None and kept.exists():
        done = dict(map(json.loads, kept.read_text("utf-8").splitlines()))
    end = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    for cell, result in in_processes(run, [cell for cell in cells if str(cell) not in done], jobs, end):
        done[str(cell)] = result
        if kept is not None:
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps([str(cell), result]) + "\n")
        print(f"{cell} is done", file=sys.stderr, flush=True)
    return {cell: done[str(cell)] for cell in cells if str(cell) in done}


def in_processes(
    run: Callable[..., dict[str, Any]], cells: Iterable[tuple[Any, ...]], jobs: int, end: float
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Cells with what was found, as each ends; one that fails is said, and the others go on.

    Args:
        run: of a module.
        cells: its arguments; the first ones begin first.
        jobs: processes at a time.
        end: by `time.monotonic`, after which no cell begins.
    """
    left, running = iter(cells), dict[Future[dict[str, Any]], tuple[Any, ...]]()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        while True:
            while len(running) < jobs and time.monotonic() < end and (cell := next(left, None)) is not None:
                running[pool.submit(run, *cell)] = cell
            if not running:
                return
            for each in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(each)
                if (error := each.exception()) is None:
                    yield cell, each.result()
                else:
                    said = f"{cell} failed: {type(error).__name__}: {error}"
                    print(said[:800], file=sys.stderr, flush=True)


def add_cell_options(parser: argparse.ArgumentParser, kept: str) -> None:
    """Options of a table whose cells are runs of a recipe.

    Args:
        parser: of the benchmark.
        kept: name of the file that finished runs are kept in, by default.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=None, help="begin no run after so many")
    parser.add_argument("--kept", type=Path, default=Path(kept), help="where finished runs are kept")


def take_turns(
    competitors: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1, device: str = "cpu"
) -> dict[str, Timing]:
    """Time competitors in turns, so that what slows the machine down for a while slows down all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for turn in range(rounds + warm_up):
        for name, competitor in competitors.items():
            elapsed = _time_one(competitor, device)
            if turn >= warm_up:
                seconds[name].append(elapsed)
    return {name: Timing(median(each), min(each), max(each)) for name, each in seconds.items()}


def _time_one(competitor: Callable[[], object], device: str) -> float:
    """Seconds of one call, everything that it started on a device finished."""
    _finish(device)
    start = time.perf_counter()
    competitor()
    _finish(device)
    return time.perf_counter() - start


def _finish(device: str) -> None:
    if device != "cpu":
        import torch

        torch.accelerator.synchronize()


def show(
    title: str,
    header: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    verdicts: Sequence[str],
    as_json: bool,
) -> None:
    """Print a header, one table with a row for each result, and what the numbers say."""
    if as_json:
        document = {"title": title, "header": header, "results": list(results), "verdicts": list(verdicts)}
        print(json.dumps(document, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(150, Console().width), highlight=False)
    console.print(", ".join(f"{key} {value}" for key, value in header.items() if key != "command"))
    console.print(f"$ {header['command']}", style="bold")
    table = Table(title=title)
    for name, value in (results[0] if results else {"nothing has ended yet": ""}).items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for result in results:
        table.add_row(*(cell(value) for value in result.values()))
    console.print(table)
    for verdict in verdicts:
        console.print(verdict)


def cell(value: Any) -> str:
    """A value as a table shows it.

    Example:
        >>> cell(0.01234), cell(1234567), cell(None)
        ('0.0123', '1,234,567', '-')
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 100
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )


def judge(what: str, found: float, limit: float, unit: str = "") -> str:
    """One sentence on whether a figure keeps to its limit."""
    verdict = "met" if found <= limit else "MISSED"
    return f"{what}: {found:.3g}{unit}, required at most {limit:g}{unit}: {verdict}"


def write_csv(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Results as CSV, one line each."""
    import csv

    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in results for name in row)))
        writer.writeheader()
        writer.writerows(results)
