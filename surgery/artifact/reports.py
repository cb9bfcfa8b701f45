"""Reports as an artifact holds them: plain JSON values, whether a fit was just made or was read back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.joint import JointModel


def report_of(joint: JointModel) -> dict[str, Any] | None:
    """A joint model's report as JSON values, whether it was just fitted or was loaded; None without one."""
    if joint.report is None:
        return None
    report = joint.report if isinstance(joint.report, Mapping) else joint.report.to_json()
    return json.loads(json.dumps(_finite(report)))


def restrict_report(
    report: Mapping[str, Any] | None, names: Sequence[str], whole: bool
) -> dict[str, Any] | None:
    """What a report says of some members; what it says of the whole is left out unless it is `whole`."""
    if report is None or whole:
        return None if report is None else dict(report)
    kept = {key: report[key] for key in ("target", "met", "probes") if key in report}
    by_member = {
        key: {name: value for name, value in values.items() if name in names}
        for key, values in report.items()
        if key in ("errors", "original_bytes", "parameters", "hashes") and isinstance(values, Mapping)
    }
    return {**kept, **by_member}


def _finite(value: Any) -> Any:
    """JSON values with NaN and infinities as None, which JSON cannot say."""
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
