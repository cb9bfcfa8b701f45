"""Compares a saved state with the run that resumes from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.disk.places import into_artifact
from surgery.disk.untrusted import shown_text
from surgery.settings.former import DEFAULTS, TODAY
from surgery.settings.training import Training
from surgery.training.loop.describing import adapted_of
from surgery.training.tasks.tasks import Task

if TYPE_CHECKING:
    from surgery.training.loop.trainer import Trainer


def terms_of(trainer: Trainer, seed: int, folder: Path | None = None) -> dict[str, Any]:
    """All that a state must agree with: where blocks lie, tasks, settings and seed.

    Paths are relative to the run's folder, so that a run may go on from another working directory. Learning rates and
    clipping may change, for a run whose loss was no longer finite; where members have rates of their own, these and
    what they are relative to stay.
    """
    joint, config = trainer.joint, trainer.config
    placements: list[Any] = [
        (p.site.member, p.site.name, p.bank, str(p.grid), p.start) for p in joint.plan.placements
    ]
    rates = {"soft_lr", "clip"} if config.optimizer.rates else {"lr", "rates", "soft_lr", "clip"}
    free = {"save_seconds": True, "trackers": True, "capture": True, "optimizer": rates}
    train = config.model_dump(mode="json", exclude=free)
    if not config.keep:
        del train["keep"]  # states of earlier versions do not say it
    if folder is not None:
        train = into_artifact(folder).training(train)
    replaced = [asdict(each.replacement) for member in joint.members.values() for each in member.replaced]
    placements += [json.dumps(replaced, sort_keys=True)] if replaced else []
    settings = {key: said for move in trainer.moves for key, said in move.terms().items() if said}
    return {
        **({"banks": settings} if settings else {}),
        "blocks": hashlib.sha256(json.dumps(placements).encode()).hexdigest(),
        "tasks": ", ".join(f"{task.name} of {task.member}" for task in trainer.tasks),
        "losses": [_identity(task, folder) for task in trainer.tasks],
        "seed": seed,
        "train": train,
    }


def as_begun(config: Training, before: object) -> Training:
    """The settings of a run that goes on: what is not given, and had another default in the version that began it, has
    that one.

    Args:
        config: of the run as it is asked for now.
        before: what the state says of these settings.
    """
    old = flat(before) if isinstance(before, Mapping) else {}
    for name, value in DEFAULTS.items():
        if old.get(name, value) == value:
            config = _unless_given(config, name.split("."), value)
    return config


def _unless_given(settings: Any, path: list[str], value: object) -> Any:
    """Settings with a value at a place where nothing is given."""
    key, *rest = path
    if rest:
        return settings.model_copy(update={key: _unless_given(getattr(settings, key), rest, value)})
    return settings if key in settings.model_fields_set else settings.model_copy(update={key: value})


def differences(terms: Mapping[str, Any], before: object) -> str:
    """In what a run's terms differ from those that a state was saved with; empty where in nothing.

    Example:
        >>> differences({"seed": 1, "train": {"steps": 5}}, {"seed": 0, "train": {"steps": 5}})
        'seed was 0 and is 1'
    """
    old, now = flat(before) if isinstance(before, Mapping) else {}, flat(terms)
    old = {**{f"train.{name}": value for name, value in flat(DEFAULTS).items()}, **old}
    former = {TODAY[name]: old.pop(name) for name in [*old] if name in TODAY}
    for (
        name,
        value,
    ) in former.items():  # of older states, which say settings of a method once for all of its banks
        places = (
            [place for place in now if _setting(place) == name] if name.startswith("settings.") else [name]
        )
        old |= dict.fromkeys(places, value)
    gone = [name for name in old if name.startswith("banks.") and name not in now]
    changed = [
        "members, their replaced modules or blocks are others"
        if name == "blocks"
        else f"{_setting(name)} was {shown_text(str(old.get(name)), 100)} and is {shown_text(str(now.get(name)), 100)}"
        for name in (*now, *gone)
        if now.get(name) != old.get(name)
    ]
    return "; ".join(dict.fromkeys(changed))


def _setting(name: str) -> str:
    """How a recipe calls what is said of a bank; any other name as it is."""
    return f"settings.{name.rpartition('.')[2]}" if name.startswith("banks.") else name


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


def _identity(task: Task, folder: Path | None) -> list[Any]:
    """A task's loss, where it has a name, and what it is compared with: the state of one loss is none of another."""
    adapted = adapted_of(task)
    if adapted is not None and folder is not None:
        places = into_artifact(folder)
        changes = {"source": places.path, "data": places.data}
        adapted = {k: changes[k](v) if k in changes and isinstance(v, str) else v for k, v in adapted.items()}
    return [None if callable(task.loss) else task.loss, adapted]
