"""`surgery remove`: members out of a joint folder, whose other members stay as they are."""

from __future__ import annotations

from typing import Annotated

import typer

from . import completion, options
from .options import Debug, Folder, Json, Quiet

EXAMPLES = """
surgery remove joint new
surgery remove joint new other --dry-run
"""


def remove(
    folder: Folder,
    members: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME", show_default=False, help="Which members.", autocompletion=completion.members
        ),
    ],
    dry_run: Annotated[bool, options.dry_run("Say what would go, write nothing.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Take members out of a joint folder; what others use of theirs stays, and these are what they were, bit for bit.

    The removal of a member that was added leaves the folder that there was before, byte for byte.
    """
    from dataclasses import asdict

    from surgery.pipeline.add import remove as remove_members

    from . import console

    with console.working(quiet=quiet, json_wanted=json):
        gone = remove_members(folder, members, dry_run=dry_run)
    if json:
        console.emit({"out": str(folder), "written": not dry_run, **asdict(gone)})
    elif not quiet:
        names = ", ".join(gone.names)
        weights = console.size(gone.stored_bytes)
        if dry_run:
            console.say(f"{folder} is as it was; without {names} its weights would take {weights} less.")
        else:
            disk = console.size(gone.disk_bytes)
            console.say(f"{folder}: {names} removed, {weights} of weights; the folder is {disk} smaller.")
