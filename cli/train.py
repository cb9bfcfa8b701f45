"""`surgery train`: several members, each on its task, sharing more and more as they learn."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import completion, options
from .options import Debug, Json, Out, Overwrite, OwnSeed, Quiet, TrustRemoteCode, option, switch

if TYPE_CHECKING:
    from surgery.settings.recipe import Recipe
    from surgery.training.report.report import TrainReport

EXAMPLES = """
surgery recipes ls
surgery train synthetic --out runs/noisy
surgery train recipe.yaml --out joint --set train.optimizer.lr=3e-4 --set train.generations=40
surgery train recipe.yaml --out joint --fast-dev-run
surgery train recipe.yaml --out joint --resume auto
surgery train joint --add new=mine.py:net --set models.2.tasks.0.data=mine.py:data --out larger
accelerate launch -m surgery_cli train recipe.yaml --out joint
accelerate launch --use_fsdp --fsdp_version 2 -m surgery_cli train recipe.yaml --out joint
"""


def train(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|DIR",
            show_default=False,
            autocompletion=completion.recipes,
            help="A YAML recipe, the name of an installed one, or a folder that surgery wrote, whose members go "
            "on with the recipe in it.",
        ),
    ],
    out: Out = None,
    changes: Annotated[
        list[str] | None,
        options.changes("Change one value of the recipe, such as train.steps=50; repeatable."),
    ] = None,
    add: Annotated[
        list[str] | None,
        option(
            "--add",
            "NAME=REF",
            "With DIR: one more member, trained beside those of the folder; its task is given with --set "
            "models.N.tasks.0.data=..., N counting from 0. Repeatable.",
        ),
    ] = None,
    bank: Annotated[
        Literal["frozen", "refined"],
        option(
            "--bank",
            None,
            "With --add. frozen: members of the folder stay as they are, bit for bit, and new ones may use what "
            "they have. refined: all are trained on.",
        ),
    ] = "frozen",
    resume: Annotated[
        Literal["auto", "never"],
        option(
            "--resume",
            None,
            "auto: go on with an interrupted run for the same --out; one that is done stays as it is. never: "
            "refuse where there is one.",
        ),
    ] = "never",
    fast_dev_run: Annotated[
        bool,
        switch(
            "--fast-dev-run",
            "Go through every phase in seconds, on a few batches, to see that all of it works.",
        ),
    ] = False,
    dry_run: Annotated[bool, options.dry_run("Print the plan, train and write nothing.")] = False,
    cpu: Annotated[bool, switch("--cpu", "Stay on the CPU.")] = False,
    seed: OwnSeed = None,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train members jointly on their tasks while evolution decides which blocks share what (MUiR).

    A recipe names the members, a task for each, and the settings. Until it is done, a run keeps its log and its
    state in DIR.training beside --out; [cyan]Ctrl-C[/cyan] saves and leaves, [cyan]--resume auto[/cyan] goes on
    to the very result of an unbroken run. The folder holds the log and the pictures too.
    """
    recipe, folder = read_training(
        source, out, seed, changes or [], trust_remote_code, add or [], frozen=bank == "frozen"
    )
    options.check_out(recipe.out, dry_run=dry_run)
    if dry_run:
        preview(recipe, folder, trust_remote_code, json=json, quiet=quiet)
        return
    report = run(
        recipe,
        folder,
        resume=resume == "auto",
        fast=fast_dev_run,
        overwrite=overwrite,
        trust=trust_remote_code,
        cpu=cpu,
        quiet=quiet,
        json=json,
    )
    from . import console

    if not console.FIRST:
        return
    if json:
        console.emit({"out": recipe.out, **report.document()})
    elif not quiet:
        print_report(report, Path(recipe.out or ""), trust_remote_code)
        print_left(Path(recipe.out or ""))


def read_training(
    source: str,
    out: str | None,
    seed: int | None,
    changes: list[str],
    trust: bool,
    add: list[str] | None = None,
    *,
    frozen: bool = True,
) -> tuple[Recipe, Path | None]:
    """The recipe, and the folder whose members go on, where the source is one; with members that are added to it."""
    import yaml

    from surgery.disk.places import out_of_artifact
    from surgery.settings.documents import check_code, override, read_document, read_recipe
    from surgery.training.checking import check_document

    from .flags import called_by_flags

    folder = Path(source).expanduser()
    found = folder if folder.is_dir() else None
    document = (
        out_of_artifact(folder).recipe(read_document(folder / "recipe.yaml"))
        if found
        else read_recipe(source)
    )
    given = {key: value for key, value in (("out", out), ("seed", seed)) if value is not None}
    document |= given
    document.setdefault("train", yaml.safe_load("{}"))
    if found:
        document["train"].pop("keep", None)  # of the run that wrote the folder
    if add:
        document = with_added(document, found, add, frozen)
    document = override(document, changes)
    check_code(document, folder / "recipe.yaml" if found else source, trust)
    called = {} if any(change.startswith("seed=") for change in changes) else called_by_flags(given)
    return check_document(document, going_on=found is not None, called=called), found


def with_added(document: dict[str, Any], folder: Path | None, add: list[str], frozen: bool) -> dict[str, Any]:
    """A folder's recipe with more members, whose tasks are still to be given."""
    from surgery.errors import PlanError

    if folder is None:
        raise typer.BadParameter(
            "needs a folder that training wrote in place of RECIPE; a recipe names its members itself",
            param_hint="--add",
        )
    names = [model["name"] for model in document.get("models", ())]
    pairs = [(name, reference) for name, _, reference in (each.partition("=") for each in add)]
    if wrong := [each for each, (name, ref) in zip(add, pairs, strict=True) if not name or not ref]:
        raise typer.BadParameter(f"is written NAME=REF, found {', '.join(wrong)}", param_hint="--add")
    new = [name for name, _ in pairs]
    if taken := sorted({name for name in new if name in names or new.count(name) > 1}):
        raise typer.BadParameter(
            f"needs names that are not taken, found {', '.join(taken)}; the folder has {', '.join(names)}",
            param_hint="--add",
        )
    if "models" not in document:
        raise PlanError(f"{folder} must hold a recipe with members to add to, found none.")
    models = [{"name": name, "model": reference, "tasks": [{}]} for name, reference in pairs]
    train = {**document["train"], **({"keep": names} if frozen else {})}
    return {**document, "models": [*document["models"], *models], "train": train}


def preview(recipe: Recipe, folder: Path | None, trust: bool, *, json: bool, quiet: bool) -> None:
    """A dry run: members loaded and planned, and the tasks' first batches tried."""
    from surgery.pipeline.train import prepare_again, prepare_training, try_tasks
    from surgery.training.checking import check_source

    from . import console, planned

    with console.working(quiet=quiet, json_wanted=json):
        if folder is not None:
            prepared = prepare_again(folder, recipe, trust_remote_code=trust)
        else:
            check_source(recipe)
            prepared = prepare_training(recipe, trust)
        try_tasks(prepared, own=folder is None, trust_remote_code=trust)
    if json:
        console.emit(planned.plan_json(prepared))
    elif not quiet:
        planned.print_plan(prepared, verbose=False)


def run(
    recipe: Recipe,
    folder: Path | None,
    *,
    resume: bool,
    fast: bool,
    overwrite: bool,
    trust: bool,
    cpu: bool,
    quiet: bool,
    json: bool,
) -> TrainReport:
    """The training itself; where it is interrupted, the last line on the screen says how to go on."""
    from surgery.pipeline.train import finished_run, run_folder, train_recipe
    from surgery.training.loop.interruptions import Interrupted

    from . import console

    joint = None
    with console.working(quiet=quiet, json_wanted=json):
        if resume and (done := finished_run(recipe, fast_run=fast)) is not None:
            return done
        if folder is not None:
            from surgery.pipeline.train import rejoin

            joint = rejoin(folder, recipe, trust_remote_code=trust)
        try:
            return train_recipe(
                recipe,
                joint=joint,
                resume=resume,
                fast_run=fast,
                overwrite=overwrite,
                own=folder is None,
                trust_remote_code=trust,
                cpu=cpu,
            )[1]
        except Interrupted as stopped:
            kept = run_folder(recipe.out or "")
            console.interrupted = f"the state is in {kept}, go on with {console.again('--resume', 'auto')}"
            if stopped.number != signal.SIGINT:
                raise SystemExit(128 + stopped.number) from stopped
            raise


def print_left(folder: Path) -> None:
    """What is still in the run's folder now that it is done: files that training did not write, and trackers' ones."""
    from surgery.disk.files import files_below
    from surgery.pipeline.train import run_folder
    from surgery.util.text import shorten

    from . import console

    left = files_below(run_folder(folder)) if run_folder(folder).is_dir() else []
    if left:
        console.say(f"{run_folder(folder)} keeps {shorten(left, 3)}.", style="dim")


def print_report(report: TrainReport, folder: Path, trust: bool = False) -> None:
    """Each task with what it reached, then the size."""
    from surgery.pipeline.train import needs_consent
    from surgery.training.report.comparison import verdict
    from surgery.training.report.report import in_phases

    from . import console, outcome

    facts = report.document()
    outcome.print_scores(facts["first"], facts["scores"], facts["tests"])
    for sentence in outcome.adapted_words(report.adapted):
        console.say(sentence)
    now, whole = report.numbers
    generations = in_phases(report.generations, report.burn_in, report.final)
    ended = "" if report.stopped == "done" else f" ({report.stopped})"
    console.say(
        f"{generations} in {report.seconds:.0f} s{ended}; kept is generation {report.kept_words}. "
        f"{' and '.join(report.made) or 'Nothing shared'} for the sites: {console.count(now)} parameters for "
        f"{console.count(whole)} ({console.percent(now / max(whole, 1))}). "
        f"{console.count(report.trained)} parameters were trained."
    )
    if report.sizes:
        outcome.print_sizes(report.sizes)
        console.say(verdict(report.sizes, report.first, report.scores))
    again = (
        f"surgery merge {shlex.quote(str(folder))} --max-error 0.05 --out {shlex.quote(f'{folder}-small')}"
    )
    if report.note:
        console.say(f"{report.note} Fit again to compress: {again}")
    console.heading("Next")
    console.command("surgery", "report", folder)
    console.command(
        "surgery", "evaluate", folder, *["--trust-remote-code"] * (trust or needs_consent(folder))
    )
