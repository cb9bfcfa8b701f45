"""Merge: a recipe in, a fitted joint model out, written as an artifact where the recipe says so.

The stages are functions of their own, so that a dry run can stop at the plan: `check` (before anything slow),
`prepare` (load, discover, plan), `merge` (join, fit, save).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.anatomy.selectors import share_selectors
from surgery.disk.claims import claim_of_first
from surgery.disk.folders import check_target
from surgery.disk.untrusted import UnreadableError
from surgery.errors import LoadError, PlanError
from surgery.safetensors.header import parse_header
from surgery.settings.recipe import Model, Recipe, TaskSpec, method_settings
from surgery.settings.resources import Resources
from surgery.settings.target import Target
from surgery.util.progress import task, track

if TYPE_CHECKING:
    from surgery.anatomy.plan import Plan
    from surgery.anatomy.sites import Anatomy
    from surgery.core.joint import JointModel
    from surgery.members.member import Inputs, Member
    from surgery.pipeline.going_on import Run


PREPARING = 50_000_000  # bytes of libraries that further members import, and of traces


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before weights are joined: what a dry run shows.

    Attributes:
        recipe: with every member's name filled in.
        members: loaded.
        anatomies: what was found in each member.
        plan: what goes into the dictionary.
        probes: real inputs by member, for those that have calibration files.
        data: of the tasks, where they were read already.
    """

    recipe: Recipe
    members: tuple[Member, ...]
    anatomies: tuple[Anatomy, ...]
    plan: Plan
    probes: Mapping[str, Sequence[Inputs]]
    data: Any = None

    @property
    def asked(self) -> dict[str, str]:
        """What settings fix, in words, by the method that makes it."""
        from surgery.fitting.scene import asked_of

        replaced = [each.method for each in self.plan.replacements]
        return asked_of(self.plan, self.recipe.parameters, replaced)

    def resolved(self) -> dict[str, Any]:
        """What an artifact records of the recipe."""
        return self.recipe.resolved(fixed=bool(self.asked))


def merge(
    recipe: Recipe,
    *,
    prepared: Prepared | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    memory: int | str | None = None,
) -> JointModel:
    """Run a recipe: load its members, join them, fit them to its target, and save to `recipe.out` where it is given.

    Where members are large, what is made lies in files beside `recipe.out`, and a merge that was killed goes on where
    it was when it is run again.

    Args:
        recipe: what to do.
        prepared: the result of `surgery.pipeline.merge.prepare` for this recipe, where it was made already; its modules
            are used up.
        overwrite: whether `recipe.out` may be replaced.
        trust_remote_code: whether Python files that come with a model may run.
        memory: the most that the process may hold besides pages of files, in bytes or as text such as `8GiB`, which
            says what is large; by default members of 512 MiB and more are.

    Returns:
        the fitted joint model; its `report` says what was met.

    Raises:
        SurgeryError: for bad input, before anything is written.
        MemoryLimitError: where more than `memory` was held after all.

    Example:
        >>> import surgery
        >>> models = [{"model": "./text"}, {"model": "./vision"}]
        >>> recipe = surgery.Recipe.of({"models": models, "parameters": {"budget": 0.5}, "out": "merged"})
        >>> surgery.merge(recipe).report.met
        True
    """
    resources = Resources.of({"memory": memory})
    check(recipe, overwrite=overwrite)
    from surgery.fitting.bound import within

    with claim_of_first(recipe.out):
        if prepared is None:
            with within(resources.memory, follows=partial(_still_takes, recipe)):
                prepared = prepare(recipe, trust_remote_code=trust_remote_code)
        with within(resources.memory):
            return _merge(recipe, prepared, overwrite, resources)


def _still_takes(recipe: Recipe) -> int:
    """Bytes that members which are not loaded yet take besides until they are fitted, as far as their files say."""
    from surgery.fitting.bound import taken
    from surgery.members.references import local_path

    elements: list[int] = []
    for path in filter(None, (local_path(model.model) for model in recipe.models)):
        for file in path.glob("*.safetensors") if path.is_dir() else [path]:
            with suppress(UnreadableError, OSError):  # of another format, or damaged, which loading says
                elements += [math.prod(shape) for _, shape in parse_header(file).tensors.values()]
    return PREPARING + taken(elements, lossless=recipe.parameters.max_error == 0)


def _merge(recipe: Recipe, prepared: Prepared, overwrite: bool, resources: Resources) -> JointModel:
    """`merge` of what was prepared, with its target checked and held by this process."""
    from surgery.members.member import state_tensors
    from surgery.pipeline.going_on import going_on

    tensors = [t for member in prepared.members for t in state_tensors(member.module).values()]
    fits, paths = fits_into(prepared, resources), input_paths(prepared.recipe)
    large = None if fits is None else not fits
    with going_on(recipe.out, tensors, partial(_subject, prepared), paths, large) as run:
        return _fit_and_save(prepared, recipe, overwrite, run)


def fits_into(prepared: Prepared, resources: Resources) -> bool | None:
    """Whether a merge fits into the memory that it may take without files; None where it has no bound.

    Raises:
        PlanError: where it fits with files neither.
    """
    from surgery.fitting.bound import fits
    from surgery.members.member import state_tensors

    if resources.memory is None:
        return None
    tensors = [t for member in prepared.members for t in state_tensors(member.module).values()]
    return fits(
        [t.numel() for t in tensors], resources.memory, lossless=prepared.recipe.parameters.max_error == 0
    )


def _fit_and_save(prepared: Prepared, recipe: Recipe, overwrite: bool, run: Run) -> JointModel:
    """A joint model of what was prepared, of which an interrupted run had made some parts already."""
    from surgery.artifact.folder import save_fitted
    from surgery.core.joining import join
    from surgery.fitting.fit import fit

    with task("Joining") as work:
        joint = join(prepared.members, prepared.plan)
        work.describe(run.fitting)
        joint = fit(
            joint,
            **{name: getattr(recipe.parameters, name) for name in Target.model_fields},
            probes=prepared.probes or None,
            seed=recipe.seed,
            device=recipe.device,
        )
        joint.recipe = Recipe.of(prepared.resolved())
        if recipe.out is not None:
            work.describe(f"Writing {recipe.out}")
            save_fitted(joint, recipe.out, overwrite=overwrite, sources=run.sources)
    return joint


def _subject(prepared: Prepared) -> dict[str, Any]:
    """What a merge computes."""
    return {"recipe": {name: value for name, value in prepared.resolved().items() if name != "out"}}


def check(recipe: Recipe, *, overwrite: bool = False) -> None:
    """Find what can be found wrong before a model is loaded.

    Raises:
        PlanError: no models, names given twice.
        LoadError: a calibration file that cannot be read, a name that is none.
        OutputError: a target that exists or cannot be written.
    """
    if not recipe.models:
        raise PlanError(
            "A merge needs at least one model, found none: give references or a recipe with 'models'."
        )
    check_calibration(recipe)
    if recipe.out is not None:
        check_target(recipe.out, overwrite=overwrite, inputs=input_paths(recipe))
    from surgery.members.member import check_names  # imports torch: last
    from surgery.members.references import check_name, parse_reference

    names = [model.name or parse_reference(model.model)[0] for model in recipe.models]
    check_names(name or model.model for name, model in zip(names, recipe.models, strict=True))
    for name in filter(None, names):
        check_name(name)


def doubt_of(prepared: Prepared) -> str:
    """Why the budget of what was prepared may not be met, in words; empty without one, or where nothing is known.

    Raises:
        PlanError: where it cannot be met.
    """
    from surgery.fitting.reach import check_reach
    from surgery.members.member import owners_of, state_tensors

    budget = prepared.recipe.parameters.budget
    if budget is None or prepared.recipe.train is not None:
        return ""
    kinds = {}
    for member in prepared.members:
        state = state_tensors(member.module)
        kinds[member.name] = [
            (tuple(state[name].shape), state[name].dtype) for name in owners_of(member.module)
        ]
    return check_reach(budget, kinds)


def check_calibration(recipe: Recipe) -> None:
    """Whether the files with real inputs that a recipe names can be read.

    Raises:
        LoadError: naming the first that cannot.
    """
    files = [split_calibration(entry)[1] for entry in recipe.calibrate]
    for file in (*files, *(model.calibrate for model in recipe.models if model.calibrate)):
        path = Path(file).expanduser()
        if not path.exists() or not os.access(path, os.R_OK):
            found = "cannot be read" if path.exists() else "does not exist"
            raise LoadError(f"`calibrate` must name readable files or folders, but {path} {found}.")


def input_paths(recipe: Recipe, *, going_on: bool = False) -> list[Path]:
    """The files and folders on this machine that a recipe reads: models, calibration files, data, a source.

    Args:
        recipe: what will be run.
        going_on: whether its members come from elsewhere than its references say.
    """
    from surgery.members.references import local_path

    named = [split_calibration(entry)[1] for entry in recipe.calibrate]
    for model in recipe.models:
        named += [str(local_path(model.model) or "")] * (not going_on)
        named += [model.calibrate or "", *(task.data for task in model.tasks)]
    named += [recipe.train.source or ""] if recipe.train is not None else []
    return [path for path in (Path(name).expanduser() for name in named if name) if path.exists()]


def prepare(
    recipe: Recipe,
    *,
    trust_remote_code: bool = False,
    inputs: Callable[[Model, Member], Inputs | None] | None = None,
    read: bool = True,
) -> Prepared:
    """Load the members, find their sites, read calibration files and plan the dictionary; nothing is changed.

    Args:
        recipe: what to do.
        trust_remote_code: whether Python files that come with a model may run.
        inputs: gives example inputs of a recipe's model, or None for those that it has otherwise.
        read: whether weights are read, to see that they are finite.

    Raises:
        SurgeryError: where a member cannot be loaded or traced, a selector matches nothing, or no plan
        exists.
    """
    from surgery.members.references import check_references
    from surgery.tracing import recorded_once
    from surgery.util.devices import pick_device

    check_references(model.model for model in recipe.models)
    if recipe.train is None and recipe.device != "auto":
        pick_device(recipe.device)
    with recorded_once():
        members, models = _load_members(recipe, inputs, trust_remote_code, read)
        anatomies, plan = plan_members(recipe, members)
    settings = method_settings(recipe.method, recipe.settings)
    named = recipe.model_copy(update={"models": tuple(models), "settings": settings})
    with task("Reading calibration files"):
        probes = read_probes(named, members)
    return Prepared(named, tuple(members), tuple(anatomies), plan, probes)


def _load_members(
    recipe: Recipe,
    inputs: Callable[[Model, Member], Inputs | None] | None,
    trust_remote_code: bool,
    read: bool,
) -> tuple[list[Member], list[Model]]:
    """The members of a recipe, and its entries with their names and tasks."""
    from surgery.members.member import check_names
    from surgery.members.references import parse_reference

    members: list[Member] = []
    models: list[Model] = []
    for model in track(recipe.models, "Loading members"):
        for member, tasks in load_entry(model, inputs, recipe, trust_remote_code, read):
            check_names(each.name for each in (*members, member))
            members.append(member)
            entry: dict[str, Any] = {"model": parse_reference(model.model)[1], "name": member.name}
            if tasks and not model.tasks and recipe.train is None:  # what it was trained to do it still does
                entry["tasks"] = tasks
            models.append(model.model_copy(update=entry))
    return members, models


def load_entry(
    model: Model,
    inputs: Callable[[Model, Member], Inputs | None] | None,
    recipe: Recipe,
    trust_remote_code: bool,
    read: bool = True,
) -> list[tuple[Member, tuple[TaskSpec, ...]]]:
    """What a recipe's entry names: one member, or those of a folder that surgery wrote, as they are there.

    Each comes with the tasks that the folder says it was trained to do.
    """
    from surgery.disk.records import artifact_files
    from surgery.members.references import load_member, parse_reference

    name, reference = parse_reference(model.model)
    folder, name = Path(reference).expanduser(), model.name or name
    if not folder.is_dir() or not artifact_files(folder):
        given = None if inputs is None else partial(inputs, model)
        member = load_member(
            model.model,
            name=name,
            inputs=given,
            seed=recipe.seed,
            trust_remote_code=trust_remote_code,
            allow_nonfinite=recipe.allow_nonfinite,
            read=read,
        )
        return [(member, ())]
    from surgery.artifact import load

    chosen = None if name is None else [name]
    joint = load(folder, members=chosen, trust_remote_code=trust_remote_code)
    recorded = joint.recipe.models if joint.recipe is not None else ()
    tasks = {model.name: model.tasks for model in recorded}
    return [(joint.copy_member(each), tasks.get(each, ())) for each in joint.names]


def plan_members(
    recipe: Recipe, members: Sequence[Member], *, going_on: bool = False
) -> tuple[list[Anatomy], Plan]:
    """What was found in each member, and where its sites go, by a recipe's selectors and parameters.

    Args:
        recipe: with a method, which may replace modules first: anatomies are then of members with these in place.
        members: left as they are.
        going_on: whether members in which the method replaced modules already stay as they are.

    Raises:
        PlanError: where a selector matches nothing, no plan exists, or modules cannot be replaced.
        TraceError: where a member cannot be traced.
    """
    from surgery.anatomy.plan import make_plan, starting_block
    from surgery.core.method import PlanRequest
    from surgery.core.module_method import ModuleSurgery
    from surgery.core.registry import find_method, settings_of
    from surgery.core.replacing import modules_replaced, plan_replacements
    from surgery.core.tensor_method import TensorMethod

    method = find_method(recipe.method)
    given = settings_of(recipe.method, recipe.settings)
    # Defaults are what the recipe asks for.
    settings = settings_of(recipe.method, given.model_dump(mode="json"))

    def request(anatomies: Sequence[Anatomy] = ()) -> PlanRequest:
        block = recipe.parameters.block or starting_block(anatomies)
        return PlanRequest(block, recipe.parameters.context or 4, settings, recipe.select.stacks)

    if isinstance(method, TensorMethod):
        anatomies = _find_sites(recipe, members)
        return anatomies, method.plan(anatomies, request(anatomies))
    assert isinstance(method, ModuleSurgery)
    replacements = plan_replacements(recipe.method, members, request(), going_on=going_on)
    with modules_replaced(members, replacements) as changed:
        anatomies = _find_sites(recipe, changed)
    asked = request(anatomies)
    block = None if method.whole and not recipe.parameters.block else asked.block
    return anatomies, replace(make_plan(anatomies, block, asked.context), replacements=replacements)


def _find_sites(recipe: Recipe, members: Sequence[Member]) -> list[Anatomy]:
    """What is found in each member, by the recipe's selectors."""
    from surgery.anatomy.sites import discover
    from surgery.members.member import state_tensors

    names = {member.name: list(state_tensors(member.module)) for member in members}
    chosen: dict[str, Mapping[str, Any]] = {
        option: share_selectors(selectors, names, what=f"select.{option}")
        for option, selectors in recipe.select.model_dump(exclude={"stacks"}).items()
    }
    return [
        discover(each, **{option: shared[each.name] for option, shared in chosen.items()})
        for each in track(members, "Finding sites")
    ]


def split_calibration(entry: str) -> tuple[str | None, str]:
    """`NAME=FILE` as both; a path that happens to hold a `=`, or has no name in front, is left whole."""
    name, equals, file = entry.partition("=")
    if not equals or "/" in name or Path(entry).expanduser().exists():
        return None, entry
    return name, file


def read_probes(recipe: Recipe, members: Sequence[Member]) -> dict[str, list[Inputs]]:
    """Real inputs by member: from files that name it, and from common files that suit it where none does.

    Raises:
        LoadError: where a file cannot be read, a member's own file does not suit it, or a common file suits no member.
        PlanError: where a file is given for a member that does not exist.
    """
    from surgery.inputs.probes import probe_inputs

    check_calibration(recipe)
    entries = [split_calibration(entry) for entry in recipe.calibrate]
    own = [(model.name, model.calibrate) for model in recipe.models if model.calibrate]
    own += [(name, file) for name, file in entries if name is not None]
    names = [member.name for member in members]
    if unknown := sorted({name or "" for name, _ in own} - set(names)):
        raise PlanError(f"`calibrate` needs members, found {', '.join(unknown)}; known: {', '.join(names)}.")
    probes: dict[str, list[Inputs]] = {}
    for member in members:
        for file in [file for name, file in own if name == member.name]:
            probes.setdefault(member.name, []).extend(probe_inputs(member, seed=recipe.seed, calibrate=file))
    served = [member for member in members if member.name not in probes]
    for file in [file for name, file in entries if name is None]:
        failures: list[LoadError] = []
        for member in served:
            try:
                batches = probe_inputs(member, seed=recipe.seed, calibrate=file)
            except LoadError as error:
                failures.append(error)
            else:
                probes.setdefault(member.name, []).extend(batches)
        if len(failures) == len(served):
            raise (
                failures[0]
                if failures
                else PlanError(f"`calibrate`: every member has its own file, so {file} serves none.")
            )
    return probes
