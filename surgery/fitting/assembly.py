"""Assembly: a choice put together as a stored joint model, and the weights that its members then have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.anatomy.plan import BankPlan, Placement, Plan
from surgery.anatomy.sites import LeftAlone
from surgery.core.dictionary import index_dtype
from surgery.core.generation import to_weight
from surgery.fitting.allocation import Choice
from surgery.fitting.units import Arrangement, SharedRows, Unit
from surgery.storage.codecs import Encoded, Precision, decode, encode, encode_native
from surgery.storage.stored import Stored, build_bank, deduplicate

PLAIN = "sharing it does not pay"


@dataclass
class Assembler:
    """Builds stored forms from choices; what did not change since the last choice is not encoded again."""

    plan: Plan
    ties: Mapping[str, Mapping[str, tuple[str, ...]]]
    units: Sequence[Unit]
    arrangements: Sequence[Arrangement]

    def __post_init__(self) -> None:
        self._encoded: dict[tuple[int, str], tuple[Precision, Encoded]] = {}  # by unit and storage key

    def assemble(self, choice: Choice) -> Stored:
        """The stored joint model of a choice."""
        tensors: dict[str, Encoded] = {}
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
                count = shared.contexts.shape[2]
                bank, placed, parts = self._bank(shared, picks[:count], len(banks))
                picks = picks[count:]
                banks.append(bank)
                placements += placed
                tensors.update(parts)
        return deduplicate(Stored(self._plan(banks, placements), tensors, ties=self.ties))

    def _bank(
        self, shared: SharedRows, picks: Sequence[tuple[Unit, Precision | None]], number: int
    ) -> tuple[BankPlan, list[Placement], dict[str, Encoded]]:
        """Sites as a bank: a hypermodule for each location, of the rows that were kept, or rows as they are."""
        grid, sites = shared.grid, shared.sites
        kept = [j for j, (_, precision) in enumerate(picks) if precision is not None]
        key = shared.key or f"{grid.m}x{grid.n}-{sites[0].dtype}-{number}"
        context = 1 if shared.hard else len(kept)
        plan = BankPlan(
            key, (grid.m, grid.n), context, sites[0].dtype, len(sites) * grid.locations, shared.stack
        )
        name = "single" if shared.hard else "rows"
        parts: dict[str, Encoded] = {}
        for new, j in enumerate(kept):
            unit, precision = picks[j]
            assert precision is not None
            (own,) = unit.tensors
            parts[f"bank/{key}/{name}.{new}"] = self._encode(unit, own, precision)
        contexts = shared.contexts[:, :, kept].flatten(0, 1).contiguous()
        psi = torch.arange(grid.locations).repeat(len(sites))
        if shared.hard:
            psi = contexts.argmax(1).cpu()
        else:
            parts[f"bank/{key}/contexts"] = encode_native(contexts)
        count = len(kept) if shared.hard else grid.locations
        parts[f"bank/{key}/psi"] = encode_native(psi.to(index_dtype(count)))
        placed = [Placement(site, key, grid, i * grid.locations) for i, site in enumerate(sites)]
        return plan, placed, parts

    def _encode(self, unit: Unit, key: str, precision: Precision) -> Encoded:
        known = self._encoded.get((id(unit), key))
        if known is None or known[0] != precision:
            known = self._encoded[id(unit), key] = (precision, encode(unit.tensors[key], precision))
        return known[1]

    def _plan(self, banks: Sequence[BankPlan], placements: Sequence[Placement]) -> Plan:
        generated = {(p.site.member, p.site.name) for p in placements}
        plain = [
            LeftAlone(s.member, s.name, s.owners, "plain", s.kind, s.shape, s.dtype, PLAIN, s.order)
            for s in (p.site for p in self.plan.placements)
            if (s.member, s.name) not in generated
        ]
        return Plan(self.plan.members, tuple(banks), tuple(placements), (*self.plan.left_alone, *plain))


def weights_of(stored: Stored, member: str) -> dict[str, Tensor]:
    """The weights that one member has when it runs from a stored form, by first owner."""
    prefix = f"plain/{member}/"
    tensors = {key: stored.tensors[key] for key in stored.tensors if key.startswith(prefix)}
    tensors |= {key: stored.tensors[first] for key, first in stored.aliases.items() if key.startswith(prefix)}
    weights = {key.removeprefix(prefix): decode(encoded) for key, encoded in tensors.items()}
    for bank_plan in stored.plan.banks:
        placements = [p for p in stored.plan.of(member) if p.bank == bank_plan.key]
        if not placements:
            continue
        bank = build_bank(bank_plan, stored.tensors)
        for p in placements:
            weights[p.site.name] = to_weight(bank.blocks(p.start, p.stop).detach(), p)
    return weights
