"""Compares a saved state with the run that resumes from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from surgery.core.joint import JointModel
from surgery.disk.places import into_artifact
from surgery.disk.untrusted import shown_text
from surgery.settings.training import Training
from surgery.training.report.report import adapted_of
from surgery.training.tasks.tasks import Task

_FORMER = {"train.precision": "train.mixed_precision"}
"""Names that settings had when older states were saved."""


def make_plan(
    joint: JointModel, tasks: Sequence[Task], config: Training, seed: int, folder: Path | None = None
) -> dict[str, Any]:
    """All that a state must agree with: where blocks lie, tasks, settings and seed.

    Paths are relative to the run's folder, so that a run may go on from another working directory. Learning rates and
    clipping may change, for a run whose loss was no longer finite.
    """
    placements: list[Any] = [
        (p.site.member, p.site.name, p.bank, str(p.grid), p.start) for p in joint.plan.placements
    ]
    free = {"save_seconds": True, "trackers": True, "optimizer": {"lr", "soft_lr", "clip"}}
    train = config.model_dump(mode="json", exclude=free)
    if (source := config.templates.source) is not None and folder is not None:
        train["templates"]["source"] = into_artifact(folder).path(source)
    replaced = [asdict(each.replacement) for member in joint.members.values() for each in member.replaced]
    placements += [json.dumps(replaced, sort_keys=True)] if replaced else []
    settings = {bank.key: dict(bank.settings) for bank in joint.plan.banks if bank.settings}
    return {
        **({"banks": settings} if settings else {}),
        "blocks": hashlib.sha256(json.dumps(placements).encode()).hexdigest(),
        "tasks": ", ".join(f"{task.name} of {task.member}" for task in tasks),
        "losses": [_told(task, folder) for task in tasks],
        "seed": seed,
        "train": train,
    }


def differences(plan: Mapping[str, Any], before: object) -> str:
    """In what a plan differs from the one that a state was saved with; empty where in nothing.

    Example:
        >>> differences({"seed": 1, "train": {"steps": 5}}, {"seed": 0, "train": {"steps": 5}})
        'seed was 0 and is 1'
    """
    if before == plan:
        return ""
    old = flat(before) if isinstance(before, Mapping) else {}
    old |= {name: old.pop(former) for former, name in _FORMER.items() if former in old}
    if old == flat(plan):
        return ""
    changed = [(name, value) for name, value in flat(plan).items() if value != old.get(name)]
    return "; ".join(
        "members, their replaced modules or blocks are others"
        if name == "blocks"
        else f"{name} was {shown_text(str(old.get(name)), 100)} and is {shown_text(str(value), 100)}"
        for name, value in changed
    )


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names.

    Example:
        >>> flat({"steps": 5, "optimizer": {"lr": 0.1}})
        {'steps': 5, 'optimizer.lr': 0.1}
    """
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return found


def _told(task: Task, folder: Path | None) -> list[Any]:
    """A task's loss, where it has a name, and what it is compared with: the state of one loss is none of another."""
    adapted = adapted_of(task)
    if adapted is not None and folder is not None:
        places = into_artifact(folder)
        changes = {"source": places.path, "data": places.data}
        adapted = {k: changes[k](v) if k in changes and isinstance(v, str) else v for k, v in adapted.items()}
    return [None if callable(task.loss) else task.loss, adapted]
