"""Finds, by short trainings, which member of a source a new task should begin as."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

from surgery.artifact import load
from surgery.core.joint import JointModel
from surgery.core.registry import find_method
from surgery.core.tensor_method import States, TensorMethod
from surgery.errors import PlanError
from surgery.settings.training import Training
from surgery.training.checking import require_source
from surgery.training.tasks.domains import adapting
from surgery.training.tasks.tasks import Task
from surgery.training.train import train
from surgery.util.progress import track

STEPS = 50  # of a trial, or a generation's, if that has fewer


def load_source(folder: str, trust: bool) -> JointModel:
    """The artifact that a run begins from, or adapts from.

    Args:
        folder: of the artifact.
        trust: whether files that it names may run.

    Raises:
        SurgeryError: where it cannot be loaded.
    """
    require_source(folder)
    return load(folder, trust_remote_code=trust)


def begin_from_source(
    joint: JointModel,
    tasks: Sequence[Task],
    config: Training,
    source: JointModel,
    *,
    seed: int,
    cpu: bool,
) -> Training:
    """Give a joint model what its method takes of a source, as it suits its tasks best.

    Args:
        joint: as `join` made it.
        tasks: of its members.
        config: settings; with `like`, nothing is tried.
        source: as `load_source` returns it.
        seed: of everything that is drawn at random.
        cpu: whether trials stay on the CPU.

    Returns:
        The settings with `like` filled in.

    Raises:
        PlanError: where the source has nothing for the joint model, or a task that adapts could begin as several of its
            members, since without labels trials tell nothing.
    """
    method, states = find_method(joint.plan.method, TensorMethod), source.collapse()
    names = method.candidates(joint, states)
    if config.like is None and len(names) > 1 and (adapted := adapting(tasks)):
        raise PlanError(
            f"Task {', '.join(adapted)} adapts without labels, so no trial can tell which member of the source to "
            f"begin as: name it in train.templates.like, one of {', '.join(names)}."
        )
    like = config.like or best_of(joint, tasks, config, states, names, seed=seed, cpu=cpu)
    method.begin_as(joint, states, like, config, seed)
    return config.beginning_as(like)


def best_of(
    joint: JointModel,
    tasks: Sequence[Task],
    config: Training,
    states: States,
    names: Sequence[str],
    *,
    seed: int,
    cpu: bool,
) -> str:
    """The name with which a short training ends at the lowest loss, on validation data where tasks have some."""
    if len(names) == 1:
        return names[0]
    short, method = config.trial(STEPS), find_method(joint.plan.method, TensorMethod)
    losses = {}
    for name in track(names, "Trying sources"):
        twin = deepcopy(joint)
        method.begin_as(twin, states, name, short, seed)
        found = train(twin, tasks, short, seed=seed, cpu=cpu)
        reached = {task: score.loss or 0.0 for task, score in found.scores.items()}
        losses[name] = sum(reached.get(task.name, 0.0) * task.weight for task in tasks)
    return min(losses, key=losses.__getitem__)
