"""`surgery report`: the pictures and tables of a training run again, from its log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import completion
from .options import RUN, Debug, Json, Quiet

EXAMPLES = """
surgery report runs/noisy
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
            help="A folder that surgery train wrote, or the DIR.training of a run that still goes on.",
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "--out", metavar="DIR", rich_help_panel=RUN, help="Where pictures go; by default beside the log."
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw the pictures of a training run from its log, and print what it says.

    Losses and size (losses.png), hypermodules by the members that use them (modules.png), sharing between layers
    against chance (layers.png), the alignment over time (alignment.png), and how generic hypermodules differ from
    specific ones. A run that still goes on can be looked at too.
    """
    from surgery.training.pictures import write_pictures
    from surgery.training.runlog import find_log, read_log

    from . import console

    log = find_log(source)
    with console.working(quiet=quiet, json_wanted=json):
        pictures = write_pictures(log, Path(out) if out else log.parent)
    lines = read_log(log)
    summary = summarise(lines)
    if json:
        console.emit({"log": str(log), "pictures": [str(path) for path in pictures], **summary})
    elif not quiet:
        print_summary(summary, pictures)


def summarise(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What a log says of its run: how far it went, tasks, sizes, statistics."""
    from surgery.training.runlog import first_validation

    start = next((line for line in lines if line["event"] == "start"), {})
    generations = [line for line in lines if line["event"] == "generation"]
    end = next((line for line in lines if line["event"] == "end"), None)
    last = generations[-1] if generations else {}
    return {
        "members": start.get("members", []),
        "finished": end is not None,
        "generations": len(generations),
        "losses": last.get("losses", {}),
        "validation": (end or last).get("scores", last.get("validation", {})),
        "tests": (end or {}).get("tests", {}),
        "adapted": {
            name: told["adapted"] for name, told in start.get("tasks", {}).items() if told.get("adapted")
        },
        "hypermodules": (end or last).get("hypermodules", {}),
        "subsets": last.get("subsets", {}),
        "share": last.get("share"),
        "statistics": (end or {}).get("statistics", []),
        "first": first_validation(lines),
        "sizes": (end or {}).get("sizes", {}),
    }


def print_summary(summary: dict[str, Any], pictures: list[Path]) -> None:
    """Tasks, modules by subset, statistics, and where the pictures are."""
    from surgery.training.comparison import as_scores, verdict

    from . import console, outcome

    state = "finished" if summary["finished"] else "not finished"
    share = "" if summary["share"] is None else f", {summary['share']:.0%} of the sites' parameters"
    console.say(f"{summary['generations']} generations, {state}{share}.")
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
