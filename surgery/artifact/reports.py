"""Reports as an artifact holds them: plain JSON values that describe the weights beside them, and no others.

A report belongs to the weights that a fit measured. Of members whose weights are others by now, content hashes tell,
only what is still true is kept: where they came from and how large they were.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from surgery.members.member import content_hash
from surgery.storage.states import build_banks, state_of
from surgery.storage.stored import Stored, expand

if TYPE_CHECKING:
    from surgery.core.joint import JointModel

ALWAYS = ("original_bytes", "parameters", "hashes")
"""What stays true of a member whatever becomes of its weights here."""

_BOUND = re.compile(r"max-error (\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?: |$)")


def report_of(joint: JointModel, stored: Stored) -> dict[str, Any] | None:
    """What a joint model's report says that holds for what is stored of it, as JSON values; None without one.

    Args:
        joint: fitted, loaded or trained.
        stored: as `store` returns it.
    """
    known = joint.known
    if known.report is None:
        return None
    found = known.report if isinstance(known.report, Mapping) else known.report.to_json()
    report = json.loads(json.dumps(_finite(found)))
    banks = build_banks(stored)
    held = [
        name
        for name in joint.names
        if (
            content_hash(state_of(stored, name, banks)) == known.hashes[name]
            if name in known.hashes
            else name not in known.stale
        )
    ]
    changed = [name for name in joint.names if name not in held]
    if not changed and _same_forms(joint, stored):
        return report
    kept = {key: report[key] for key in ALWAYS if key in report}
    if held and report.get("errors"):
        kept["errors"] = {name: value for name, value in report["errors"].items() if name in held}
        kept |= {"probes": report["probes"]} if report.get("probes") else {}
    changed = sorted({*changed, *report.get("changed", ())})
    return {**kept, **({"changed": changed} if changed else {})}


def restrict_report(
    report: Mapping[str, Any] | None, names: Collection[str], whole: bool
) -> dict[str, Any] | None:
    """What a report says of some members; what it says of all together is left out unless it is `whole`.

    An error bound holds for each member, so it is kept as a target, and met or not by those that are left.
    """
    if report is None or whole:
        return None if report is None else dict(report)
    kept: dict[str, Any] = {
        key: {name: value for name, value in values.items() if name in names}
        for key, values in report.items()
        if key in ("errors", *ALWAYS) and isinstance(values, Mapping)
    }
    if changed := [name for name in report.get("changed", ()) if name in names]:
        kept["changed"] = changed
    kept |= {"probes": report["probes"]} if "probes" in report else {}
    return {**_target_of(report, kept.get("errors", {})), **kept}


def _target_of(report: Mapping[str, Any], errors: Mapping[str, Any]) -> dict[str, Any]:
    """The target as far as it is one for each member."""
    target = str(report.get("target") or "")
    if target == "lossless":
        return {"target": target, "met": bool(report.get("met"))}
    found = _BOUND.match(target)
    if not found:  # of bytes, hypermodules or templates of all together
        return {}
    bound = float(found[1])
    met = bool(report.get("met")) or all(error is not None and error <= bound for error in errors.values())
    return {"target": target, "met": met}


def _same_forms(joint: JointModel, stored: Stored) -> bool:
    """Whether all tensors are stored as they were when the report was made."""
    now = {key: each.precision for key, each in expand(stored).items()}
    return now == {key: each.precision for key, each in joint.encoded.items()}


def _finite(value: Any) -> Any:
    """JSON values with NaN and infinities as None, which JSON cannot say."""
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
