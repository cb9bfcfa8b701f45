"""Arranging: banks of any method as choices of a fit, from what its `make`, `pack` and `unpack` alone say.

Every part of a bank is a unit with the precision ladder. What a precision does is measured by generating with that
part alone decoded from it; what the bank leaves of the originals is a unit without tensors, whose error cannot be
bought off.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.anatomy.plan import BankPlan, Placement, Plan
from surgery.core.bank import Bank
from surgery.core.settle import Settled, settle_banks
from surgery.core.tensor_method import TensorMethod
from surgery.fitting.scene import Scene, key_of
from surgery.fitting.units import BANK_BYTES, Arrangement, Group, Unit, precisions, unit_bytes
from surgery.storage.codecs import NATIVE, Encoded, Encoding, decode, encode
from surgery.util import progress


@dataclass(frozen=True)
class MadeBank:
    """A bank as a method made it.

    Attributes:
        plan: of the bank.
        placements: what it generates.
        names: of its parts, in the order of its units.
    """

    plan: BankPlan
    placements: tuple[Placement, ...]
    names: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many parts it has."""
        return len(self.names)

    def assemble(
        self, number: int, parts: Sequence[Encoding | None]
    ) -> tuple[BankPlan, list[Placement], dict[str, Encoded]]:
        """The bank under its own key, with all of its parts."""
        found = {
            name: part.encode() for name, part in zip(self.names, parts, strict=True) if part is not None
        }
        return self.plan, list(self.placements), found


def make_banks(method: TensorMethod, scene: Scene, plan: Plan) -> Settled:
    """The banks of a plan as `make` makes them, where they are worth storing.

    Args:
        method: whose banks these are.
        scene: what is being fitted.
        plan: of these banks.
    """
    return settle_banks(plan, {key: bank for key, (bank, _) in _made(method, scene, plan).items()})


def arrange_made(method: TensorMethod, scene: Scene, plan: Plan) -> list[Group]:
    """Each bank of a plan as one thing to decide on: its sites apart, or the bank that `make` gives.

    Args:
        method: whose banks these are.
        scene: what is being fitted.
        plan: of these banks.
    """
    asked = method.name in scene.asked
    scene.sensitive_to(key_of(p.site) for p in plan.placements)
    groups = []
    with progress.task(f"Measuring {method.name}", len(plan.banks)) as task:
        for key, (bank, blocks) in _made(method, scene, plan).items():
            mine = plan.in_bank(key)
            apart = scene.apart(key_of(p.site) for p in mine)
            made = _arrangement(method, scene, plan.bank(key), bank, blocks, mine)
            groups.append(Group((apart, made), shared=asked, claimed=True))
            task.advance()
    return groups


def _made(method: TensorMethod, scene: Scene, plan: Plan) -> dict[str, tuple[Bank, Tensor]]:
    """Every bank of a plan, with the blocks that it was made from."""
    generator = torch.Generator().manual_seed(scene.seed)
    found = {}
    for bank in plan.banks:
        mine = sorted(plan.in_bank(bank.key), key=lambda p: p.start)
        blocks = scene.blocks(mine)
        found[bank.key] = method.make(bank, blocks, generator), blocks
    return found


@torch.no_grad()
def _arrangement(
    method: TensorMethod,
    scene: Scene,
    plan: BankPlan,
    bank: Bank,
    blocks: Tensor,
    placements: Sequence[Placement],
) -> Arrangement:
    """A made bank: a unit for each part, and one for what the bank leaves of the originals."""
    plan = bank.planned(plan)
    parts = {name: part.detach() for name, part in bank.pack(plan).items()}
    exact = bank.blocks().detach()

    def errors(changed: Tensor, wanted: Tensor) -> dict[str, float]:
        """Squared output errors by member."""
        total: dict[str, float] = defaultdict(float)
        for p in placements:
            change = (changed[p.start : p.stop] - wanted[p.start : p.stop]).double().square().sum()
            total[p.site.member] += scene.sensitivity[key_of(p.site)] * float(change)
        return dict(total)

    def with_part(name: str, part: Tensor) -> Tensor:
        return method.unpack(plan, {**parts, name: part}).blocks().detach()

    units = []
    for name, part in parts.items():
        tried = precisions(part) if part.is_floating_point() else (NATIVE,)
        found = [
            {} if each.is_native else errors(with_part(name, decode(encode(part, each))), exact)
            for each in tried
        ]
        sizes = tuple(unit_bytes({name: part}, each) for each in tried)
        weight, moved = _shares(found)
        units.append(Unit({name: part}, weight, tried, sizes, moved))
    units.append(Unit({}, errors(exact, blocks), (NATIVE,), (0.0,), (1.0,)))
    made = MadeBank(plan, tuple(placements), tuple(parts))
    return Arrangement(tuple(units), BANK_BYTES, (made,))


def _shares(found: Sequence[Mapping[str, float]]) -> tuple[dict[str, float], tuple[float, ...]]:
    """Errors of all options in all members as what one counts in each member, and errors in these units.

    Several members are given the shares that they have on average; measured outputs correct what that gets wrong.
    """
    errors = tuple(sum(each.values()) for each in found)
    moved = [(each, total) for each, total in zip(found, errors, strict=True) if total > 0]
    weight: dict[str, float] = defaultdict(float)
    for each, total in moved:
        for member, error in each.items():
            weight[member] += error / total / len(moved)
    return dict(weight), errors
