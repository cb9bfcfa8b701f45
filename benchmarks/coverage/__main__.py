"""`python -m benchmarks.coverage`: try every implementation of timm, torchvision and transformers.

    python -m benchmarks.coverage                               all three libraries, about half an hour on 2 cores
    python -m benchmarks.coverage --library timm --limit 20
    python -m benchmarks.coverage --resume                      go on where an earlier run stopped
    python -m benchmarks.coverage --library transformers --only bert llama --out /tmp/coverage

Writes DIR/coverage.csv line by line and DIR/coverage.md at the end; DIR is docs/ unless --out says otherwise.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.coverage import catalogue, row, table
from benchmarks.coverage.check import try_model
from benchmarks.coverage.pool import Limits, run_each

DOCS = Path(__file__).parents[2] / "docs"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code is 0 whatever the models do."""
    options = _parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    csv = options.out / "coverage.csv"
    libraries = options.library or list(row.LIBRARIES)
    catalogue.preload(libraries)
    chosen = _choose(options, libraries)
    known = row.read(csv)
    if options.resume:
        again = {(entry.library, entry.model) for entry in chosen} if options.retry else set()
        known = [r for r in known if r.status != "failed" or (r.library, r.model) not in again]
        tried = {(r.library, r.model) for r in known}
        chosen = [entry for entry in chosen if (entry.library, entry.model) not in tried]
    else:  # other libraries' rows stay
        again = {(entry.library, entry.model) for entry in chosen} if options.only else set()
        known = [
            r
            for r in known
            if (r.library, r.model) not in again and (options.only or r.library not in libraries)
        ]
    row.write(csv, known) if known else csv.unlink(missing_ok=True)
    _try(chosen, csv, Limits(options.seconds, options.memory), options.jobs)
    words = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python -m benchmarks.coverage", *map(shlex.quote, words)])
    text = table.page(row.read(csv), command)
    (options.out / "coverage.md").write_text(text, encoding="utf-8")
    print(text.partition("\n## ")[0].partition("\n| library")[2].join(["| library", ""]))
    return 0


def _try(chosen: list[catalogue.Entry], csv: Path, limits: Limits, jobs: int) -> None:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns) as progress:
        task = progress.add_task("Trying models", total=len(chosen))
        for outcome in run_each(_work, chosen, limits, jobs):
            entry = outcome.item
            found = (
                row.Row(entry.library, entry.model, entry.implementation, cause=outcome.failure)
                if outcome.result is None
                else row.Row(**outcome.result)
            )
            row.append(csv, found)
            if found.status == "failed":
                progress.console.print(f"{found.library} {found.model}: {found.cause}"[:300], markup=False)
            progress.advance(task)


def _work(entry: catalogue.Entry) -> dict:
    return asdict(try_model(entry))


def _choose(options: argparse.Namespace, libraries: list[str]) -> list[catalogue.Entry]:
    """What is to be tried. Models are built to see what they are made of: in a process of its own."""
    if options.only:
        return [catalogue.Entry(library, name) for library in libraries for name in options.only]
    chosen: list[catalogue.Entry] = []
    for outcome in run_each(_list, [(library, options.all) for library in libraries], Limits(1800, 16)):
        if outcome.result is None:
            raise SystemExit(f"The models of {outcome.item[0]} could not be listed: {outcome.failure}")
        found = [catalogue.Entry(**entry) for entry in outcome.result]
        print(f"{outcome.item[0]}: {len(found)} {'models' if options.all else 'implementations'}")
        chosen += found[: options.limit]
    return chosen


def _list(item: tuple[str, bool]) -> list[dict]:
    return [asdict(entry) for entry in catalogue.entries(*item)]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coverage",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--library", action="append", choices=row.LIBRARIES, help="default: all; repeatable")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N models of each library")
    parser.add_argument("--resume", action="store_true", help="leave out what the CSV has already")
    parser.add_argument("--retry", action="store_true", help="with --resume: try again what failed")
    parser.add_argument("--all", action="store_true", help="every model, not one for each implementation")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models alone")
    parser.add_argument("--seconds", type=float, default=180, help="limit for one model (default 180)")
    parser.add_argument(
        "--memory", type=float, default=12, metavar="GIB", help="limit for one model (default 12)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="models at a time (default 1)")
    parser.add_argument("--out", type=Path, default=DOCS, metavar="DIR", help="default: docs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
