"""`surgery add`: one more model for a joint folder, whose other members stay as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from . import options
from .options import (
    AllowNonfinite,
    Calibrate,
    Debug,
    Device,
    Folder,
    Json,
    Quiet,
    TrustRemoteCode,
)

if TYPE_CHECKING:
    from surgery.pipeline.add import AddedMember

EXAMPLES = """
surgery add joint new=./bert-new
surgery add joint new=./bert-new --max-error 0.02 --calibrate sentences.txt
surgery add joint new=./bert-new --dry-run
"""


def add(
    folder: Folder,
    references: Annotated[list[str], options.references()],
    max_error: Annotated[
        float | None,
        options.max_error(
            "The fewest bytes with which its outputs move by at most F (relative L2). "
            "[dim]default: what the others were allowed, or the largest of their errors[/dim]"
        ),
    ] = None,
    budget: Annotated[
        float | None, options.budget("Or: the most exact within F times its own bytes.")
    ] = None,
    calibrate: Calibrate = None,
    device: Device = None,
    dry_run: Annotated[
        bool, options.dry_run("Fit and measure, say what it would take, write nothing.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_nonfinite: AllowNonfinite = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Add models to a joint folder; its members stay as they are, bit for bit.

    A new member shares the matrices that others have in common, with rows of its own, and tensors that are there
    already. Neither time nor memory depends on how many members there are. [cyan]surgery remove[/cyan] takes it out
    again.
    """
    from surgery.pipeline.add import add as add_members
    from surgery.pipeline.add import named

    from . import console

    with console.working(quiet=quiet, json_wanted=json), console.going_on(folder):
        done = add_members(
            folder,
            named(references),
            max_error=max_error,
            budget=budget,
            calibrate=calibrate or (),
            device=device or "auto",
            dry_run=dry_run,
            trust_remote_code=trust_remote_code,
            allow_nonfinite=allow_nonfinite,
        )
    if json:
        console.emit({"out": str(folder), "written": not dry_run, "members": [facts(each) for each in done]})
    elif not quiet:
        print_added(str(folder), done, written=not dry_run, real=bool(calibrate))


def facts(each: AddedMember) -> dict[str, Any]:
    """An added member as plain JSON values."""
    from dataclasses import asdict

    from surgery.util.showing import finite

    return finite(asdict(each))


def print_added(folder: str, done: list[AddedMember], *, written: bool, real: bool) -> None:
    """What each new member took and how far its outputs moved."""
    from . import console, outcome

    table = console.table(
        "added", ">before", ">marginal", ">of its own", ">folder grew by", ">output moved by", "~"
    )
    for each in done:
        share = each.marginal_bytes / max(each.original_bytes, 1)
        shared = f"{each.sites} tensors share a matrix, {each.same} are there already"
        if not each.sites and not each.same:
            shared = "stored apart: it resembles nothing that is there"
        table.add_row(
            each.name,
            console.size(each.original_bytes),
            console.size(each.marginal_bytes),
            console.percent(share),
            console.size(each.disk_bytes) if written else "-",
            console.percent(each.error, digits=2),
            shared,
        )
    console.show(table)
    for each in done:
        why = f" ({each.why})" if each.why else ""
        console.say(f"{each.name}: target {each.target}{why}, {'met' if each.met else 'NOT met'}.")
    if not real and any(each.error > 0 for each in done):
        console.say(outcome.REAL_INPUTS)
    console.say(
        f"{folder}: all other members are what they were."
        if written
        else f"{folder} is as it was: nothing was written."
    )
