"""`surgery`: the command, its verbs, and how errors end.

Exit codes: 0 done, 1 `verify` found a mismatch, 2 bad input or usage, 130 interrupted, 143 ended by SIGTERM (128 and
the number of a signal). Verbs import the library when they run, so `surgery --help` does not import torch.
"""

from __future__ import annotations

import functools
import inspect as introspection
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from surgery.errors import SurgeryError
from surgery.version import __version__

from . import add, demo, evaluate, export, inspect, merge, push, recipes, refit, remove, report, train, verify
from .endings import WORDS, cut_off_files_are_said, no_memory, out_of_memory, requests_raise
from .flags import flags_of, in_flags, typed_in
from .options import FLAG

app = typer.Typer(
    name="surgery",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _add(module: ModuleType) -> None:
    """Add the verb that a file is named after; its docstring is the help, its `EXAMPLES` end it."""
    name = module.__name__.rpartition(".")[2]
    verb = getattr(module, name)
    paragraphs = introspection.cleandoc(verb.__doc__ or "").split("\n\n")
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    examples = "".join(f"\n  {line}" for line in module.EXAMPLES.strip().splitlines())
    epilog, late = f"[dim]Examples[/dim]{examples}", getattr(module, "LATE_HELP", {})
    app.command(name, cls=_with_late_help(late), help=text, epilog=epilog)(_with_a_sign_of_life(verb))


def _with_late_help(late: Mapping[str, Callable[[], str]]) -> type[TyperCommand]:
    """A command whose options say what they can be only when help is asked for: it depends on what is installed."""

    class Verb(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            for option in self.params:
                if isinstance(option, TyperOption) and option.name in late:
                    option.help = late[option.name]()
            super().format_help(ctx, formatter)

    return Verb


def _with_a_sign_of_life(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb, with something on the screen from its start on: importing torch takes seconds."""

    @functools.wraps(verb)
    def shown(*args: Any, **options: Any) -> None:
        from . import console
        from .hush import hush

        quiet = bool(options.get("quiet"))
        hushed = hush(quiet=quiet, debug=bool(options.get("debug")), say=_say)
        with cut_off_files_are_said(), hushed, console.alive(quiet=quiet):
            verb(*args, **options)

    return shown


for each in (demo, inspect, merge, add, remove, refit, train, evaluate, report, verify, export, push):
    _add(each)
app.add_typer(recipes.app, name="recipes")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"surgery {__version__}")
        raise typer.Exit


@app.callback()
def surgery(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar=FLAG, callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Join pretrained networks of any architecture into one folder, and give each of them back.

    Start with [bold]surgery demo[/bold], or look at a model of your own with [bold]surgery inspect
    REF[/bold].
    """


def with_values(arguments: list[str]) -> list[str]:
    """`report DIR --html` without a file means the default one, which an empty value stands for."""
    if arguments[:1] != ["report"] or "--html" not in arguments:
        return arguments
    place = arguments.index("--html") + 1
    given = arguments[place] if place < len(arguments) else "-"
    if given.startswith("-") or Path(given).is_dir():
        return [*arguments[:place], "", *arguments[place:]]
    return arguments


def _say(message: str) -> None:
    """Say what the library has to say, in flags."""
    from surgery.util.text import printable

    from . import console

    console.clear()
    flags = flags_of(app, console.typed[0]) if console.typed else {}
    flags = flags or flags_of(app)
    said = in_flags(message, flags, typed_in(console.typed, flags))
    print(f"surgery: {printable(said)}", file=sys.stderr)


def _no_memory(arguments: list[str]) -> str:
    """What is said where memory ran out."""
    from surgery.util.progress import latest

    return no_memory(latest(), arguments[0] if arguments else "")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    from . import console

    arguments = sys.argv[1:] if arguments is None else arguments
    console.typed = list(arguments)
    arguments = with_values(arguments)
    try:
        with requests_raise():
            app(arguments)
    except SurgeryError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        _say(_no_memory(arguments) if out_of_memory(error) else str(error))
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if "--debug" in arguments or not out_of_memory(error):
            raise
        _say(_no_memory(arguments))
        sys.exit(2)
    except SystemExit as end:
        if end.code in WORDS and console.FIRST:  # typer ends an interrupted verb without a word
            print(f"surgery: {WORDS[end.code]}; {console.interrupted}.", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
