"""`surgery merge`: several models in, one folder out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from surgery.settings.names import Mixing

from . import completion, options
from .options import (
    DICTIONARY,
    TARGET,
    AllowNonfinite,
    Calibrate,
    Debug,
    Device,
    Json,
    Memory,
    Out,
    Overwrite,
    OwnSeed,
    Private,
    Quiet,
    Sites,
    Skip,
    TrustRemoteCode,
    Verbose,
    option,
    switch,
)

if TYPE_CHECKING:
    from surgery.settings.recipe import Recipe

EXAMPLES = """
surgery merge ./minilm timm:resnet18 --out joint
surgery merge text=./minilm image=timm:resnet18=weights.safetensors --max-error 0 --out joint
surgery merge a=./bert-a b=./bert-b --budget 0.4 --calibrate a=sentences.txt --out joint
surgery merge a=./bert-a b=./bert-b --method templates --max-error 0.05 --out shared
surgery merge ./bert --method templates --templates 4 --out start
surgery merge --config recipe.yaml --set parameters.budget=0.3 --dry-run
"""


def method_help() -> str:
    """The methods that are known, by name."""
    from surgery.settings.methods import method_names, summary_of
    from surgery.settings.names import DEFAULT_METHOD

    found = {name: summary_of(name) for name in method_names()}
    rows = [f"[cyan]{name}[/cyan]{f': {summary}' if summary else ''}" for name, summary in found.items()]
    own = "[cyan]--set settings.KEY=VALUE[/cyan] gives it settings of its own."
    return f"How tensors are shared. {'; '.join(rows)}. {own} [dim]default: {DEFAULT_METHOD}[/dim]"


LATE_HELP = {"method": method_help}
"""Help that depends on what is installed, made when it is asked for."""


References = Annotated[list[str] | None, options.references()]
MaxError = Annotated[
    float | None,
    options.max_error(
        "The smallest folder whose members' outputs move by at most F (relative L2). 0 is lossless. "
        "[dim]default: 0.05[/dim]"
    ),
]
Budget = Annotated[float | None, options.budget(options.BUDGET)]
Hypermodules = Annotated[
    int | None,
    option("--hypermodules", "K", "Or: a bank of K hypermodules, the start for joint training.", TARGET),
]
Templates = Annotated[
    int | None,
    option(
        "--templates",
        "K",
        "Or: K templates for each stack of layers, with --method templates, at the members' precision; "
        "with --max-error or --budget, K templates in as many bits as these ask for.",
        TARGET,
    ),
]
MethodName = Annotated[
    str | None,
    option("--method", "NAME", "How tensors are shared.", DICTIONARY, complete=completion.methods),
]
Mixture = Annotated[
    Mixing | None,
    option(
        "--mixture",
        None,
        "Of templates: any mixtures, the default; positive ones that sum to 1; or one template a layer, "
        "so that layers are tied.",
        DICTIONARY,
    ),
]
MixNorms = Annotated[
    bool,
    switch(
        "--mix-norms", "Mix scale and shift of norms too; otherwise every layer keeps its own.", DICTIONARY
    ),
]
Stacks = Annotated[
    list[str] | None,
    option(
        "--stacks",
        "SEL",
        "Take templates for these stacks alone, by the paths that surgery inspect lists, such as "
        "[cyan]encoder.layer.*[/cyan], or re: patterns; repeatable. The rest is shared as hypermodules are.",
        DICTIONARY,
    ),
]
Block = Annotated[
    str | None,
    option("--block", "MxN", "Block shape; chosen per group if not given.", DICTIONARY),
]
Context = Annotated[
    int | None,
    option("--context", "C", "Basis blocks of a hypermodule; chosen if not given.", DICTIONARY),
]
Config = Annotated[
    str | None,
    option(
        "--config",
        "FILE",
        "A YAML recipe, or the name of an installed one; the options here override it.",
        complete=completion.recipes,
    ),
]
Changes = Annotated[
    list[str] | None,
    options.changes(
        "Change one value of the recipe, such as parameters.budget=0.3; repeatable, applied last."
    ),
]
DryRun = Annotated[bool, options.dry_run("Print the plan, check the target, write nothing.")]


def merge(
    references: References = None,
    out: Out = None,
    max_error: MaxError = None,
    budget: Budget = None,
    hypermodules: Hypermodules = None,
    templates: Templates = None,
    calibrate: Calibrate = None,
    method: MethodName = None,
    mixture: Mixture = None,
    mix_norms: MixNorms = False,
    stacks: Stacks = None,
    block: Block = None,
    context: Context = None,
    private: Private = None,
    sites: Sites = None,
    skip: Skip = None,
    config: Config = None,
    changes: Changes = None,
    seed: OwnSeed = None,
    device: Device = None,
    memory: Memory = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_nonfinite: AllowNonfinite = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Join models of any architectures into one folder that gives each of them back.

    Tensors of the members share what they have in common, and are stored as exactly as the target needs. The
    folder holds everything: [cyan]surgery.load[/cyan] runs its members, [cyan]surgery export[/cyan] turns
    one into an ordinary model again.
    """
    given = {
        "models": [{"model": reference} for reference in references or ()],
        "out": out,
        "method": method,
        "seed": seed,
        "allow_nonfinite": allow_nonfinite or None,
        "device": device,
        "calibrate": calibrate,
        "parameters": {
            "max_error": max_error,
            "budget": budget,
            "hypermodules": hypermodules,
            "block": block,
            "context": context,
        },
        "settings": {"templates": templates, "mixture": mixture, "mix_norms": mix_norms or None},
        "select": {"private": private, "sites": sites, "skip": skip, "stacks": stacks},
    }
    recipe = read_recipe(config, given, changes or [], trust_remote_code)
    options.check_out(recipe.out, dry_run=dry_run)
    if dry_run:
        preview(recipe, overwrite, trust_remote_code, memory, json=json, quiet=quiet, verbose=verbose)
    else:
        run(recipe, overwrite, trust_remote_code, memory, json=json, quiet=quiet, verbose=verbose)


def read_recipe(config: str | None, given: dict[str, Any], changes: list[str], trust: bool) -> Recipe:
    """The recipe of a command line: a file, overridden by options, overridden by `--set`."""
    from surgery.errors import PlanError
    from surgery.settings.documents import check_code, override
    from surgery.settings.documents import read_recipe as read_document
    from surgery.settings.names import DEFAULT_METHOD, TARGETS
    from surgery.settings.recipe import Recipe

    from .flags import called_by_flags

    document: dict[str, Any] = {}
    if config:
        try:
            document = read_document(config)
        except PlanError as error:
            raise PlanError(f"`config`: {error}") from error
        check_code(document, config, trust)
    if given["method"] not in (None, document.get("method", DEFAULT_METHOD)):
        document.pop("settings", None)  # of the file's method
    called = called_by_flags({key: value for key, value in given.items() if key != "models"})
    for key, value in given.items():
        if isinstance(value, dict):
            value = {name: each for name, each in value.items() if each not in (None, [])}
            kept = document.get(key) or {}
            if any(target in value for target in TARGETS):  # a target given here replaces the file's target
                kept = {name: each for name, each in kept.items() if name not in TARGETS}
            value = {**kept, **value}
        if value not in (None, [], {}):
            document[key] = value
    changed = {change.partition("=")[0] for change in changes}
    called = {path: flag for path, flag in called.items() if path not in changed}
    return Recipe.of(override(document, changes), called=called)


def preview(
    recipe: Recipe,
    overwrite: bool,
    trust_remote_code: bool,
    memory: str | None = None,
    *,
    json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """A dry run: everything up to the plan, and whether the target could be written."""
    from surgery.pipeline.merge import check, doubt_of, fits_into, prepare
    from surgery.settings.resources import Resources
    from surgery.settings.target import warn_of_percentage

    from . import console, planned

    with console.working(quiet=quiet, json_wanted=json):
        resources = Resources.of({"memory": memory})
        check(recipe, overwrite=overwrite)
        warn_of_percentage(recipe.parameters.max_error)
        prepared = prepare(recipe, trust_remote_code=trust_remote_code, read=False)
        fits_into(prepared, resources)
        doubt = doubt_of(prepared)
    if json:
        console.emit(planned.plan_json(prepared) | {"warning": doubt})
    elif not quiet:
        planned.print_plan(prepared, verbose=verbose)
        if doubt:
            console.say(doubt)


def run(
    recipe: Recipe,
    overwrite: bool,
    trust_remote_code: bool,
    memory: str | None = None,
    *,
    json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """The merge itself, then what it did."""
    from surgery.pipeline.merge import merge

    from . import console, outcome

    with console.working(quiet=quiet, json_wanted=json), console.going_on(recipe.out):
        joint = merge(recipe, overwrite=overwrite, trust_remote_code=trust_remote_code, memory=memory)
    folder = Path(recipe.out or "")
    if json:
        console.emit(outcome.result_json(joint, folder))
    elif not quiet:
        outcome.print_result(joint, folder, verbose=verbose)
        outcome.print_next(joint, folder, trust_remote_code)
