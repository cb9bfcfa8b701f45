"""`surgery push`: an artifact or an export goes to the hub."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from . import options
from .options import FLAG, RUN, Debug, Folder, Json, Quiet, option

EXAMPLES = """
surgery push joint me/joint --dry-run
surgery push joint me/joint --private
surgery push tuned-lora me/tuned-lora --base me/minilm
"""


def push(
    folder: Folder,
    repo: Annotated[
        str,
        typer.Argument(
            metavar="REPO", show_default=False, help="org/name on the hub; made where it does not exist."
        ),
    ],
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            metavar=FLAG,
            show_default=False,
            rich_help_panel=RUN,
            help="Whether a new repository is private; by default what the organisation has.",
        ),
    ] = None,
    revision: Annotated[
        str | None,
        option("--revision", "BRANCH", "Branch; by default the main one."),
    ] = None,
    base: Annotated[
        str | None,
        option(
            "--base", "REPO", "The model that an adapter belongs to, as it is called on the hub: org/name."
        ),
    ] = None,
    dry_run: Annotated[
        bool, options.dry_run("Say what would be uploaded; nothing is asked of the hub.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Upload a folder that surgery wrote: a joint folder or an export.

    Files that surgery did not write are not uploaded, and are named. The token is that of [cyan]hf auth login[/cyan].
    """
    from surgery.artifact.publish import push_to_hub
    from surgery.util.progress import task

    from . import console

    with console.working(quiet=quiet, json_wanted=json), task(f"Uploading to {repo}"):
        found = push_to_hub(folder, repo, private=private, revision=revision, base=base, dry_run=dry_run)
    if json:
        console.emit({**asdict(found), "left": list(found.left)})
    elif not quiet:
        for line in repr(found).splitlines():
            console.say(line)
