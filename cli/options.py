"""Options that several verbs share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import completion

FLAG = " "  # in place of the "<bool>" that says nothing about a switch
SELECT, TARGET, DICTIONARY = "Which tensors", "How small, how exact", "Dictionary"
RUN, SCREEN = "Run", "Screen"

_SELECTOR = (
    "Exact tensor name, or [cyan]re:PATTERN[/cyan]; repeatable; [cyan]MEMBER:[/cyan] in front limits it."
)


def references() -> Any:
    """The argument of verbs that read models."""
    what = "The models, as surgery inspect takes them; [cyan]name=[/cyan] in front names one."
    return typer.Argument(metavar="REF", show_default=False, help=what)


def max_error(what: str) -> Any:
    """`--max-error`, with what it asks for."""
    return typer.Option("--max-error", metavar="F", rich_help_panel=TARGET, help=what)


def budget(what: str) -> Any:
    """`--budget`, with what it asks for."""
    return typer.Option("--budget", metavar="F", rich_help_panel=TARGET, help=what)


def dry_run(what: str) -> Any:
    """`--dry-run`, with what is done without it."""
    return typer.Option("--dry-run", metavar=FLAG, rich_help_panel=RUN, help=what)


def changes(what: str) -> Any:
    """`--set`, with an example of what it changes."""
    return typer.Option("--set", metavar="K=V", rich_help_panel=RUN, help=what)


def check_out(out: str | None, *, dry_run: bool) -> None:
    """Ask for `--out` where neither the recipe nor the command line says what to write."""
    if out is None and not dry_run:
        raise typer.BadParameter("a folder to write is needed", param_hint="--out")


BUDGET = "Or: the most exact weights within F times the members' bytes; records and small files come on top."
Calibrate = Annotated[
    list[str] | None,
    typer.Option(
        "--calibrate",
        metavar="FILE",
        rich_help_panel=TARGET,
        help="Real inputs to measure errors on: .txt, a picture or a folder of pictures, .npz; "
        "[cyan]NAME=FILE[/cyan] for one member; repeatable. Without it inputs are made up.",
    ),
]
Private = Annotated[
    list[str] | None,
    typer.Option(
        "--private", metavar="SEL", rich_help_panel=SELECT, help=f"Leave to its member alone. {_SELECTOR}"
    ),
]
Sites = Annotated[
    list[str] | None,
    typer.Option(
        "--sites",
        metavar="SEL",
        rich_help_panel=SELECT,
        help="Make it a site although it is private by default. As above.",
    ),
]
Skip = Annotated[
    list[str] | None,
    typer.Option("--skip", metavar="SEL", rich_help_panel=SELECT, help="Do not touch. As above."),
]
Seed = Annotated[
    int, typer.Option("--seed", metavar="N", rich_help_panel=RUN, help="Seed of all that is drawn at random.")
]
OwnSeed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", rich_help_panel=RUN, help="Seed of all that is drawn at random."),
]
"""In place of a recipe's."""
Out = Annotated[
    str | None, typer.Option("--out", metavar="DIR", rich_help_panel=RUN, help="The folder to write.")
]
Folder = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="A folder that surgery wrote.", autocompletion=completion.artifacts),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        rich_help_panel=RUN,
        help="What the process may hold besides pages of files, such as 8GiB; what does not fit is kept in files "
        "beside the folder that is written.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        rich_help_panel=RUN,
        help="auto (the default), cpu, cuda, ...",
        autocompletion=completion.devices,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        metavar=FLAG,
        rich_help_panel=RUN,
        help="Let Python code run that a model or a folder brings or names. Read it first.",
    ),
]
AllowNonfinite = Annotated[
    bool,
    typer.Option(
        "--allow-nonfinite",
        metavar=FLAG,
        rich_help_panel=RUN,
        help="Accept weights that are NaN or infinite, as rows of unused tokens are.",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", metavar=FLAG, rich_help_panel=RUN, help="Replace the output folder where it exists."
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        metavar=FLAG,
        rich_help_panel=SCREEN,
        help="Print one JSON document on stdout, all else on stderr.",
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", metavar=FLAG, rich_help_panel=SCREEN, help="Print no progress and no tables."
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", metavar=FLAG, rich_help_panel=SCREEN, help="Also print a row for every tensor."
    ),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", metavar=FLAG, rich_help_panel=SCREEN, help="Show the traceback of an error."),
]
