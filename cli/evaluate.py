"""`surgery evaluate`: the members of a folder on the tasks that they were trained for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from . import completion
from .options import Debug, Json, Quiet, TrustRemoteCode, option

EXAMPLES = """
surgery evaluate joint
surgery evaluate joint --member text --part validation --json
surgery evaluate joint --data my_test_set.npz
"""


def evaluate(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            show_default=False,
            help="A folder that surgery train wrote.",
            autocompletion=completion.artifacts,
        ),
    ],
    members: Annotated[
        list[str] | None,
        option("--member", "NAME", "Only this one; repeatable.", complete=completion.members),
    ] = None,
    part: Annotated[
        Literal["test", "validation", "data"],
        option("--part", None, "Of the tasks' data; where there is no test part, validation serves."),
    ] = "test",
    data: Annotated[
        str | None,
        option("--data", "SOURCE", "Other data than those that the recipe names."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure members on their tasks: loss and metric, from the folder alone."""
    from surgery.pipeline.train import evaluate_artifact

    from . import console, outcome

    with console.working(quiet=quiet, json_wanted=json):
        scores = evaluate_artifact(
            folder, members=members or None, part=part, data=data, trust_remote_code=trust_remote_code
        )
    if json:
        console.emit({name: score.document() for name, score in scores.items()})
    elif not quiet:
        table = console.table("task", ">loss", ">metric", ">examples")
        for name, score in scores.items():
            table.add_row(name, *outcome.score_cells(score.document()), str(score.examples))
        console.show(table)
