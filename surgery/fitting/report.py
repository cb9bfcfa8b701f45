"""What a fit met, what each of its means saved, and how every tensor is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from surgery.fitting.stack_layers import distinct_layers
from surgery.plan import Plan
from surgery.storage import Stored, parts_of_singles


@dataclass(frozen=True)
class TensorReport:
    """How one tensor is stored.

    Attributes:
        member: whose it is.
        name: first owner.
        how: `shared rows`, `shared copy`, or the precision of a plain tensor.
        nbytes: its part of the artifact; shared bytes are divided among their users.
        original: bytes it had.
    """

    member: str
    name: str
    how: str
    nbytes: int
    original: int


@dataclass(frozen=True)
class StackReport:
    """How the layers of a stack are stored.

    Attributes:
        layers: how many there are.
        templates: K; as many as distinct layers where each keeps its own numbers.
        original: bytes that the layers had.
        nbytes: bytes that they have.
    """

    layers: int
    templates: int
    original: int
    nbytes: int


@dataclass(frozen=True)
class FitReport:
    """The outcome of a fit.

    Attributes:
        target: what was asked for, in words.
        met: whether the target was met.
        original_bytes: of each member's tensors.
        stored_bytes: of all stored tensors, index included.
        saved: bytes that `sharing` and `precision` each saved; sharing's are what the same tensors would have
            cost apart, at the precisions they would then have had.
        errors: measured relative L2 output error of each member on the probe inputs.
        hashes: content hash of each member's state dict before the fit, to know its origin by.
        probes: the seed of made-up probe inputs and which members had real ones.
        detail: every tensor.
        stacks: of a plan with templates, by name.
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
    stacks: Mapping[str, StackReport] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON values, the detail left out, and stacks where there are none."""
        found = {key: value for key, value in asdict(self).items() if key != "detail"}
        return found if self.stacks else {key: value for key, value in found.items() if key != "stacks"}


def describe(stored: Stored, originals: Mapping[str, Mapping[str, Any]]) -> tuple[TensorReport, ...]:
    """How every tensor is stored, in the members' order."""
    users: dict[str, int] = {}
    for first in stored.aliases.values():
        users[first] = users.get(first, 1) + 1
    rows: list[TensorReport] = []
    bank_bytes = {
        plan.key: sum(e.nbytes for key, e in stored.tensors.items() if key.startswith(f"bank/{plan.key}/"))
        for plan in stored.plan.banks
    }
    placed = {(p.site.member, p.site.name): p for p in stored.plan.placements}
    for member, tensors in originals.items():
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            key = f"plain/{member}/{name}"
            if (p := placed.get((member, name))) is not None:
                part = bank_bytes[p.bank] * p.grid.locations / stored.plan.bank(p.bank).locations
                rows.append(TensorReport(member, name, "shared rows", round(part), size))
            else:
                first = stored.aliases.get(key, key)
                encoded, count = stored.tensors[first], users.get(first, 1)
                how = f"shared copy, {encoded.precision}" if count > 1 else str(encoded.precision)
                rows.append(TensorReport(member, name, how, encoded.nbytes // count, size))
    return tuple(rows)


def describe_stacks(
    plan: Plan, stored: Stored, originals: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, StackReport]:
    """How the layers of each stack of a plan are stored.

    Args:
        plan: as it was before the fit.
        stored: what the fit made.
        originals: by member.
    """
    size = {(row.member, row.name): row for row in describe(stored, originals)}
    found = {}
    for name, keys in plan.stacks.items():
        layers = {
            key: sorted((p for p in plan.placements if p.bank == key), key=lambda p: p.start) for key in keys
        }
        rows = [size[p.site.member, p.site.name] for placed in layers.values() for p in placed]
        # A layer that no other draws on may have become plain: it is a template of its own.
        counts = [
            _templates_in(stored, bank.key) + len(layers[bank.key]) - bank.locations
            for bank in stored.plan.banks
            if bank.stack == name
        ]
        if not counts:
            tensors = [[originals[p.site.member][p.site.name] for p in placed] for placed in layers.values()]
            counts = [int(distinct_layers(tensors).max()) + 1]
        total = sum(row.original for row in rows), sum(row.nbytes for row in rows)
        found[name] = StackReport(len(layers[keys[0]]), max(counts), *total)
    return found


def _templates_in(stored: Stored, key: str) -> int:
    """How many templates a stored bank has a tensor of."""
    prefix = f"bank/{key}/"
    parts = {each.removeprefix(prefix): t for each, t in stored.tensors.items() if each.startswith(prefix)}
    rows = sum(part.startswith("rows.") for part in parts)
    return rows or sum(parts[part].shape[0] for part in parts_of_singles(parts))


def bytes_of(state: Mapping[str, Tensor]) -> int:
    """Bytes of tensors as they are."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())
