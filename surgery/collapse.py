"""Collapse: generated weights back into ordinary ones.

Generating tensors is exactly undone: a member's state dict has its keys, order, dtypes and ties as they were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from surgery.generation import to_weight
from surgery.memory import compact
from surgery.slots import locate

if TYPE_CHECKING:
    from surgery.joint import JointModel


@torch.no_grad()
def collapse(joint: JointModel, name: str) -> dict[str, Tensor]:
    """The ordinary state dict of one member, no tensor a view of a larger storage.

    Weights of hypermodules that training did not move come back bit for bit; tied names map to one tensor.

    Args:
        joint: the joint model.
        name: a member's name.

    Raises:
        KeyError: where there is no such member.
    """
    module, owners = joint[name], joint.owners[name]
    state: dict[str, Tensor] = {}
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
    return {key: state[key] for key in joint.state_keys[name] if key in state}
