"""Trackers: TensorBoard and others, written through accelerate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from surgery.errors import PlanError
from surgery.training.tasks.score import Score


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that accelerate would leave out without a word.

    Raises:
        PlanError: naming them.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(getattr(each, "value", each)) for each in get_available_trackers()]
    known = [str(getattr(each, "value", each)) for each in LOGGER_TYPE_TO_CLASS]
    if bad := [name for name in names if name not in [*available, "all"]]:
        missing = [name for name in bad if name in known]
        advice = (
            f"install {' and '.join(missing)}" if missing == bad else f"accelerate knows {', '.join(known)}"
        )
        raise PlanError(
            f"train.trackers must be installed, but {', '.join(bad)} cannot be imported: {advice}."
        )


def tracked(losses: Mapping[str, float], scores: Mapping[str, Score], **sizes: float) -> dict[str, float]:
    """What trackers receive after a generation, by name.

    Args:
        losses: of the tasks, in training.
        scores: of the tasks on held-out data, where they were measured.
        sizes: of the dictionary.
    """
    facts = {f"loss/{name}": value for name, value in losses.items()} | sizes
    for name, score in scores.items():
        if score.loss is not None:
            facts[f"validation/{name}"] = score.loss
        if score.metric is not None:
            facts[f"{score.measure}/{name}"] = score.metric
    return facts
