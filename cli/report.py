"""`surgery report`: what a folder holds, and how its training went: tables, pictures, and one page to send."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.errors import first_few

from . import completion
from .options import Debug, Json, Overwrite, Quiet, option

if TYPE_CHECKING:
    from surgery.page import Overview

EXAMPLES = """
surgery report joint
surgery report joint --html
surgery report joint --html page.html
surgery report runs/noisy.training
surgery report runs/noisy --out pictures --json
"""


def report(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DIR",
            show_default=False,
            autocompletion=completion.artifacts,
            help="A folder that surgery merge or surgery train wrote, or the DIR.training of a run that still goes on.",
        ),
    ],
    html: Annotated[
        str | None,
        option(
            "--html",
            "[FILE]",
            "Write one self-contained page, by default DIR.html: size, error, bits, sharing, training.",
        ),
    ] = None,
    out: Annotated[
        str | None,
        option("--out", "DIR", "Where a run's pictures go; by default beside its log."),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Tell what a folder holds: sizes, errors, how tensors are stored, and how a training run went.

    Of a run the pictures are drawn from its log: losses and size (losses.png), hypermodules by the members that use
    them (modules.png), sharing between layers against chance (layers.png), the alignment over time (alignment.png).
    A run that still goes on can be looked at too. [cyan]--html[/cyan] puts all of it on one page, without scripts and
    without a network.
    """
    from surgery.page import look, write_page
    from surgery.training.report.pictures import write_pictures
    from surgery.training.report.runlog import find_log, read_log

    from . import console

    view = look(source)
    if out is not None and view.run is None:
        raise typer.BadParameter(f"{source} holds no run, whose pictures would go there", param_hint="--out")
    pictures, log = [], None
    with console.working(quiet=quiet, json_wanted=json):
        if view.run is not None:
            log = find_log(source)
            pictures = write_pictures(log, Path(out) if out else log.parent)
        page = None if html is None else write_page(view, html or _page_of(source), overwrite=overwrite)
    summary = {} if log is None else summarise(read_log(log))
    if json:
        facts = {"log": None if log is None else str(log), "pictures": [str(path) for path in pictures]}
        facts |= {"page": None if page is None else str(page), "artifact": describe(view)}
        console.emit(facts | summary)
    elif not quiet:
        if view.members:
            print_artifact(view)
        if summary:
            print_summary(summary, pictures)
        if page is not None:
            console.say(str(page))


def _page_of(source: str) -> Path:
    folder = Path(source).expanduser().resolve()
    return folder.with_name(f"{folder.name}.html")


def describe(view: Overview) -> dict[str, Any] | None:
    """What an artifact holds, as plain JSON values."""
    if view.shares is None:
        return None
    return {
        "members": [
            {
                "name": member.name,
                "parameters": member.parameters,
                "bytes_before": member.before,
                "bytes_after": member.after,
                "output_error": member.error,
                "replaced": dict(member.replaced),
            }
            for member in view.members
        ],
        "warning": view.report.faint,
        "hypermodules": dict(view.shares.modules),
        "blocks_on_shared_rows": [list(row) for row in view.shares.blocks],
    }


def print_artifact(view: Overview) -> None:
    """Members with their sizes and errors, and how tensors are stored."""
    from . import console, outcome

    table = console.table("member", ">parameters", ">before", ">after", ">output moved by")
    for member in view.members[: outcome.ROWS]:
        table.add_row(
            member.name,
            "-" if member.parameters is None else console.count(member.parameters),
            console.size(member.before),
            console.size(member.after),
            "not measured" if member.error is None else console.percent(member.error, digits=2),
        )
    if len(view.members) > outcome.ROWS:
        table.add_row(first_few(view.members, outcome.ROWS)[-1], *[""] * 4)
    console.show(table)
    before, after = (sum(getattr(m, key) for m in view.members) for key in ("before", "after"))
    console.say(
        f"Tensors {console.size(after)}, {console.percent(after / (before or 1))} of {console.size(before)}."
    )
    if view.report.faint:
        console.say(view.report.faint)
    if any(member.replaced for member in view.members):
        table = console.table("member", "replaced module", "by")
        for member in view.members[: outcome.ROWS]:
            for path, method in [*member.replaced.items()][: outcome.ROWS]:
                table.add_row(member.name, console.clipped(path), method)
        console.show(table)
    table = console.table("stored as", ">tensors", ">before", ">after")
    for how, (tensors, original, stored) in view.ways.items():
        table.add_row(how, str(tensors), console.size(original), console.size(stored))
    console.show(table)


def summarise(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What a log says of its run: how far it went, tasks, sizes, statistics."""
    from surgery.training.report.comparison import share_of
    from surgery.training.report.log_lines import by_event
    from surgery.training.report.runlog import first_validation

    logged = by_event(lines)
    start, generations, end = logged.start or {}, logged.generations, logged.end
    last = generations[-1] if generations else {}
    now, whole = share_of(generations, end) if generations else (0, 0)
    return {
        "members": start.get("members", []),
        "finished": end is not None,
        "generations": len(generations),
        "phases": dict(Counter(line.get("phase") for line in generations)),
        "losses": last.get("losses", {}),
        "validation": (end or last).get("scores", last.get("validation", {})),
        "tests": (end or {}).get("tests", {}),
        "adapted": {
            name: facts["adapted"] for name, facts in start.get("tasks", {}).items() if facts.get("adapted")
        },
        "hypermodules": (end or last).get("hypermodules", {}),
        "subsets": last.get("subsets", {}) if end is None else end.get("stored_modules", {}),
        "share": now / max(whole, 1) if generations else None,
        "statistics": (end or {}).get("statistics", []),
        "first": first_validation(lines),
        "sizes": (end or {}).get("sizes", {}),
    }


def print_summary(summary: dict[str, Any], pictures: list[Path]) -> None:
    """Tasks, modules by subset, statistics, and where the pictures are."""
    from surgery.training.report.comparison import as_scores, verdict
    from surgery.training.report.report import in_phases

    from . import console, outcome

    phases = summary["phases"]
    done = in_phases(summary["generations"], phases.get("burn-in", 0), phases.get("final", 0))
    state = "finished" if summary["finished"] else "not finished"
    share = (
        "" if summary["share"] is None else f", {console.percent(summary['share'])} of the sites' parameters"
    )
    console.say(f"{done}, {state}{share}.")
    if summary["losses"]:
        table = console.table("task", ">training loss")
        for name, loss in summary["losses"].items():
            table.add_row(name, f"{loss:.4g}")
        console.show(table)
    outcome.print_scores(summary["first"], summary["validation"], summary["tests"])
    if summary["sizes"]:
        outcome.print_sizes(summary["sizes"])
        first, kept = (as_scores(summary[part]) for part in ("first", "validation"))
        console.say(verdict(summary["sizes"], first, kept))
    for sentence in outcome.adapted_words(summary["adapted"]):
        console.say(sentence)
    if any(summary["subsets"].values()):
        table = console.table("used by", ">hypermodules")
        for name, count in summary["subsets"].items():
            if name and count:
                table.add_row(name, str(count))
        console.show(table)
    if summary["statistics"]:
        console.heading("Generic hypermodules against specific ones")
        table = console.table("of", ">generic", ">specific", ">p (Mann-Whitney)")
        words = {"H": "hypermodule", "z": "its contexts"}
        for row in summary["statistics"]:
            table.add_row(
                f"{words[row['tensor']]}, {row['statistic']}", f"{row['generic']:.4g}", f"{row['specific']:.4g}",
                f"{row['p']:.2g}",
            )  # fmt: skip
        console.show(table)
    for path in pictures:
        console.say(str(path))
