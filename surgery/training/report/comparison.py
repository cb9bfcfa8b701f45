"""Compares a joint model with its members alone, in parameters and in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.artifact.shares import count_shares
from surgery.core.joint import JointModel
from surgery.core.sizes import parameters_alone, parameters_joint
from surgery.storage.stored import store
from surgery.storage.trim import on_cpu, trim
from surgery.training.tasks.score import Score
from surgery.util.wording import percent, size

Sizes = dict[str, dict[str, dict[str, int]]]
"""`parameters` and `bytes` of every member, by state: `alone`, `start`, `joint`."""


def measure(joint: JointModel) -> tuple[Sizes, dict[str, int]]:
    """What members take alone and now, stored as an artifact stores them, and the stored hypermodules by users.

    Returns:
        sizes under `alone` and `joint`, see `surgery.core.sizes`; and `surgery.artifact.shares.Shares.modules`.
    """
    before = {name: member.alone for name, member in joint.members.items() if member.alone is not None}
    shares = count_shares(trim(on_cpu(store(joint))), {name: each.nbytes for name, each in before.items()})
    alone, now = parameters_alone(joint), whole_parts(parameters_joint(joint))
    return {
        "alone": {n: {"parameters": alone[n], "bytes": shares.before[n]} for n in joint.names},
        "joint": {n: {"parameters": now[n], "bytes": shares.after[n]} for n in joint.names},
    }, dict(shares.modules)


def whole_parts(parts: Mapping[str, float]) -> dict[str, int]:
    """Parts as whole numbers that add up to their rounded sum.

    Example:
        >>> whole_parts({"a": 0.5, "b": 1.5, "c": 1.0})
        {'a': 0, 'b': 2, 'c': 1}
    """
    found, exact, counted = {}, 0.0, 0
    for name, part in parts.items():
        exact += part
        found[name] = round(exact) - counted
        counted = round(exact)
    return found


def total(sizes: Mapping[str, Mapping[str, int]], of: str) -> int:
    """The sum over members of `parameters` or `bytes`."""
    return sum(each[of] for each in sizes.values())


def verdict(sizes: Mapping[str, Any], first: Mapping[str, Score], kept: Mapping[str, Score]) -> str:
    """Whether sharing paid, in one sentence: bytes against the members alone, and what became of the metrics.

    Args:
        sizes: under `alone` and `joint`.
        first: scores of the first validation.
        kept: scores of the state that was kept.
    """
    alone, now = total(sizes["alone"], "bytes"), total(sizes["joint"], "bytes")
    saved = alone - now
    changes = [text for name in kept if (text := _change(name, first.get(name), kept[name]))]
    since = f"; since the first validation {', '.join(changes)}" if changes else ""
    if saved > 0:
        return (
            f"Sharing paid: {size(now)} together, {size(saved)} less than the {size(alone)} of the members alone "
            f"({percent(now / alone)}){since}."
        )
    more = "as much as" if not saved else f"{size(-saved)} more than"
    return f"Sharing did not pay: {size(now)} together, {more} the members alone{since}."


def _change(name: str, first: Score | None, kept: Score) -> str:
    """How one task's metric moved, or its loss where it has no metric."""
    if first is None:
        return ""
    for what in ("metric", "loss"):
        before, after = getattr(first, what), getattr(kept, what)
        if before is not None and after is not None:
            measure = kept.measure if what == "metric" else "loss"
            return f"{measure} of {name} {before:.4g} to {after:.4g}"
    return ""


def share_of(generations: Sequence[Mapping[str, Any]], end: Mapping[str, Any] | None) -> tuple[int, int]:
    """Parameters of the dictionary and of the sites that it generates, from a log: of the state that was kept, or the
    last one while a run goes on."""
    if end is not None:
        return end["numbers"][0], end["numbers"][1]
    now, share = generations[-1]["numbers"], generations[-1]["share"]
    return now, round(now / share) if share else 0


def as_scores(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, Score]:
    """Scores again from a log."""
    return {name: Score(**score) for name, score in scores.items()}
