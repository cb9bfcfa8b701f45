"""Assembly: a choice put together as a stored joint model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from surgery.anatomy.plan import BankPlan, Placement, Plan
from surgery.anatomy.sites import LeftAlone
from surgery.disk.aside import put_aside
from surgery.disk.journal import Made, keeps, made_once
from surgery.fitting.tabulated import Choice
from surgery.fitting.units import Arrangement, Unit
from surgery.handles.state import LazyState
from surgery.storage.codecs import (
    Encoded,
    Encoding,
    Precision,
    Statistics,
    encode,
    encode_native,
    packed,
)
from surgery.storage.keys import PartKey, PlainKey, StorageKey
from surgery.storage.stored import Stored, deduplicate
from surgery.storage.trim import entry_bytes

PLAIN = "sharing it does not pay"
KEPT = {False: 2, True: 3}  # precisions of a tensor that are kept encoded; error feedback takes its time


@dataclass
class Assembler:
    """Builds stored forms from choices; what did not change since the last ones is not encoded again."""

    plan: Plan
    ties: Mapping[str, Mapping[str, tuple[str, ...]]]
    units: Sequence[Unit]
    arrangements: Sequence[Arrangement]

    def __post_init__(self) -> None:
        self._encoded: dict[tuple[int, Any], dict[Precision, Encoded]] = {}  # by unit and its key
        self._numbers = {id(unit): number for number, unit in enumerate(self.units)}

    def assemble(self, choice: Choice) -> Stored:
        """The stored joint model of a choice."""
        tensors: dict[StorageKey, Encoded] = {}
        banks, placements = [], []
        position = 0
        for number, arrangement in enumerate(self.arrangements):
            picks = [
                (unit, unit.options[choice.option[position + i]]) for i, unit in enumerate(arrangement.units)
            ]
            position += len(arrangement.units)
            if not choice.taken[number]:
                continue
            if not arrangement.banks:
                for unit, precision in picks:
                    assert precision is not None
                    tensors.update({key: self._encode(unit, key, precision) for key in unit.tensors})
            for shared in arrangement.banks:
                mine, picks = picks[: shared.count], picks[shared.count :]
                chosen = [self._part(unit, precision) for unit, precision in mine]
                bank, placed, parts = shared.assemble(len(banks), chosen)
                banks.append(bank)
                placements += placed
                tensors.update({PartKey(bank.key, name): each for name, each in parts.items()})
        return deduplicate(Stored(with_plain(self.plan, banks, placements), tensors, ties=self.ties))

    def give(self, unit: Unit, encoded: Encoded) -> None:
        """Let all tensors of a unit be stored as they are stored already, in that precision."""
        self._encoded.update({(id(unit), key): {encoded.precision: encoded} for key in unit.tensors})

    def _part(self, unit: Unit, precision: Precision | None) -> Encoding | None:
        """The one tensor of a bank's unit; None where it is left out."""
        (own,) = unit.tensors
        return None if precision is None else Encoding(precision, partial(self._encode, unit, own, precision))

    def _encode(self, unit: Unit, key: Any, precision: Precision) -> Encoded:
        known = self._encoded.setdefault((id(unit), key), {})
        if precision not in known:
            if len(known) == KEPT[unit.statistics is not None]:
                del known[next(iter(known))]
            tensor, statistics = unit.tensors[key], unit.statistics
            if precision.is_native and isinstance(
                unit.tensors, LazyState
            ):  # made for this, and kept as it is
                tensor = put_aside(tensor)
            if keeps():
                number = self._numbers[id(unit)]
                known[precision] = _encoded_once(number, key, tensor, precision, statistics)
            else:
                known[precision] = _kept(_smallest(key, tensor, precision, statistics))
        return known[precision]


def _kept(encoded: Encoded) -> Encoded:
    """The same, held where there is room; a tensor as it is lies where it lay."""
    if encoded.precision.is_native:
        return encoded
    return replace(encoded, parts={name: put_aside(part) for name, part in encoded.parts.items()})


def _encoded_once(
    number: int, key: Any, tensor: Tensor, precision: Precision, statistics: Statistics | None
) -> Encoded:
    """A tensor of a unit, encoded by this run or by the one that it goes on with."""

    def made() -> Made:
        found = _smallest(key, tensor, precision, statistics)
        return str(found.precision), {} if found.precision.is_native else found.parts

    said, parts = made_once(f"encoded/{number}/{key}/{precision}", made, tensor.device)
    found = Precision.parse(said)
    if found.is_native:
        return encode_native(tensor)
    return Encoded(found, tuple(tensor.shape), tensor.dtype, parts)


def _smallest(key: Any, tensor: Tensor, precision: Precision, statistics: Statistics | None) -> Encoded:
    """A tensor in a precision, or as it is where that takes no more of a file."""
    made = packed(encode(tensor, precision, statistics))
    if isinstance(key, PlainKey):
        whole = encode_native(tensor)
        if entry_bytes(key.name, whole) <= entry_bytes(key.name, made):
            return whole
    return made


def with_plain(plan: Plan, banks: Sequence[BankPlan], placements: Sequence[Placement]) -> Plan:
    """The plan of what was fitted: sites that no bank generates are left alone.

    Args:
        plan: as it was before.
        banks: that there are now.
        placements: what they generate.
    """
    generated = {(p.site.member, p.site.name) for p in placements}
    plain = [
        LeftAlone(s.member, s.name, s.owners, "plain", s.kind, s.shape, s.dtype, PLAIN, s.order)
        for s in (p.site for p in plan.placements)
        if (s.member, s.name) not in generated
    ]
    private = [each for each in plan.left_alone if (each.member, each.name) not in generated]
    return Plan(plan.members, tuple(banks), tuple(placements), (*private, *plain))
