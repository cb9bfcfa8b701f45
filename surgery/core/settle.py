"""Decides, before a joint model is stored, which sites are generated and which are plain."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from surgery.anatomy.plan import BankPlan, Plan
from surgery.core.bank import Bank
from surgery.core.generation import generated
from surgery.core.registry import find_method, recorded_plan
from surgery.core.tensor_method import TensorMethod
from surgery.settings.names import DEFAULT_METHOD

if TYPE_CHECKING:
    from surgery.core.joint import JointModel


@dataclass(frozen=True)
class Settled:
    """A joint model as it is worth writing: a smaller plan, its banks, and the weights that became plain."""

    plan: Plan
    banks: Mapping[str, Bank]
    plain: Mapping[tuple[str, str], Tensor]


@torch.no_grad()
def settle(joint: JointModel, keep: Collection[str] = ()) -> Settled:
    """Keep in the dictionary only what sharing makes smaller. The joint model itself is not changed.

    Args:
        joint: any.
        keep: keys of banks that stay as they are.
    """
    return settle_banks(joint.plan, {key: joint.dictionary[key] for key in joint.dictionary}, keep)


@torch.no_grad()
def settle_banks(plan: Plan, found: Mapping[str, Bank], keep: Collection[str] = ()) -> Settled:
    """What `settle` does, of a plan and its banks by key."""
    banks: dict[str, Bank] = {}
    plans, placements = [], []
    plain: dict[tuple[str, str], Tensor] = {}
    for bank_plan in plan.banks:
        before, mine = found[bank_plan.key], plan.in_bank(bank_plan.key)
        bank, kept = (before, mine) if bank_plan.key in keep else before.settle(bank_plan, mine)
        if kept:
            banks[bank_plan.key] = bank
            plans.append(recorded_plan(_of_form(bank.planned(bank_plan), bank)))
            placements += kept
        sites = {(p.site.member, p.site.name) for p in kept}
        if left := [p for p in mine if (p.site.member, p.site.name) not in sites]:
            plain |= {key: weight.look() for key, weight in generated(found, left).items()}
    return Settled(replace(plan, banks=tuple(plans), placements=plan.in_order(placements)), banks, plain)


def _of_form(plan: BankPlan, bank: Bank) -> BankPlan:
    """The plan of a bank that is stored in a form of its own method; what is still as it was joined is rows."""
    if find_method(plan.method, TensorMethod).form == bank.form:
        return plan
    return replace(plan, method=DEFAULT_METHOD, settings={})
