"""`surgery refit`: a joint folder fitted anew, all members together, from the models that they came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from . import options
from .options import Calibrate, Debug, Device, Folder, Json, Quiet, TrustRemoteCode

if TYPE_CHECKING:
    from surgery.pipeline.refit import Refit

EXAMPLES = """
surgery refit joint --dry-run
surgery refit joint --max-error 0.05
"""


def refit(
    folder: Folder,
    max_error: Annotated[
        float | None,
        options.max_error(
            "The smallest folder whose members' outputs move by at most F (relative L2). "
            "[dim]default: the target that it has; of what is left of one, the largest error[/dim]"
        ),
    ] = None,
    budget: Annotated[float | None, options.budget(options.BUDGET)] = None,
    calibrate: Calibrate = None,
    device: Device = None,
    dry_run: Annotated[bool, options.dry_run("Fit, say what it would save, write nothing.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fit a joint folder anew, for one to which models were added, or from which some went.

    It needs all members as they were, from where they came: opens the folders, files and hub ids that DIR names.
    """
    from dataclasses import asdict

    from surgery.pipeline.refit import refit as fit_again
    from surgery.util.showing import finite

    from . import console

    with console.working(quiet=quiet, json_wanted=json), console.going_on(folder):
        done = fit_again(
            folder,
            max_error=max_error,
            budget=budget,
            calibrate=calibrate or (),
            device=device or "auto",
            dry_run=dry_run,
            trust_remote_code=trust_remote_code,
        )
    if json:
        console.emit({"out": str(folder), "saved": done.saved, **finite(asdict(done))})
    elif not quiet:
        print_refit(str(folder), done)


def print_refit(folder: str, done: Refit) -> None:
    """Bytes and errors before and after."""
    from . import console

    console.heading(f"{folder}: weights {console.size(done.before)} before, {console.size(done.after)} anew")
    table = console.table("member", ">output moved by", ">anew")
    for name, error in done.errors.items():
        before = done.errors_before.get(name)
        was = "-" if before is None else console.percent(before, digits=2)
        table.add_row(name, was, console.percent(error, digits=2))
    console.show(table)
    console.say(f"Target {done.target}: {'met' if done.met else 'NOT met'}.")
    change = f"{console.size(abs(done.saved))} {'less' if done.saved >= 0 else 'more'}"
    console.say(
        f"It takes {change}."
        if done.written
        else f"It would take {change}; {folder} is as it was: nothing was written."
    )
