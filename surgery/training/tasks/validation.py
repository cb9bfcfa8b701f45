"""Validation: losses and metrics of all tasks on data that training does not see, on the hard alignment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.core.joint import JointModel
from surgery.errors import PlanError, SurgeryError, TrainingError
from surgery.training.tasks.explain import explain_failure
from surgery.training.tasks.losses import needs_targets
from surgery.training.tasks.metrics import Meter
from surgery.training.tasks.score import Score
from surgery.training.tasks.tasks import Batch, Loss, Task, as_batch
from surgery.util.dtypes import wide
from surgery.util.modules import device_of, kept_modes
from surgery.util.randomness import seeded
from surgery.util.text import one_line


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
    chosen = [(task, getattr(task, part)) for task in tasks if getattr(task, part) is not None]
    with kept_modes(joint.bodies.modules()):
        joint.bodies.eval()
        return {task.name: _evaluate(joint, task, data, losses.get(task.name), seed) for task, data in chosen}


def _evaluate(joint: JointModel, task: Task, data: Iterable[Any], loss: Loss | None, seed: int) -> Score:
    module, meter = joint[task.member], Meter(task.metric)
    device = device_of(joint)
    total: Tensor | None = None
    examples = 0
    with seeded(seed), joint.serving(task.name):
        for raw in batches_of(task, data):
            batch = as_batch(raw).map(lambda tensor: tensor.to(device))
            size = max(batch.size, 1)
            found = measured(module, task, batch, loss, meter)
            if found is not None:
                total = found * size if total is None else total + found * size
            examples += size
    if not examples:
        raise PlanError(
            f"The data that task '{task.name}' is evaluated on are empty: give at least one batch."
        )
    mean = None if total is None else float(total) / examples
    try:
        value = meter.value()
    except SurgeryError:
        raise
    except Exception as error:  # of a metric that these data are too few for
        raise TrainingError(
            f"Metric '{meter.name}' of task '{task.name}' must be computed from {examples} examples, but says "
            f"{one_line(error)}"
        ) from error
    return Score(mean, value, examples, meter.name)


def batches_of(task: Task, data: Iterable[Any], what: str = "held-out data") -> Iterator[Any]:
    """What data yield.

    Raises:
        TrainingError: where they raise something.
    """
    try:
        yield from data
    except SurgeryError:
        raise
    except Exception as error:  # of a data set of the user's own
        raise TrainingError(
            f"The {what} of task '{task.name}' must yield batches, but raised {one_line(error)}"
        ) from error


def measured(
    module: nn.Module, task: Task, batch: Batch, loss: Loss | None, meter: Meter, data: str = "held-out data"
) -> Tensor | None:
    """The loss of one batch, where there is one and it is defined, and the meter updated.

    Raises:
        TrainingError: where the member, the loss or the metric cannot take the batch.
    """
    try:
        output = module(*batch.args, **batch.kwargs)
        found = None
        if loss is not None and (batch.target is not None or not needs_targets(task.loss)):
            found = wide(loss(output, batch))
        meter.update(output, batch)
    except SurgeryError:
        raise
    except Exception as error:  # of the member, a loss or a metric of the user's own
        raise TrainingError(explain_failure(task, batch, error, data)) from error
    return found
