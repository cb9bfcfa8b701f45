"""Settle: decide, before a joint model is written, which sites are worth generating and which are plain.

A hypermodule that generates at most c distinct blocks is replaced by these; a site whose share
of its bank's bytes (rows divided among their users, contexts, index) is no less than its own plain bytes
becomes a plain tensor. What is written is therefore never larger than the members.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from surgery.anatomy.plan import Placement, Plan, torch_dtype
from surgery.dictionary.dictionary import Bank, duplicates, exact_bank
from surgery.dictionary.generation import to_weight

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
    placements: list[Placement] = []
    plain: dict[tuple[str, str], Tensor] = {}
    for bank_plan in plan.banks:
        before, mine = found[bank_plan.key], [p for p in plan.placements if p.bank == bank_plan.key]
        if bank_plan.key in keep:
            banks[bank_plan.key] = before
            placements += mine
            continue
        bank = retire_rare(before)
        kept = _worth_generating(bank, mine, torch_dtype(bank_plan.dtype).itemsize)
        if kept:
            banks[bank_plan.key], moved = _select(bank, kept)
            placements += moved
        if left := [p for p in mine if p not in kept]:
            blocks = before.settled_blocks()
            plain |= {(p.site.member, p.site.name): to_weight(blocks[p.start : p.stop], p) for p in left}
    order = {(p.site.member, p.site.name): i for i, p in enumerate(plan.placements)}
    placements.sort(key=lambda p: order[p.site.member, p.site.name])
    plans = tuple(
        replace(b, locations=banks[b.key].locations, context=banks[b.key].context)
        for b in plan.banks
        if b.key in banks
    )
    return Settled(replace(plan, banks=plans, placements=tuple(placements)), banks, plain)


def retire_rare(bank: Bank) -> Bank:
    """Replace hypermodules that generate at most c distinct blocks by single rows, one for each of these.

    Those that fewer than c locations use are among them, and all that were opened and not trained.
    """
    psi, c, count = bank.psi, bank.context, bank.hypermodules
    if bank.diagonals is not None:  # a location's own: as a rule no two blocks are equal
        return exact_bank(bank.settled_blocks(), bank.block)
    if not count:
        return bank
    settled = bank.settled_blocks()
    pairs = torch.unique(
        torch.stack([psi, duplicates(settled)[0]]), dim=1
    )  # blocks equal up to a factor are one
    kept = torch.bincount(pairs[0][pairs[0] < count], minlength=count) > c
    if bool(kept.all()):
        return bank
    number = torch.cumsum(kept, 0) - 1
    shared = (psi < count) & kept[psi.clamp_max(count - 1)]
    blocks = settled[~shared]
    representative, factor = duplicates(blocks)
    single_rows, single = torch.unique(representative, return_inverse=True)
    rows = torch.cat(
        [
            bank.rows.detach().view(-1, blocks.shape[1])[: count * c].view(count, c, -1)[kept].flatten(0, 1),
            blocks[single_rows],
        ]
    )
    contexts = bank.coefficients.detach().clone()
    contexts[~shared] = 0
    contexts[~shared, 0] = factor
    new_psi = torch.empty_like(psi)
    new_psi[shared] = number[psi[shared]]
    new_psi[~shared] = single + int(kept.sum())
    return Bank(bank.block, rows, new_psi, contexts, int(kept.sum()))


def index_dtype(count: int) -> torch.dtype:
    """The smallest integer type that numbers `count` things."""
    return torch.uint8 if count <= 1 << 8 else torch.uint16 if count <= 1 << 16 else torch.int32


def _worth_generating(bank: Bank, placements: list[Placement], itemsize: int) -> list[Placement]:
    """Drop sites that cost more in the bank than plain, again and again until every one left pays.

    Single rows take the members' `itemsize`; rows that are summed, contexts and factors keep the master
    dtype.
    """
    kept, previous = list(placements), -1
    count, master = bank.hypermodules, bank.rows.element_size()
    width, shared = bank.rows.shape[1], bank.psi < count
    factors = bool((bank.contexts[~shared, 0] != 1).any())
    rows = torch.where(shared, float(bank.context * width * master), float(width * itemsize))
    codes = torch.where(shared, float(bank.context * master), float(master * factors))
    while kept and len(kept) != previous:
        previous = len(kept)
        used = torch.cat([bank.psi[p.start : p.stop] for p in kept])
        uses = torch.bincount(used, minlength=count + bank.singles).clamp_min(1)
        index_bytes = index_dtype(int((uses[used].double() ** -1).sum().round())).itemsize
        cost = rows.double() / uses[bank.psi] + codes + index_bytes
        kept = [p for p in kept if float(cost[p.start : p.stop].sum()) < _numel(p) * itemsize]
    return kept


def _select(bank: Bank, placements: list[Placement]) -> tuple[Bank, list[Placement]]:
    """The bank of these placements alone, rows that they do not use removed, with the placements moved."""
    chosen = torch.cat([torch.arange(p.start, p.stop, device=bank.psi.device) for p in placements])
    psi, c = bank.psi[chosen], bank.context
    used, compact = torch.unique(psi, return_inverse=True)
    hyper, single = used[used < bank.hypermodules], used[used >= bank.hypermodules]
    index = torch.cat(
        [
            (hyper.unsqueeze(1) * c + torch.arange(c, device=psi.device)).reshape(-1),
            single + bank.hypermodules * (c - 1),
        ]
    )
    contexts = bank.coefficients.detach()[chosen]
    if not len(hyper):  # single rows need one column only
        contexts = contexts[:, :1]
    moved, start = [], 0
    for p in placements:
        moved.append(replace(p, start=start))
        start += p.grid.locations
    return Bank(bank.block, bank.rows.detach()[index].clone(), compact, contexts.clone(), len(hyper)), moved


def _numel(p: Placement) -> int:
    return p.grid.stack * p.grid.out * p.grid.into
