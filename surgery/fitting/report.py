"""What a fit met, what each of its means saved, and how every tensor is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from surgery.anatomy.plan import Plan
from surgery.core.method import methods_of, plan_of
from surgery.core.sizes import TensorReport, count_tensors
from surgery.storage.stored import Stored
from surgery.util.showing import as_html, as_text
from surgery.util.wording import percent, size


@dataclass(frozen=True, repr=False)
class FitReport:
    """The outcome of a fit.

    Attributes:
        target: what was asked for, in words.
        met: whether the target was met.
        original_bytes: of each member's tensors alone; see `surgery.core.sizes`.
        stored_bytes: of all stored tensors, index included.
        saved: bytes that `sharing` and `precision` each saved; sharing's are what the same tensors would have
            cost apart, at the precisions they would then have had.
        errors: measured relative L2 output error of each member on the probe inputs.
        hashes: content hash of each member's state dict before the fit, to know its origin by; of members that had
            changed since they came from there, none.
        probes: the seed of made-up probe inputs and which members had real ones.
        detail: every tensor.
        stacks: what methods say of the stacks of a plan, by name.
        parameters: of each member alone; see `surgery.core.sizes`.
    """

    target: str
    met: bool
    original_bytes: Mapping[str, int]
    stored_bytes: int
    saved: Mapping[str, int]
    errors: Mapping[str, float]
    hashes: Mapping[str, str] = field(default_factory=dict)
    probes: Mapping[str, Any] = field(default_factory=dict)
    detail: tuple[TensorReport, ...] = ()
    stacks: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        return as_text(f"FitReport: {self._summary()}", [", ".join(row) for row in self._rows()])

    def _repr_html_(self) -> str:
        columns = ("member", "before", "after", "output moved by")
        return as_html("Fit", columns, self._rows(), [f"{self._summary()}."])

    def _summary(self) -> str:
        before = sum(self.original_bytes.values())
        saved = ", ".join(f"{size(amount)} by {means}" for means, amount in self.saved.items())
        return (
            f"{self.target}, {'met' if self.met else 'NOT met'}; {size(self.stored_bytes)} of {size(before)} "
            f"({percent(self.stored_bytes / max(before, 1))}); saved {saved}"
        )

    def _rows(self) -> list[list[str]]:
        after = dict.fromkeys(self.original_bytes, 0)
        for row in self.detail:
            after[row.member] += row.nbytes
        return [
            [name, size(before), size(after[name]), percent(self.errors.get(name, 0.0), digits=2)]
            for name, before in self.original_bytes.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON values, the detail left out, and stacks where there are none."""
        found = {key: value for key, value in asdict(self).items() if key != "detail"}
        return found if self.stacks else {key: value for key, value in found.items() if key != "stacks"}


def describe(stored: Stored, originals: Mapping[str, Mapping[str, Any]]) -> tuple[TensorReport, ...]:
    """How every tensor is stored, in the members' order."""
    rows = {(row.member, row.name): row for row in count_tensors(stored)}
    return tuple(rows[member, name] for member, tensors in originals.items() for name in tensors)


def describe_stacks(
    plan: Plan, stored: Stored, originals: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Any]:
    """What the methods of a plan say of its stacks.

    Args:
        plan: as it was before the fit.
        stored: what the fit made.
        originals: by member.
    """
    found: dict[str, Any] = {}
    for method in methods_of(plan):
        found |= method.report(plan_of(plan, method.name), stored, originals)
    return found
