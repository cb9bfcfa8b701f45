"""Describes a run in the first line of its log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from surgery.core.sizes import parameters_of_dictionary
from surgery.settings.training import Training
from surgery.training.loop.moves import gather
from surgery.training.tasks.losses import adapts_by
from surgery.training.tasks.metrics import Meter
from surgery.training.tasks.tasks import Task

if TYPE_CHECKING:
    from surgery.training.loop.trainer import Trainer


def describe_run(trainer: Trainer, config: Training, seed: int) -> dict[str, Any]:
    """Members, tasks, sites, methods and settings of what is trained, as JSON."""
    joint = trainer.joint
    sites = [
        [p.site.member, p.site.name, p.bank, p.start, p.stop, p.site.order] for p in joint.plan.placements
    ]
    tasks = {
        task.name: {
            "member": task.member,
            "metric": Meter(task.metric).name,
            "adapted": adapted_of(task),
        }
        for task in trainer.tasks
    }
    return {
        "members": list(joint.names),
        "tasks": tasks,
        "sites": sites,
        "method_names": [each.name for each in trainer.moves],
        **gather(trainer.moves, "describe"),
        "numbers": parameters_of_dictionary(joint)[1],
        "config": config.model_dump(mode="json"),
        "seed": seed,
    }


def adapted_of(task: Task) -> dict[str, Any] | None:
    """How a task adapts, as JSON: losses with weights, and where the features come from; None where it does not."""
    ways = adapts_by(task.loss)
    return {"by": ways, **task.source.document()} if ways and task.source is not None else None
