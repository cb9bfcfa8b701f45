"""Runs one batch of every part of every task's data before the first step.

What does not fit is then said at once, and together, not after a first generation when held-out data are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import nn

from surgery.core.joint import JointModel
from surgery.errors import PlanError, SurgeryError, TrainingError
from surgery.training.tasks.explain import name_nan
from surgery.training.tasks.losses import adapts_by, loss_of
from surgery.training.tasks.metrics import Meter
from surgery.training.tasks.tasks import Loss, Task, as_batch
from surgery.training.tasks.validation import batches_of, measured
from surgery.util.modules import device_of, kept_modes
from surgery.util.randomness import seeded, seeded_others

PARTS = {"data": "data", "validation": "validation data", "test": "test data"}


@torch.no_grad()
def rehearse(
    members: JointModel | Mapping[str, nn.Module],
    tasks: Sequence[Task],
    losses: Mapping[str, Loss],
    seed: int = 0,
) -> None:
    """Try the first batches; data that can be iterated over only once are left alone.

    Args:
        members: by name; their modes are put back as they were.
        tasks: of these members.
        losses: by task.
        seed: of whatever the data draw at random.

    Raises:
        TrainingError: where a member, a loss or a metric cannot take a batch, or data raise something.
        PlanError: where data yield something else than batches, or no targets though a metric needs them.
    """
    names = dict.fromkeys(task.member for task in tasks)
    modules = [module for name in names for module in members[name].modules()]
    with kept_modes(modules):
        for module in modules:
            module.training = False
        tried = (_first_wrong(members, task, losses.get(task.name), seed) for task in tasks)
        wrong = [error for error in tried if error is not None]
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        kind = TrainingError if all(isinstance(each, TrainingError) for each in wrong) else PlanError
        raise kind(" ".join(f"{str(each).removesuffix('.')}." for each in wrong))


def rehearse_members(modules: Mapping[str, nn.Module], tasks: Sequence[Task], seed: int = 0) -> None:
    """The same for members that are not joined yet; ways of adaptation, whose source is not there, are left out."""
    able = [task for task in tasks if not adapts_by(task.loss)]
    losses = {task.name: loss_of(task.loss, lambda task=task: modules[task.member]) for task in able}
    rehearse(modules, tasks, losses, seed)


def _first_wrong(
    members: JointModel | Mapping[str, nn.Module], task: Task, loss: Loss | None, seed: int
) -> SurgeryError | None:
    """What is wrong with the first part of a task's data that cannot be taken; the other parts say the same again."""
    for part in PARTS:
        with seeded(seed), seeded_others(seed), _serving(members, task.name):
            try:
                _try(members[task.member], task, part, loss)
            except SurgeryError as error:
                return error
    return None


def _try(module: nn.Module, task: Task, part: str, loss: Loss | None) -> None:
    data: Any = getattr(task, part)
    if data is None or only_once(data):
        return
    raw = next(batches_of(task, data, PARTS[part]), None)
    if raw is None:
        if part == "data":
            return  # the stream says what it needs
        raise PlanError(
            f"The {PARTS[part]} of task '{task.name}' are empty: give at least one batch, or none at all."
        )
    try:
        batch = as_batch(raw)
    except PlanError as error:
        raise PlanError(f"Task '{task.name}', {PARTS[part]}: {error}") from error
    device = device_of(module)
    batch, meter = batch.map(lambda tensor: tensor.to(device)), Meter(task.metric)
    try:
        found = measured(module, task, batch, loss, meter, PARTS[part])
    except SurgeryError as error:
        if _is_example(module, task, raw, loss):
            raise PlanError(
                f"The {PARTS[part]} of task '{task.name}' must yield batches, but yield single examples, without an "
                "axis for the batch: give `torch.utils.data.DataLoader(data, batch_size=N)`, or stacked tensors."
            ) from error
        raise
    if found is not None and not bool(found.isfinite().all()) and (bad := name_nan(batch)):
        raise TrainingError(
            f"The loss of task '{task.name}' must be finite, but on a first batch of its {PARTS[part]} it is "
            f"{float(found.mean())}, and the {bad} of that batch hold NaN: repair or leave out these examples."
        )
    if task.metric is not None and batch.target is None and part != "data":
        raise PlanError(
            f"Metric '{meter.name}' of task '{task.name}' compares with targets, but its {PARTS[part]} give none: "
            "give (inputs, target) pairs, or no metric."
        )
    with suppress(ValueError, RuntimeError, TypeError):  # of one batch that is too small for the metric
        meter.value()


def _is_example(module: nn.Module, task: Task, raw: Any, loss: Loss | None) -> bool:
    """Whether what data yield is what a batch is made of: a batch of it alone can be taken."""
    from torch.utils.data import default_collate

    try:
        batch = as_batch(default_collate([raw])).map(lambda tensor: tensor.to(device_of(module)))
        measured(module, task, batch, loss, Meter(task.metric))
    except Exception:
        return False
    return True


def _serving(members: JointModel | Mapping[str, nn.Module], task: str) -> AbstractContextManager[None]:
    return members.serving(task) if isinstance(members, JointModel) else nullcontext()


def only_once(data: Any) -> bool:
    """Whether data can be iterated over only once."""
    return hasattr(data, "__next__")
