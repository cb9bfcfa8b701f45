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


def option(flag: str, metavar: str | None, what: str, panel: str = RUN, *, complete: Any = None) -> Any:
    """An option that takes a value.

    Args:
        flag: its name.
        metavar: how the value is written in help; None where its type lists its values.
        what: its help.
        panel: of the help in which it is.
        complete: gives values for completion.
    """
    return typer.Option(flag, metavar=metavar, rich_help_panel=panel, help=what, autocompletion=complete)


def switch(flag: str, what: str, panel: str = RUN, *, short: str | None = None) -> Any:
    """An option that is given or not."""
    return typer.Option(*filter(None, (flag, short)), metavar=FLAG, rich_help_panel=panel, help=what)


def references() -> Any:
    """The argument of verbs that read models."""
    what = "The models, as surgery inspect takes them; [cyan]name=[/cyan] in front names one."
    return typer.Argument(metavar="REF", show_default=False, help=what)


def fraction(text: str | float) -> float:
    """The number that stands for a fraction.

    Raises:
        BadParameter: for a percentage, which is answered with the fraction that it is, and for what is no number.
    """
    from surgery.settings.quantities import parse_fraction

    try:
        return float(parse_fraction(text if "%" in str(text) else float(text)))
    except ValueError as error:
        ours = "could not convert" not in str(error)
        words = str(error) if ours else f"must be a number, found '{text}'"
        raise typer.BadParameter(words) from None


def max_error(what: str, panel: str = TARGET) -> Any:
    """`--max-error`, with what it asks for."""
    return _fraction("--max-error", what, panel)


def budget(what: str) -> Any:
    """`--budget`, with what it asks for."""
    return _fraction("--budget", what)


def _fraction(flag: str, what: str, panel: str = TARGET) -> Any:
    return typer.Option(flag, metavar="F", rich_help_panel=panel, help=what, parser=fraction)


def dry_run(what: str) -> Any:
    """`--dry-run`, with what is done without it."""
    return switch("--dry-run", what)


def changes(what: str) -> Any:
    """`--set`, with an example of what it changes."""
    return option("--set", "K=V", what)


def check_out(out: str | None, *, dry_run: bool) -> None:
    """Ask for `--out` where neither the recipe nor the command line says what to write."""
    if out is None and not dry_run:
        raise typer.BadParameter("a folder to write is needed", param_hint="--out")


BUDGET = "Or: the most exact weights within F times the members' bytes; records and small files come on top."
Calibrate = Annotated[
    list[str] | None,
    option(
        "--calibrate",
        "FILE",
        "Real inputs to measure errors on: .txt, a picture or a folder of pictures, .npz; "
        "[cyan]NAME=FILE[/cyan] for one member; repeatable. Without it inputs are made up.",
        TARGET,
    ),
]
Private = Annotated[
    list[str] | None,
    option("--private", "SEL", f"Leave to its member alone. {_SELECTOR}", SELECT),
]
Sites = Annotated[
    list[str] | None,
    option("--sites", "SEL", "Make it a site although it is private by default. As above.", SELECT),
]
Skip = Annotated[
    list[str] | None,
    option("--skip", "SEL", "Do not touch. As above.", SELECT),
]
Seed = Annotated[int, option("--seed", "N", "Seed of all that is drawn at random.")]
OwnSeed = Annotated[
    int | None,
    option("--seed", "N", "Seed of all that is drawn at random."),
]
"""In place of a recipe's."""
Out = Annotated[str | None, option("--out", "DIR", "The folder to write.")]
Folder = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="A folder that surgery wrote.", autocompletion=completion.artifacts),
]
Memory = Annotated[
    str | None,
    option(
        "--memory",
        "SIZE",
        "What the process may hold besides pages of files, such as 8GB; what does not fit is kept in files "
        "beside the folder that is written.",
    ),
]
Device = Annotated[
    str | None,
    option("--device", "NAME", "auto (the default), cpu, cuda, ...", complete=completion.devices),
]
TrustRemoteCode = Annotated[
    bool,
    switch(
        "--trust-remote-code", "Let Python code run that a model or a folder brings or names. Read it first."
    ),
]
AllowNonfinite = Annotated[
    bool,
    switch("--allow-nonfinite", "Accept weights that are NaN or infinite, as rows of unused tokens are."),
]
Overwrite = Annotated[
    bool,
    switch("--overwrite", "Replace the output folder where it exists."),
]
Json = Annotated[
    bool,
    switch("--json", "Print one JSON document on stdout, all else on stderr.", SCREEN),
]
Quiet = Annotated[
    bool,
    switch("--quiet", "Print no progress and no tables.", SCREEN, short="-q"),
]
Verbose = Annotated[
    bool,
    switch("--verbose", "Also print a row for every tensor.", SCREEN, short="-v"),
]
Debug = Annotated[
    bool,
    switch("--debug", "Show the traceback of an error.", SCREEN),
]
