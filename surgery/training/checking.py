"""Checks a training run before slow work and names everything wrong in one error.

One set of rules serves recipes as they are checked, dry runs, runs and `surgery.train` in Python. Nothing
that a recipe names is loaded, imported or run here. What needs data and members is tried later (`rehearsal.py`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from surgery.anatomy.selectors import share_selectors
from surgery.core.registry import with_settings
from surgery.errors import LoadError, PlanError, SurgeryError
from surgery.members.origins.definitions import function_problem
from surgery.members.origins.factory import claims as is_factory
from surgery.members.references import parse_reference
from surgery.settings.former import renewed
from surgery.settings.names import TARGETS
from surgery.settings.problems import advice_on, problems_of
from surgery.settings.quantities import check_seed
from surgery.settings.recipe import NOTHING, Recipe
from surgery.settings.training import Training
from surgery.training.report.trackers import check_trackers
from surgery.training.tasks.losses import TARGETED, adapts_by, loss_problems
from surgery.training.tasks.metrics import measure_of
from surgery.training.tasks.sources import ENDINGS, is_function, no_source
from surgery.training.tasks.sources_hub import PREFIX
from surgery.training.tasks.sources_text import TEXT_ENDINGS
from surgery.util.wording import sentence

if TYPE_CHECKING:
    from surgery.anatomy.plan import Plan
    from surgery.core.joint import JointModel
    from surgery.training.tasks.tasks import Task

OFFERED = ("batch", "seed", "member")
SPLITS = ("validation", "test")
TEXT = ("text", "target", "length", "tokenizer", *SPLITS)
HUB = ("name", "splits", "inputs", *TEXT)


def check_document(
    document: Mapping[str, Any], going_on: bool = False, called: Mapping[str, str] = NOTHING
) -> Recipe:
    """The recipe of a document, whose losses, metrics, data and trackers can be had.

    Args:
        document: as YAML reads it.
        going_on: whether its members come from an artifact.
        called: as in `Recipe.of`.

    Raises:
        PlanError: naming all that is wrong with keys, values and names.
    """
    return Recipe.of(document, recipe_problems(document, going_on), called)


def check_recipe(recipe: Recipe, going_on: bool = False) -> None:
    """Check a recipe that was validated already as `check_document` checks a document.

    Args:
        recipe: with a `train` section.
        going_on: whether its members come from an artifact.

    Raises:
        PlanError: naming all that is wrong, or that there is no `train` section.
    """
    if recipe.train is None:
        raise PlanError("A training recipe needs a section 'train', if only 'train: {}'.")
    if wrong := recipe_problems(recipe.model_dump(), going_on):
        raise PlanError(sentence(f"The recipe is not valid: {'; '.join(wrong)}"))


def recipe_problems(document: Mapping[str, Any], going_on: bool = False) -> list[str]:
    """All that is wrong with what a training recipe names; parts of a wrong form are left to its validation."""
    train = document.get("train")
    if train is None:
        return []
    wrong: list[str] = []
    models = [each for each in _list(document.get("models")) if isinstance(each, Mapping)]
    for number, model in enumerate(models):
        reference = parse_reference(str(model.get("model") or "none"))[1]
        if not going_on and is_factory(reference):
            head, _, options = reference.partition("?")
            names = [each.partition("=")[0] for each in options.split("&") if each]
            wrong += _at(f"models.{number}.model", [function_problem(head, names)])
        for place, task in enumerate(_list(model.get("tasks"))):
            if isinstance(task, Mapping):
                wrong += _spec_problems(f"models.{number}.tasks.{place}", task)
    if not any(_list(model.get("tasks")) for model in models):
        wrong.append("no model has tasks: give at least one of them a list 'tasks'")
    tasks = [each for model in models for each in _list(model.get("tasks")) if isinstance(each, Mapping)]
    wrong += _repeated([each["name"] for each in tasks if isinstance(each.get("name"), str)])
    parameters = document.get("parameters")
    if not going_on and isinstance(parameters, Mapping):
        wrong += [
            f"parameters.{name}: this is the target of a fit, and training has none: leave it out, and give it to a "
            "merge of the trained artifact"
            for name in TARGETS
            if parameters.get(name) is not None
        ]
    if isinstance(train, Mapping):
        trackers = [each for each in _list(train.get("trackers")) if isinstance(each, str)]
        wrong += _caught(check_trackers, trackers) if trackers else []
    return wrong


def check_source(recipe: Recipe) -> None:
    """Check that the artifact is there that training begins from, if there is one.

    Raises:
        LoadError: where it is not.
    """
    if recipe.train and (source := recipe.train.source) is not None:
        require_source(source)


def require_source(source: str) -> None:
    """Check that the artifact's folder is there.

    Raises:
        LoadError: where it is not.
    """
    if not Path(source).expanduser().is_dir():
        raise LoadError(
            f"The source {source} does not exist: name a folder that a training run wrote "
            "with `train.templates.source=DIR`."
        )


def check_run(
    joint: JointModel,
    tasks: Sequence[Task],
    config: Training | Mapping[str, Any] | None,
    settings: Mapping[str, Any] | None,
    folder: object,
    seed: int,
) -> tuple[Training, Plan]:
    """The settings of a run in Python, which suit its members and tasks, and the plan with those of its method.

    Raises:
        PlanError: naming all that is wrong.
    """
    wrong = _task_problems(joint, tasks)
    training, plan = config if isinstance(config, Training) else Training(), joint.plan
    if not isinstance(config, Training):
        given = {
            "method": plan.method,
            "settings": dict(settings or {}),
            "train": dict(config or {}),
        }
        today, twice = renewed(given)
        settings, wrong = today["settings"], wrong + twice
        try:
            training = Training.model_validate(today["train"])
        except ValidationError as error:
            wrong += problems_of(error, Training, "train")
    try:
        plan = with_settings(plan, settings or {})
    except PlanError as error:
        wrong.append(str(error).removesuffix("."))
    wrong += _caught(check_seed, seed)
    if training.trackers and folder is None:
        wrong.append("train.trackers write to a folder: give train(..., folder=...)")
    wrong += _caught(check_trackers, training.trackers)
    names = {name: list(joint.private(name)) for name in joint.names}
    for key in ("share", "freeze"):
        wrong += _caught(share_selectors, getattr(training, key), names, f"train.{key}")
    wrong += [
        f"train.optimizer.rates are of members {', '.join(joint.names)}, found {name}"
        for name in training.optimizer.rates
        if name not in joint.names
    ]
    wrong += _keep_problems(joint, tasks, training.keep)
    if wrong:
        raise PlanError(
            sentence(f"Training needs settings and tasks that fit the joint model; found: {'; '.join(wrong)}")
        )
    return _with_rates(training, tasks), plan


def _keep_problems(joint: JointModel, tasks: Sequence[Task], keep: Sequence[str]) -> list[str]:
    """Why members cannot stay as they are."""
    wrong = [
        f"train.keep names members of {', '.join(joint.names)}, found {name}"
        for name in keep
        if name not in joint.names
    ]
    wrong += [
        f"task '{task.name}' trains member '{task.member}', which train.keep says stays as it is"
        for task in tasks
        if task.member in keep
    ]
    others = sorted({bank.method for bank in joint.plan.banks} - {"hypermodules"}) if keep else []
    return wrong + [f"train.keep is for banks of hypermodules, found banks of {name}" for name in others]


def _with_rates(training: Training, tasks: Sequence[Task]) -> Training:
    """The settings with the learning rates that tasks ask for their members."""
    rates = {**training.optimizer.rates, **{task.member: task.lr for task in tasks if task.lr is not None}}
    if rates == training.optimizer.rates:
        return training
    return training.model_copy(update={"optimizer": training.optimizer.model_copy(update={"rates": rates})})


def _task_problems(joint: JointModel, tasks: Sequence[Task]) -> list[str]:
    wrong = _repeated([task.name for task in tasks])
    for task in tasks:
        said = f"task '{task.name}'"
        if task.member not in joint.names:
            wrong.append(
                f"{said} trains member '{task.member}', but the members are {', '.join(joint.names)}"
            )
        if task.data is None:
            wrong.append(f"{said} has no data")
        if not task.weight > 0:
            wrong.append(f"{said} has weight {task.weight}, not above 0")
        if task.lr is not None and not 0 < task.lr < inf:
            wrong.append(f"{said} has a learning rate of {task.lr}, not above 0")
        wrong += [f"{said}: {each}" for each in loss_problems(task.loss)]
        wrong += [f"{said}: {each}" for each in _metric_problems(task.metric)]
    for member in dict.fromkeys(task.member for task in tasks):
        rates = {task.name: task.lr for task in tasks if task.member == member}
        if len(set(rates.values())) > 1:
            said = ", ".join(f"{rate} of '{name}'" for name, rate in rates.items())
            wrong.append(f"the tasks of member '{member}' must have one learning rate, but have {said}")
    return wrong or ([] if tasks else ["there is no task"])


def _spec_problems(where: str, spec: Mapping[str, Any]) -> list[str]:
    """What is wrong with the names in a recipe's task."""
    loss, metric = spec.get("loss", "cross_entropy"), spec.get("metric")
    wrong: list[str] = []
    if isinstance(loss, str) or (
        isinstance(loss, Mapping) and all(isinstance(w, int | float) for w in loss.values())
    ):
        found = loss_problems(loss)
        wrong += _at(f"{where}.loss", found)
        if not found and spec.get("labels") is False:
            names = [loss] if isinstance(loss, str) else loss
            compared = [name for name in names if name in TARGETED]
            wrong += [
                f"{where}.labels: {name} compares with targets, which training does not see"
                for name in compared
            ]
        if not found and adapts_by(loss) and spec.get("adaptation") is None:
            wrong.append(
                f"{where}.adaptation: {', '.join(adapts_by(loss))} needs it: what to compare features with"
            )
    if isinstance(metric, str | Mapping):
        wrong += _at(f"{where}.metric", _metric_problems(metric))
    adaptation = spec.get("adaptation")
    for place, each in ((where, spec), (f"{where}.adaptation", adaptation)):
        if isinstance(each, Mapping) and isinstance(each.get("data"), str):
            wrong += _source_problems(place, each["data"], each.get("options"))
    return wrong


def _metric_problems(metric: Any) -> list[str]:
    if not isinstance(metric, str | Mapping):
        able = metric is None or all(
            hasattr(metric, name) for name in ("update", "compute", "reset", "clone")
        )
        return (
            [] if able else [f"a metric is a name or a torchmetrics metric, found a {type(metric).__name__}"]
        )
    return _caught(measure_of, metric)


def _source_problems(where: str, data: str, options: Any) -> list[str]:
    """What is wrong with where a task's data come from."""
    given = dict(options) if isinstance(options, Mapping) else {}
    if is_function(data):
        return _at(f"{where}.data", [function_problem(data, given, OFFERED)])
    if data.startswith(PREFIX):
        known = HUB
        if importlib.util.find_spec("datasets") is None:
            return [f'{where}.data: {data} needs the package datasets: pip install "model-surgery[datasets]"']
    elif data.endswith((*ENDINGS, *TEXT_ENDINGS)):
        known = TEXT if data.endswith(TEXT_ENDINGS) else SPLITS
        if not Path(data).expanduser().is_file():
            return [f"{where}.data: the data file {data} does not exist"]
    else:
        return [f"{where}.data: {no_source(data)}"]
    strange = [name for name in given if name not in known]
    return [f"{where}.options: '{name}' is not a known option, {advice_on(name, known)}" for name in strange]


def _repeated(names: Sequence[str]) -> list[str]:
    return [f"task '{n}' is given more than once" for n in sorted({n for n in names if names.count(n) > 1})]


def _caught(check: Any, *arguments: Any) -> list[str]:
    """What a check refuses, as a part of a longer sentence."""
    try:
        check(*arguments)
    except SurgeryError as error:
        return [str(error).removesuffix(".")]
    return []


def _at(where: str, found: Sequence[str | None]) -> list[str]:
    return [f"{where}: {each}" for each in found if each]


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []
