"""Validation: losses and metrics of all tasks on data that training does not see, on the hard alignment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.errors import PlanError, SurgeryError, TrainingError
from surgery.joint import JointModel
from surgery.training.explain import explain_failure
from surgery.training.losses import needs_targets
from surgery.training.metrics import Meter
from surgery.training.streams import seeded
from surgery.training.tasks import Loss, Task, as_batch


@dataclass(frozen=True)
class Score:
    """What one task reached.

    Attributes:
        loss: mean over the examples; None where it cannot be told: without targets that it compares with, or, of an
            artifact, without the source that a member was adapted to.
        metric: None where the task has none.
        examples: how many were seen.
        measure: the metric's name.
    """

    loss: float | None
    metric: float | None
    examples: int
    measure: str | None = None

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    joint: JointModel,
    tasks: Sequence[Task],
    losses: Mapping[str, Loss],
    part: str = "validation",
    seed: int = 0,
) -> dict[str, Score]:
    """Losses and metrics of the tasks that have data for it.

    Args:
        joint: its mode is put back as it was.
        tasks: to be measured.
        losses: by task name; of a task without one, the metric is measured alone.
        part: `validation`, `test` or `data`.
        seed: of whatever the data draw at random.

    Raises:
        PlanError: where a task's data yield nothing.
        TrainingError: where a member, loss or metric cannot take them.
    """
    modes = [(module, module.training) for module in joint.bodies.modules()]
    joint.bodies.eval()
    try:
        chosen = [(task, getattr(task, part)) for task in tasks if getattr(task, part) is not None]
        return {task.name: _evaluate(joint, task, data, losses.get(task.name), seed) for task, data in chosen}
    finally:
        for module, training in modes:
            module.training = training


def _evaluate(joint: JointModel, task: Task, data: Iterable[Any], loss: Loss | None, seed: int) -> Score:
    module, meter = joint[task.member], Meter(task.metric)
    device = next((p.device for p in joint.parameters()), torch.device("cpu"))
    total: Tensor | None = None
    examples = 0
    with seeded(seed):
        for raw in data:
            batch = as_batch(raw).map(lambda tensor: tensor.to(device))
            size = max(batch.size, 1)
            try:
                output = module(*batch.args, **batch.kwargs)
                if loss is not None and (batch.target is not None or not needs_targets(task.loss)):
                    found = loss(output, batch).float() * size
                    total = found if total is None else total + found
                meter.update(output, batch)
            except SurgeryError:
                raise
            except Exception as error:  # of the member, a loss or a metric of the user's own
                raise TrainingError(explain_failure(task, batch, error, "held-out data")) from error
            examples += size
    if not examples:
        raise PlanError(
            f"The data that task '{task.name}' is evaluated on are empty: give at least one batch."
        )
    mean = None if total is None else float(total) / examples
    return Score(mean, meter.value(), examples, meter.name)
