"""Collapse: generated weights back into ordinary ones.

Generating tensors is exactly undone: a member's state dict has its keys, order, dtypes and ties as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from surgery.core.generation import to_weight
from surgery.members.extra_state import extra_state_of
from surgery.members.member import owners_of
from surgery.slots.edits import take_edits
from surgery.slots.slots import locate
from surgery.util.memory import compact

if TYPE_CHECKING:
    from surgery.core.joint import JointModel


@torch.no_grad()
def collapse(joint: JointModel, name: str) -> dict[str, Any]:
    """The ordinary state dict of one member, extra state included, no tensor a view of a larger storage.

    Weights of hypermodules that training did not move come back bit for bit; tied names map to one tensor.

    Args:
        joint: the joint model.
        name: a member's name.

    Raises:
        KeyError: where there is no such member.
        PlanError: where a generated weight of a member was replaced.
    """
    follow(joint)
    module, owners = joint[name], joint.owners[name]
    state: dict[str, Any] = {}
    placements = joint.plan.of(name)
    for key in dict.fromkeys(p.bank for p in placements):
        blocks = joint.dictionary[key].settled_blocks()
        for p in placements:
            if p.bank == key:
                state[p.site.name] = compact(to_weight(blocks[p.start : p.stop], p))
    for first in owners:
        if first not in state:
            holder, attribute = locate(module, first)
            state[first] = compact(getattr(holder, attribute).detach())
    for first, names in owners.items():
        state.update({each: state[first] for each in names})
    state |= extra_state_of(module)
    return {key: state[key] for key in joint.state_keys[name] if key in state}


def follow(joint: JointModel) -> None:
    """Take note of what was done to members since they were joined: edits of slots, tensors got and lost.

    Raises:
        PlanError: naming slots that were replaced, and edits that the dictionary cannot hold.
    """
    take_edits(joint, joint.names)
    for name in joint.names:
        sites = {each: p.site.owners for p in joint.plan.of(name) for each in p.site.owners}
        plain = [tuple(n for n in names if n not in sites) for names in owners_of(joint[name]).values()]
        owners = {names[0]: names for names in (*plain, *sites.values()) if names}
        before, now = _names(joint.owners[name]), _names(owners)
        if before != now:
            joint.owners[name] = owners
            kept = [key for key in joint.state_keys[name] if key in now or key not in before]
            joint.state_keys[name] = tuple(dict.fromkeys([*kept, *sorted(now)]))


def _names(owners: Mapping[str, Sequence[str]]) -> set[str]:
    return {name for names in owners.values() for name in names}
