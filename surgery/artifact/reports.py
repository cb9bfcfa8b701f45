"""Reports as an artifact holds them: they describe the weights beside them, and no others.

A report belongs to the weights that a fit measured. Of members whose weights are others by now, content hashes tell,
only what is still true is kept: where they came from and how large they were.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from surgery.fitting.report import FitReport, Probes
from surgery.members.member import content_hash
from surgery.storage.states import lazy_state_of
from surgery.storage.stored import Stored, expand

if TYPE_CHECKING:
    from surgery.core.joint import JointModel


def report_of(joint: JointModel, stored: Stored) -> FitReport | None:
    """What a joint model's report says that holds for what is stored of it; None without one.

    Args:
        joint: fitted, loaded or trained.
        stored: as `store` returns it.
    """
    known = joint.known
    report = known.report
    if report is None:
        return None
    held = [
        name
        for name in joint.names
        if (
            content_hash(lazy_state_of(stored, name)) == known.hashes[name]
            if name in known.hashes
            else name not in known.stale
        )
    ]
    changed = [name for name in joint.names if name not in held]
    if not changed and _same_forms(joint, stored):
        return report
    measured = held and report.errors
    return FitReport(
        original_bytes=report.original_bytes,
        errors=_among(report.errors, held),
        hashes=report.hashes,
        probes=report.probes if measured else Probes(),
        parameters=report.parameters,
        changed=tuple(sorted({*changed, *report.changed})),
    )


def restrict_report(report: FitReport | None, names: Collection[str], whole: bool) -> FitReport | None:
    """What a report says of some members; what it says of all together is left out unless it is `whole`.

    An error bound holds for each member, so it is kept as a target, and met or not by those that are left.
    """
    if report is None or whole:
        return report
    kept = FitReport(
        original_bytes=_among(report.original_bytes, names),
        errors=_among(report.errors, names),
        hashes=_among(report.hashes, names),
        probes=report.probes,
        parameters=_among(report.parameters, names),
        changed=tuple(name for name in report.changed if name in names),
    )
    if report.target == "lossless":
        return replace(kept, target=report.target, met=bool(report.met))
    bound = report.bound
    if bound is None:  # a target of all together, such as bytes, hypermodules or templates
        return kept
    met = bool(report.met) or all(error <= bound for error in kept.errors.values())
    return replace(kept, target=report.target, met=met)


def _among(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in names}


def _same_forms(joint: JointModel, stored: Stored) -> bool:
    """Whether all tensors are stored as they were when the report was made."""
    now = {key: each.precision for key, each in expand(stored).items()}
    return now == {key: each.precision for key, each in joint.encoded.items()}
