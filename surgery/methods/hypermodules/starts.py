"""Starts: the alignment that training begins with, and which locations of other members correspond to each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from surgery.anatomy.plan import BankPlan
from surgery.core.joint import JointModel
from surgery.methods.hypermodules.evolution import regroup
from surgery.methods.hypermodules.settings import Evolution
from surgery.methods.rows.bank import RowsBank, rows_bank


def wrong_start(joint: JointModel, settings: Evolution) -> list[str]:
    """Why the alignment of a joint model cannot begin as `settings.start` and `settings.codes` say, in sentences."""
    if settings.start == "given" and settings.codes == "diagonals":
        return [
            "Codes that are diagonals cannot go on from a given alignment, because collapse took them away: set "
            "train.evolution.codes to contexts or ones."
        ]
    keys = joint.plan.keys_of("hypermodules")
    if settings.start == "atoms":
        wide = [f"{b.context} of {b.block[0]}x{b.block[1]}" for b in map(joint.plan.bank, keys) if _wide(b)]
        if wide:
            return [
                "Atoms are at most as many as a block has elements, but parameters.context asks for "
                f"{', '.join(wide)}: lower it."
            ]
    opened = [key for key in keys if getattr(joint.dictionary[key], "hypermodules", 0)]
    if settings.codes != "contexts" and opened:
        return [
            f"Codes that are {settings.codes} need members joined anew, but {', '.join(opened)} already has "
            "hypermodules with contexts: start from the members, or leave evolution.codes away."
        ]
    return []


def _wide(bank: BankPlan) -> bool:
    """Whether a hypermodule would have more basis blocks than are independent."""
    return bank.context > bank.block[0] * bank.block[1]


def align(joint: JointModel, settings: Evolution, generator: torch.Generator) -> None:
    """Give every bank of hypermodules the alignment that `settings.start` names.

    Args:
        joint: open.
        settings: of the evolution.
        generator: of a random alignment.
    """
    for key in joint.plan.keys_of("hypermodules"):
        bank: Any = joint.dictionary[key]
        if settings.codes == "diagonals":
            bank.add_diagonals()
        if settings.start == "own":
            regroup(bank, torch.arange(bank.locations), same=True)
        elif settings.start == "order":
            regroup(bank, by_order(joint, key))
        elif settings.start == "random":
            count = min(settings.hypermodules or bank.locations, bank.locations)
            regroup(bank, torch.randint(count, (bank.locations,), generator=generator))
        bank.rows.requires_grad_(not settings.freeze)


def keep(joint: JointModel, members: Collection[str]) -> None:
    """Let the blocks of some members stay as they are.

    Args:
        joint: open and aligned; blocks are what the members are to keep.
        members: names.
    """
    for key in joint.plan.keys_of("hypermodules"):
        bank: Any = joint.dictionary[key]
        kept = torch.zeros(bank.locations, dtype=torch.bool, device=bank.psi.device)
        for p in joint.plan.placements:
            if p.bank == key and p.site.member in members:
                kept[p.start : p.stop] = True
        bank.kept = kept if bool(kept.any()) else None


def take_over(joint: JointModel, loaded: JointModel) -> None:
    """Give a joint model the hypermodules of another one with the same members and weights.

    An artifact keeps as plain tensors what was not worth generating, so its plan may hold fewer sites; these stay
    single rows here. Sites in other blocks keep single rows too, and so do stacks: their templates are found again by
    fitting as many to what they generate.

    Args:
        joint: as `join` made it; it is changed in place.
        loaded: as `load` returned it.
    """
    places = {(p.site.member, p.site.name): p for p in loaded.plan.placements}
    for key in joint.plan.keys_of("hypermodules"):
        mine = joint.plan.in_bank(key)
        pairs = [
            (p, places[p.site.member, p.site.name]) for p in mine if (p.site.member, p.site.name) in places
        ]
        pairs = [(p, q) for p, q in pairs if q.grid == p.grid and q.bank == key]
        source = rows_bank(loaded.dictionary[key]) if pairs else None
        if source is None or not source.hypermodules:
            continue
        bank, count, c = rows_bank(joint.dictionary[key]), source.hypermodules, source.context
        origin = torch.full((bank.locations,), -1, device=bank.psi.device)
        for p, q in pairs:
            origin[p.start : p.stop] = torch.arange(q.start, q.stop, device=origin.device)
        shared = (origin >= 0) & (source.psi[origin.clamp_min(0)] < count)
        used, single = torch.unique(bank.psi[~shared], return_inverse=True)
        contexts = bank.contexts.detach().new_zeros(bank.locations, c)
        contexts[:, :1] = bank.contexts.detach()[:, :1]
        contexts[shared] = source.contexts.detach()[origin[shared]]
        psi = torch.empty_like(bank.psi)
        psi[shared], psi[~shared] = source.psi[origin[shared]], count + single
        rows = torch.cat([source.rows.detach()[: count * c], bank.rows.detach()[used]])
        joint.dictionary.banks[key] = RowsBank(bank.block, rows, psi, contexts, count)


def by_order(joint: JointModel, key: str) -> Tensor:
    """The place of each location of a bank among those of its member, in execution order: `[L]`."""
    bank = joint.dictionary[key]
    group = torch.zeros(bank.locations, dtype=torch.long)
    for name in joint.names:
        places = [p for p in joint.plan.of(name) if p.bank == key]
        own = [torch.arange(p.start, p.stop) for p in sorted(places, key=lambda p: p.site.order)]
        if own:
            locations = torch.cat(own)
            group[locations] = torch.arange(len(locations))
    return group


def siblings(joint: JointModel, key: str) -> Tensor | None:
    """For each location of a bank those at the same place of the same tensor in other members.

    Returns:
        `[L, F]` location numbers, -1 where a member has no such tensor; None where no member has one.
    """
    families = defaultdict(list)
    for p in joint.plan.placements:
        if p.bank == key:
            families[p.site.name, p.grid].append(p)
    most = max((len(family) for family in families.values()), default=0)
    if most < 2:
        return None
    places = torch.full((joint.dictionary[key].locations, most - 1), -1)
    for family in families.values():
        for p in family:
            for column, other in enumerate(q for q in family if q is not p):
                places[p.start : p.stop, column] = torch.arange(other.start, other.stop)
    return places
