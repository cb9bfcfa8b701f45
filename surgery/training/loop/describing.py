"""Describes a run in the first line of its log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from surgery.core.sizes import parameters_of_dictionary
from surgery.settings.training import Training
from surgery.training.loop.moves import gather
from surgery.training.report.report import adapted_of
from surgery.training.tasks.metrics import Meter

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
