"""Moves one member to another dtype or device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from surgery.anatomy.plan import Placement, Plan, plan_in_dtypes, torch_dtype
from surgery.core.dictionary import Dictionary
from surgery.core.generation import move_dictionary
from surgery.errors import PlanError
from surgery.util.dtypes import master_dtype

if TYPE_CHECKING:
    from surgery.core.joint import JointModel


def move(joint: JointModel, name: str, path: str, change: Callable) -> None:
    """Do to a member, or a part of it, what `Module.to` and the like do.

    Another dtype alone is the member's own affair: its weights are generated in it, from the same rows. Where rows
    have to follow, to another device or to double precision, the member must be the only one that draws on them.

    Args:
        joint: the joint model.
        name: the member's name.
        path: of the part.
        change: what is done to every tensor.

    Raises:
        PlanError: where the rows of other places would move; nothing is changed.
    """
    joint.begin("Moving a member")
    below = f"{path}." if path else ""
    mine = [p for p in joint.plan.of(name) if any(o.startswith(below) for o in p.site.owners)]
    dtypes = {p.site.dtype: _after(change, torch_dtype(p.site.dtype)) for p in mine}
    banks: dict[str, object] = {}
    for p in mine:
        bank = joint.dictionary[p.bank]
        probe = change(torch.empty(0, dtype=torch_dtype(p.site.dtype), device=bank.device))
        if (probe.device, master_dtype(probe.dtype)) != (bank.device, bank.dtype):
            banks[p.bank] = bank
    inside = {id(p) for p in mine}
    others = [p for p in joint.plan.placements if p.bank in banks and id(p) not in inside]
    if others:
        users = ", ".join(dict.fromkeys(f"'{p.site.member}'" for p in others))
        what = f"'{path}' of member '{name}'" if path else f"member '{name}'"
        raise PlanError(
            f"Moving {what} would move rows that {users} draws on as well: move all of the joint model with "
            f"joint.to(...), or take joint.extract('{name}'), whose weights are its own."
        )
    with joint.slots.mark("moving"):
        part = joint[name].get_submodule(path)
        type(part)._apply(part, change)
        for key in banks:
            move_dictionary(Dictionary({key: joint.dictionary[key]}), change)
    joint.plan = _in_dtypes(joint.plan, mine, dtypes, name, below, change)
    joint.refresh()


def move_all(joint: JointModel, change: Callable) -> None:
    """Do to a joint model what `Module.to` and the like do: members, what they had in replaced places, and rows.

    Args:
        joint: the joint model.
        change: what is done to every tensor.
    """
    joint.begin("Moving the model")
    known, dtypes, forms = joint.known, _dtypes(joint), _forms(joint)
    with joint.slots.mark("moving"):
        joint.bodies._apply(change)
        for replaced in (each for member in joint.members.values() for each in member.replaced):
            if replaced.original is not None:
                replaced.original._apply(change)
    move_dictionary(joint.dictionary, change)
    joint.plan = plan_in_dtypes(joint.plan, lambda dtype: change(torch.empty(0, dtype=dtype)).dtype)
    if _dtypes(joint) == dtypes:  # on another device weights are what they were
        joint.keep_known(known)
    # Slots are no parameters, nn.Module does not move them. Where nothing moved they stay: to fill them anew would
    # copy weights that are mapped.
    if _forms(joint) != forms or _dtypes(joint) != dtypes:
        joint.refresh()


def _forms(joint: JointModel) -> list[tuple[torch.device, torch.dtype]]:
    """Devices and dtypes of everything that is moved, apart from banks that still rest."""
    banks = [joint.dictionary[key] for key in joint.dictionary if not joint.dictionary.rests(key)]
    moved = (*joint.bodies.parameters(), *joint.bodies.buffers(), *banks)
    return [(each.device, each.dtype) for each in moved]


def _dtypes(joint: JointModel) -> list[torch.dtype]:
    """The dtypes of the members' tensors, generated ones included."""
    own = [t.dtype for t in (*joint.bodies.parameters(), *joint.bodies.buffers())]
    return own + [torch_dtype(p.site.dtype) for p in joint.plan.placements]


def _after(change: Callable, dtype: torch.dtype) -> str:
    return str(change(torch.empty(0, dtype=dtype)).dtype).removeprefix("torch.")


def _in_dtypes(
    plan: Plan, mine: list[Placement], dtypes: dict[str, str], name: str, below: str, change: Callable
) -> Plan:
    """The plan with some sites, and what was left alone beside them, in other dtypes."""
    chosen = {id(p) for p in mine}
    placements = tuple(
        replace(p, site=replace(p.site, dtype=dtypes[p.site.dtype])) if id(p) in chosen else p
        for p in plan.placements
    )
    kinds: dict[str, torch.dtype] = {}
    touched = {p.bank for p in mine}
    for p in (
        p for p in placements if p.bank in touched
    ):  # a bank's rows are stored in a dtype that holds the weights of all its sites
        own = torch_dtype(p.site.dtype)
        kinds[p.bank] = torch.promote_types(kinds.get(p.bank, own), own)
    banks = tuple(
        replace(b, dtype=str(kinds[b.key]).removeprefix("torch.")) if b.key in kinds else b
        for b in plan.banks
    )
    alone = tuple(
        replace(each, dtype=_after(change, torch_dtype(each.dtype)))
        if each.member == name and each.name.startswith(below)
        else each
        for each in plan.left_alone
    )
    return replace(plan, banks=banks, placements=placements, left_alone=alone)
