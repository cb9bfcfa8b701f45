"""A training recipe from its document to an artifact: load, join, train, save; and evaluation afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from surgery.artifact import load, save
from surgery.artifact.folder import read_recipe
from surgery.artifact.manifest import read_manifest
from surgery.artifact.recorded import origin_of
from surgery.core.joining import join
from surgery.core.joint import JointModel
from surgery.core.registry import methods_of
from surgery.disk.claims import claim_of_first
from surgery.disk.folders import check_target
from surgery.disk.records import remove_owned
from surgery.errors import ConsentError, LoadError, PlanError, SurgeryError
from surgery.members.member import Member, Origin
from surgery.members.references import load_origin, ships
from surgery.permission import Permission
from surgery.pipeline.finished import FOLDER, finished_run, going_on, run_folder
from surgery.pipeline.merge import Prepared, input_paths, load_entry, plan_members, prepare
from surgery.pipeline.trial import begin_from_source, load_source
from surgery.settings.recipe import Recipe
from surgery.training.checking import check_recipe, check_source
from surgery.training.report.report import TrainReport
from surgery.training.report.runlog import NAME as LOG
from surgery.training.tasks.domains import adapting, with_sources
from surgery.training.tasks.examples import TaskData
from surgery.training.tasks.losses import DISTILLATION, adapts_by, loss_of, terms_of
from surgery.training.tasks.rehearsal import rehearse_members
from surgery.training.tasks.score import Score
from surgery.training.tasks.sources import check_sources, load_data, make_tasks
from surgery.training.tasks.tasks import Task
from surgery.training.tasks.validation import evaluate
from surgery.training.train import fast, train


def prepare_training(recipe: Recipe, trust_remote_code: bool = False) -> Prepared:
    """Load and plan a training recipe's members; architectures from scratch get weights by the recipe's seed.

    A member's example inputs are the first that its task trains on, unless its factory gives some.

    Raises:
        PlanError: where the recipe has no `train` section, or names what cannot be had.
    """
    check_recipe(recipe)
    permission = Permission.of_user(trust_remote_code)
    data = TaskData(lambda spec, member: load_data(spec, member, recipe.seed, permission), recipe.seed)
    prepared = prepare(recipe, trust_remote_code=trust_remote_code, inputs=data.inputs)
    return replace(prepared, data=data)


def prepare_again(folder: str | Path, recipe: Recipe, *, trust_remote_code: bool = False) -> Prepared:
    """The members of an artifact, as they are, planned by the recipe that came with it.

    Raises:
        ConsentError: where the recipe or the artifact names code or files that were not consented to.
    """
    check_sources(recipe, Permission.of_artifact(trust_remote_code))
    loaded = load(folder, trust_remote_code=trust_remote_code)
    members = tuple(_members_again(loaded, recipe, trust_remote_code))
    anatomies, plan = plan_members(recipe, members, going_on=True)
    return Prepared(recipe, members, tuple(anatomies), plan, {})


def _members_again(loaded: JointModel, recipe: Recipe, trust_remote_code: bool) -> list[Member]:
    """The members of an artifact, and those that a recipe has besides, loaded from their references."""
    permission = Permission.of_user(trust_remote_code)
    data = TaskData(lambda spec, member: load_data(spec, member, recipe.seed, permission), recipe.seed)
    members = [loaded.copy_member(name) for name in loaded.names]
    for model in recipe.models:
        if model.name in loaded.names:
            continue
        more = [member for member, _ in load_entry(model, data.inputs, recipe, trust_remote_code)]
        if len(more) != 1:
            raise PlanError(
                f"A member that is added needs a reference to one model, but {model.model} holds {len(more)}: "
                "name one of them with its name in the folder, or extract it first."
            )
        members += more
    return members


def try_tasks(prepared: Prepared, *, own: bool = True, trust_remote_code: bool = False) -> None:
    """Read the data of a recipe's tasks and try a batch of each with its member, as a run does before its first step.

    Args:
        prepared: members and recipe.
        own: whether the user wrote the recipe; False where it came with an artifact.
        trust_remote_code: whether Python code that an artifact names may run.

    Raises:
        SurgeryError: for data that cannot be read, or do not suit member, loss or metric.
    """
    members = {member.name: member for member in prepared.members}
    recipe = _trained(prepared.recipe)
    tasks = make_tasks(recipe, members, _permission(own, trust_remote_code), prepared.data)
    rehearse_members({name: member.module for name, member in members.items()}, tasks, prepared.recipe.seed)


def train_recipe(
    recipe: Recipe,
    *,
    prepared: Prepared | None = None,
    joint: JointModel | None = None,
    resume: bool = False,
    fast_run: bool = False,
    overwrite: bool = False,
    own: bool = True,
    trust_remote_code: bool = False,
    cpu: bool = False,
) -> tuple[JointModel, TrainReport]:
    """Train what a recipe names and write `recipe.out` where it is given.

    Args:
        recipe: with a `train` section.
        prepared: its members, where they are loaded already.
        joint: a joint model with the recipe's members to go on from, in place of joining them anew; its
            alignment is the start.
        resume: whether to go on with an interrupted run for the same `out`.
        fast_run: go through every phase in seconds, to see that all of it works.
        overwrite: whether `recipe.out` may be replaced.
        own: whether the user wrote the recipe, and so may name functions that run; False where it came with an
            artifact.
        trust_remote_code: whether Python files that come with a model or an artifact may run.
        cpu: whether to stay on the CPU.

    Raises:
        SurgeryError: for bad input, or where training cannot go on.
    """
    permission = _permission(own, trust_remote_code)
    check_sources(recipe, permission)
    check_recipe(recipe, going_on=joint is not None)
    if joint is None:
        check_source(recipe)
    if resume and recipe.out is not None and (done := finished_run(recipe, fast_run=fast_run)) is not None:
        return load(recipe.out, trust_remote_code=trust_remote_code), done
    if recipe.out is not None:
        check_target(recipe.out, overwrite=overwrite, inputs=input_paths(recipe, going_on=joint is not None))
    cpu = cpu or recipe.device == "cpu"
    given = {"resume": resume, "fast_run": fast_run, "overwrite": overwrite, "cpu": cpu}
    with claim_of_first(recipe.out):
        return _train_recipe(
            recipe, prepared, joint, permission, trust_remote_code=trust_remote_code, **given
        )


def _train_recipe(
    recipe: Recipe,
    prepared: Prepared | None,
    joint: JointModel | None,
    permission: Permission,
    *,
    resume: bool,
    fast_run: bool,
    overwrite: bool,
    trust_remote_code: bool,
    cpu: bool,
) -> tuple[JointModel, TrainReport]:
    """`train_recipe`, with its target checked and held by this process."""
    assert recipe.train is not None
    source = recipe.train.source
    folder = None if recipe.out is None else run_folder(recipe.out)
    if joint is None:
        prepared = prepared or prepare_training(recipe, trust_remote_code)
        recipe = prepared.recipe
        joint = join(prepared.members, prepared.plan)
    else:
        recipe = going_on(recipe)
    read = None if prepared is None else prepared.data
    config, tasks = recipe.train, make_tasks(_trained(recipe), joint.members, permission, read)
    assert config is not None
    if fast_run:
        config, tasks = fast(config, tasks)
    if source is not None and (config.source is not None or adapting(tasks)):
        given = load_source(source, trust_remote_code)
        if config.source is not None:  # not where an artifact that began from it goes on
            config = begin_from_source(joint, tasks, config, given, seed=recipe.seed, cpu=cpu)
        seen = 2 if fast_run else None
        tasks = with_sources(recipe, tasks, given, source, config.like, permission, seen)
        del given  # as large as the members
    if folder is not None and overwrite and not resume and _is_main():
        remove_owned(folder)  # an earlier run's, now that nothing else can go wrong
    report = train(joint, tasks, config, folder=folder, resume=resume, seed=recipe.seed, cpu=cpu)
    joint.recipe = recipe.recorded()
    if recipe.out is not None and folder is not None and _is_main():
        extras = {f"{FOLDER}/{LOG}": (folder / LOG).read_bytes(), **_pictures(folder / LOG)}
        save(joint, recipe.out, overwrite=overwrite, recipe=joint.recipe, extras=extras)
        remove_owned(folder)
    return joint, report


def _trained(recipe: Recipe) -> Recipe:
    """The recipe without the tasks of members that stay as they are."""
    keep = recipe.train.keep if recipe.train is not None else ()
    models = [m.model_copy(update={"tasks": ()}) if m.name in keep else m for m in recipe.models]
    return recipe.model_copy(update={"models": tuple(models)})


def _permission(own: bool, trust_remote_code: bool) -> Permission:
    """Of a recipe that the user wrote, or of one that came with an artifact."""
    return (Permission.of_user if own else Permission.of_artifact)(trust_remote_code)


def rejoin(
    folder: str | Path, recipe: Recipe, *, own: bool = False, trust_remote_code: bool = False
) -> JointModel:
    """The members of an artifact joined by a recipe's parameters, to be trained further.

    They go on from the weights that they have, and from their hypermodules where the recipe's blocks are still those
    of the artifact; tensors that are equal, up to a factor, are shared too. A tensor that does not change later is
    stored as the artifact stores it. Members that the recipe has besides are loaded from their references.

    Args:
        folder: the artifact.
        recipe: to go on with.
        own: whether the user wrote the recipe; by default it came with the artifact.
        trust_remote_code: whether Python code that the artifact names may run.

    Raises:
        ConsentError: where the recipe or the artifact names code or files that were not consented to.
    """
    check_sources(recipe, _permission(own, trust_remote_code))
    loaded = load(folder, trust_remote_code=trust_remote_code)
    members = _members_again(loaded, recipe, trust_remote_code)
    plan = plan_members(recipe, members, going_on=True)[1]
    joint = join(members, plan)
    for method in methods_of(plan):
        method.take_over(joint, loaded)
    joint.refresh()
    joint.encoded = dict(loaded.encoded)  # what training leaves as it is keeps its stored form
    joint.keep_known(replace(loaded.known, stale=frozenset(joint.names)))  # as they are to be trained
    return joint


def evaluate_artifact(
    source: str | Path,
    *,
    members: Sequence[str] | None = None,
    part: str = "test",
    data: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Score]:
    """Measure the members of an artifact on the tasks that its recipe names.

    Of a task that adapted to a domain the metric is measured, on the labels that it did not learn from.

    Args:
        source: the artifact.
        members: those to be measured; all by default.
        part: of the data; tasks without it are measured on `validation`, or else on what they were trained on.
        data: in place of the data that the recipe names.
        trust_remote_code: whether functions that the artifact names may run, and files that it names be read.

    Raises:
        ConsentError: where the artifact names such functions or files.
        PlanError: where the artifact has no recipe with tasks.
    """
    joint = load(source, members=members, trust_remote_code=trust_remote_code)
    recipe = recipe_of(joint)
    if not any(model.tasks for model in recipe.models):
        raise PlanError(
            f"An artifact is evaluated on the tasks that it records, but {source} was not trained and records none: "
            "give a folder that joint training wrote, or measure its members in Python."
        )
    chosen = [model for model in recipe.models if model.name in joint.names]
    if data is not None:
        chosen = [
            model.model_copy(
                update={"tasks": tuple(t.model_copy(update={"data": data}) for t in model.tasks)}
            )
            for model in chosen
        ]
    recipe = recipe.model_copy(update={"models": tuple(chosen)})
    permission = Permission.of_artifact(trust_remote_code)
    # Data that the user names need no further consent.
    reading = permission if data is None else Permission.of_user(trust_remote_code)
    scores: dict[str, Score] = {}
    try:
        tasks = make_tasks(recipe, joint.members, reading)
    except SurgeryError as error:
        raise error if data is None else type(error)(f"`data`: {error}") from error
    for task in tasks:
        held = getattr(task, part) or task.validation or task.data
        losses = {}
        if not adapts_by(task.loss):  # an artifact holds nothing of the source that a member was adapted to
            losses[task.name] = loss_of(task.loss, partial(_original, joint, task, permission, recipe.seed))
        scores |= evaluate(joint, [replace(task, test=held)], losses, "test", recipe.seed)
    return scores


def needs_consent(source: str | Path) -> bool:
    """Whether an artifact names code or files outside of it, so that evaluating it takes `trust_remote_code`.

    Args:
        source: the artifact.
    """
    folder = Path(source).expanduser()
    manifest = read_manifest(folder)
    origins = {name: origin_of(manifest, name) for name in manifest.members}
    if any(is_foreign(origin) for origin in origins.values()):
        return True
    recipe = read_recipe(folder, manifest) or Recipe()
    try:
        check_sources(recipe.model_copy(update={"train": None}), Permission.NONE)
    except ConsentError:
        return True
    distilled = [
        model.name for model in recipe.models for task in model.tasks if DISTILLATION in terms_of(task.loss)
    ]
    return any(name in origins and not ships(origins[name]) for name in distilled)


def is_foreign(origin: Origin) -> bool:
    """Whether a member was made by a function that does not ship with this package."""
    return origin.kind == "factory" and not ships(origin)


def _original(joint: JointModel, task: Task, permission: Permission, seed: int) -> nn.Module:
    """The member that a task distils, from where it came: the artifact has it as trained.

    Raises:
        ConsentError: where it lies outside of the artifact and the permission does not cover that.
        LoadError: where it is no longer there.
    """
    origin = joint.members[task.member].origin
    if not ships(origin):
        permission.require(Permission.OWN, f"the loss of task '{task.name}' loads {origin.reference}")
    try:
        inputs = joint.members[task.member].inputs
        member = load_origin(origin, name=task.member, permission=permission, seed=seed, inputs=inputs)
    except ConsentError:
        raise
    except SurgeryError as error:
        raise LoadError(
            f"The loss of task '{task.name}' compares with member '{task.member}' as it was before, but this cannot be "
            f"loaded again: {error}"
        ) from error
    return member.module.eval().requires_grad_(False)


def recipe_of(joint: JointModel) -> Recipe:
    """The recipe that a loaded joint model came with.

    Raises:
        PlanError: where it has none.
    """
    if joint.recipe is None:
        raise PlanError(
            "The artifact must hold a recipe with tasks, but has no recipe: it was saved from Python."
        )
    return joint.recipe


def _pictures(log: Path) -> dict[str, bytes]:
    from surgery.training.report.pictures import draw_run

    return {f"{FOLDER}/{name}": content for name, content in draw_run(log).items()}


def _is_main() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process
