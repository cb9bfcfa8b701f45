"""Reports as an artifact holds them: they describe the weights beside them, and no others.

A report belongs to the weights that a fit measured. Of members whose weights are others by now, content hashes tell,
only what is still true is kept: where they came from and how large they were.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from surgery.fitting.report import FitReport, Probes
from surgery.members.member import content_hash
from surgery.storage.states import lazy_state_of
from surgery.storage.stored import Stored, expand
from surgery.training.report.report import TrainReport
from surgery.training.report.runlog import NAME as LOG
from surgery.training.report.runlog import read_end

if TYPE_CHECKING:
    from surgery.artifact.manifest import Manifest
    from surgery.core.joint import JointModel


def report_of(
    joint: JointModel, stored: Stored, hashes: Mapping[str, str] = MappingProxyType({})
) -> FitReport | None:
    """What a joint model's report says that holds for what is stored of it; None without one.

    Args:
        joint: fitted, loaded or trained.
        stored: as `store` returns it.
        hashes: content hashes of members, as far as these are known.
    """
    known = joint.known
    report = known.report
    if report is None:
        return None
    held = [
        name
        for name in joint.names
        if (
            (hashes.get(name) or content_hash(lazy_state_of(stored, name))) == known.hashes[name]
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
        added=_among(report.added, held),
        variations=_among(report.variations, held),
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
        added=_among(report.added, names),
        variations=_among(report.variations, names),
    )
    if kept.original_bytes and kept.original_bytes.keys() <= kept.added.keys():
        return kept  # the target was not theirs
    if report.target == "lossless":
        return replace(kept, target=report.target, met=bool(report.met))
    bound = report.bound
    if bound is None:  # a target of all together, such as bytes, hypermodules or templates
        return kept
    fitted = (error for name, error in kept.errors.items() if name not in kept.added)
    met = bool(report.met) or all(error <= bound for error in fitted)
    return replace(kept, target=report.target, met=met)


def report_with(report: FitReport | None, more: FitReport) -> FitReport:
    """What is known once members are added to what a report describes.

    Args:
        report: of the others, if there is one.
        more: of the added members alone.
    """
    report = report or FitReport()
    added = more.added.values()
    return replace(
        report,
        original_bytes={**report.original_bytes, **more.original_bytes},
        stored_bytes=report.stored_bytes and report.stored_bytes + sum(each.stored_bytes for each in added),
        saved={
            means: amount + sum(each.saved.get(means, 0) for each in added)
            for means, amount in report.saved.items()
        },
        errors={**report.errors, **more.errors},
        hashes={**report.hashes, **more.hashes},
        parameters={**report.parameters, **more.parameters},
        added={**report.added, **more.added},
        variations={**report.variations, **more.variations},
    )


def report_without(report: FitReport | None, names: Collection[str], nbytes: int) -> FitReport | None:
    """What is known of some members once the others are removed: what a fit made of all still holds where only members
    that were added after it went.

    Args:
        report: of all.
        names: of those that stay.
        nbytes: of the tensors that stay.
    """
    if report is None:
        return None
    gone = {*report.original_bytes, *report.parameters, *report.changed} - {*names}
    kept = restrict_report(report, names, whole=False)
    if gone - {*report.added} or kept is None:
        return kept
    saved = dict(report.saved)
    if saved:
        less = sum(report.added[name].saved.get("precision", 0) for name in gone)
        saved["precision"] = saved.get("precision", 0) - less
        others = sum(amount for means, amount in saved.items() if means != "sharing")
        saved["sharing"] = sum(kept.original_bytes.values()) - nbytes - others
    return replace(
        kept,
        target=report.target,
        met=report.met,
        stored_bytes=report.stored_bytes and nbytes,
        saved=saved,
        stacks=report.stacks,
    )


TRAINING_LOG = f"training/{LOG}"
"""The log of the run that made an artifact, in its folder."""


def trained_report(folder: Path, manifest: Manifest) -> TrainReport | None:
    """What the training reached that made the weights of an artifact; None where they were not trained.

    Args:
        folder: of the artifact.
        manifest: of it.
    """
    if manifest.training is not None or TRAINING_LOG not in manifest.files:
        return manifest.training
    return read_end(folder / TRAINING_LOG, manifest.members)


def _among(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in names}


def _same_forms(joint: JointModel, stored: Stored) -> bool:
    """Whether all tensors are stored as they were when the report was made."""
    now = {key: each.precision for key, each in expand(stored).items()}
    return now == {key: each.precision for key, each in joint.encoded.items()}
