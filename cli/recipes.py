"""`surgery recipes`: look at the recipes that are installed, take one as a start, check one of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import completion
from .options import Debug, Json, Overwrite

app = typer.Typer(no_args_is_help=True, help="List, copy and check recipes.")


@app.command("ls", epilog="[dim]Examples[/dim]\n  surgery recipes ls")
def list_recipes(json: Json = False, debug: Debug = False) -> None:
    """List the installed recipes, each with its first line."""
    from surgery.settings.documents import read_text, recipe_names

    from . import console

    first = {name: read_text(name).partition("\n")[0].lstrip("# ") for name in recipe_names()}
    if json:
        console.emit(first)
        return
    table = console.table("recipe", "~what it does")
    for name, line in first.items():
        table.add_row(name, line)
    console.show(table)


@app.command("cp", epilog="[dim]Examples[/dim]\n  surgery recipes cp synthetic mine.yaml")
def copy_recipe(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", show_default=False, help="An installed recipe.", autocompletion=completion.recipes
        ),
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False, help="Where to write it.")],
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Copy an installed recipe, as a start for one of your own."""
    from surgery.disk.files import put
    from surgery.errors import OutputError
    from surgery.settings.documents import read_text

    from . import console

    text = read_text(name)
    if file.exists() and not overwrite:
        raise OutputError(f"{file} exists: choose another name, or pass --overwrite.")
    put(file, text.encode())
    console.say(f"{name} is now {file}.")


@app.command("check", epilog="[dim]Examples[/dim]\n  surgery recipes check mine.yaml")
def check_recipe(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            show_default=False,
            help="A recipe, or an installed one's name.",
            autocompletion=completion.recipes,
        ),
    ],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a recipe's keys, values and names, by the rules of train; no model or data are loaded, no code is run."""
    from surgery.settings.documents import read_recipe
    from surgery.settings.recipe import Recipe
    from surgery.training.checking import check_document

    from . import console

    document = read_recipe(file)
    recipe = Recipe.of(document) if document.get("train") is None else check_document(document)
    if json:
        console.emit(recipe.resolved())
        return
    verb = ["merge", "--config"] if recipe.train is None else ["train"]
    count = len(recipe.models)
    console.say(f"{file} is a valid recipe of {count} {'model' if count == 1 else 'models'}.")
    out = ["--out", Path(file).stem if Path(file).suffix else f"{file}-out"] if recipe.out is None else []
    console.heading("Next")
    console.command("surgery", *verb, file, *out)
