"""Pairs tasks that adapt without labels with their source domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from surgery.core.joint import JointModel
from surgery.errors import PlanError
from surgery.permission import Permission
from surgery.settings.recipe import Recipe, TaskSpec
from surgery.settings.training import Adaptation
from surgery.training.tasks.features import SourceFeatures, features_of
from surgery.training.tasks.losses import adapts_by
from surgery.training.tasks.parts import First
from surgery.training.tasks.sources import load_data, named_specs
from surgery.training.tasks.tasks import Task


def adapting(tasks: Sequence[Task]) -> list[str]:
    """The names of the tasks whose losses compare with a source."""
    return [task.name for task in tasks if adapts_by(task.loss)]


def with_sources(
    recipe: Recipe,
    tasks: Sequence[Task],
    source: JointModel,
    folder: str,
    like: str | None,
    permission: Permission,
    batches: int | None = None,
) -> list[Task]:
    """The same tasks; those that adapt know what the source's member makes of the data that it knows.

    Features are computed here, once, on the CPU: the source does not change.

    Args:
        recipe: whose tasks they are, and which says what the features are.
        tasks: as `make_tasks` made them.
        source: the artifact's members.
        folder: of the artifact, for log and report.
        like: the one of them whose features count; may be None where there is one alone.
        permission: of the recipe.
        batches: of the source's data that are looked at; all by default.

    Raises:
        PlanError: where the source has no such member, or that has no such part.
        LoadError: where the source's data cannot be read.
    """
    specs: Mapping[str, TaskSpec] = {name: spec for name, _, spec in named_specs(recipe)}
    found = []
    for task in tasks:
        adaptation = specs[task.name].adaptation
        if adaptation is not None and adapts_by(task.loss):
            member = _member(source, like)
            seen = _features(specs[task.name], adaptation, source, member, recipe.seed, permission, batches)
            task = replace(
                task, source=replace(seen, facts={"source": folder, "member": member, **seen.facts})
            )
        found.append(task)
    return found


def _features(
    spec: TaskSpec,
    adaptation: Adaptation,
    source: JointModel,
    member: str,
    seed: int,
    permission: Permission,
    batches: int | None,
) -> SourceFeatures:
    asked = {"data": adaptation.data, "options": adaptation.options, "batch": adaptation.batch or spec.batch}
    known = load_data(TaskSpec(**asked), source.members[member], seed, permission).train
    known = known if batches is None else First(known, batches)
    features = features_of(source, member, known, adaptation.part, seed)
    return SourceFeatures(adaptation.part, features, adaptation.settings, seed, asked)


def _member(source: JointModel, like: str | None) -> str:
    """The member whose features count.

    Raises:
        PlanError: where it is not named, though there are several, or is none of the source's.
    """
    if like is None and len(source.names) == 1:
        return source.names[0]
    if like not in source.names:
        raise PlanError(
            "Adaptation compares with one member of the source: name it in train.templates.like, one of "
            f"{', '.join(source.names)}, found {like}."
        )
    return like
