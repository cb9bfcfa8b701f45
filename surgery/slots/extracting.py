"""Copies a member, or a part of one, as an ordinary module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgery.slots.collapse import collapse, collapsed
from surgery.slots.gate import unwatched
from surgery.slots.slots import forget_derived, locate, put_back, reorder
from surgery.util.copies import duplicate

if TYPE_CHECKING:
    from surgery.core.joint import JointModel


def dissolve(joint: JointModel, name: str) -> nn.Module:
    """One member itself with parameters of its own, as `extract` copies it; the joint model is used up.

    Args:
        joint: nobody needs any more.
        name: a member's name.
    """
    state, placed = collapsed(joint, name), joint.plan.of(name)
    learns = {p.site.name: joint.trains(name, p.site.name) for p in placed}
    joint.vacate()
    module = joint[name]
    for p in placed:
        put_back(module, p.site.owners, state[p.site.name], learns[p.site.name])
    reorder(module, joint.state_keys[name])
    forget_derived(module)
    return module


def extract(joint: JointModel, name: str, path: str = "", memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy with parameters of its own, of the values that the dictionary generates now.

    Args:
        joint: the joint model.
        name: a member's name.
        path: of a part of the member; by default all of it.
        memo: as `copy.deepcopy` has it.
    """
    state, module = collapse(joint, name), joint[name]
    part, below = module.get_submodule(path), f"{path}." if path else ""
    inside: dict[str, list[str]] = {}
    memo = {} if memo is None else memo
    for p in joint.plan.of(name):
        if mine := [o.removeprefix(below) for o in p.site.owners if o.startswith(below)]:
            inside[p.site.name] = mine
            slot = getattr(*locate(module, p.site.owners[0]))
            learns = joint.trains(name, p.site.name)
            with torch.inference_mode(False):  # tensors made in it can never be trained
                memo[id(slot)] = nn.Parameter(state[p.site.name].clone(), requires_grad=learns)
    parameters = {site: memo[id(getattr(*locate(part, mine[0])))] for site, mine in inside.items()}
    with unwatched(part), torch.inference_mode(False):
        copy = duplicate(part, memo)
    for site, mine in inside.items():
        put_back(copy, mine, parameters[site])
    reorder(copy, [key.removeprefix(below) for key in joint.state_keys[name] if key.startswith(below)])
    forget_derived(copy)
    return copy
