"""Collapse: generated weights back into ordinary ones.

Generating tensors is exactly undone: a member's state dict has its keys, order, dtypes and ties as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from surgery.core.generation import generated
from surgery.handles.handle import Handle, Made
from surgery.handles.state import LazyState
from surgery.members.extra_state import extra_state_of
from surgery.members.member import owners_of
from surgery.slots.edits import take_edits
from surgery.slots.slots import locate
from surgery.util.memory import compact

if TYPE_CHECKING:
    from surgery.core.joint import JointModel


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
    with joint.dictionary.borrowed():
        return collapsed(joint, name).resident()


def collapsed(joint: JointModel, name: str) -> LazyState:
    """What `collapse` returns, each tensor made when it is asked for.

    It says what the dictionary generates then: read it before anything is changed.

    Args:
        joint: the joint model.
        name: a member's name.

    Raises:
        KeyError: where there is no such member.
        PlanError: where a generated weight of a member was replaced.
    """
    follow(joint, [name])
    module, owners = joint[name], joint.owners[name]
    sites = generated(joint.dictionary, joint.plan.of(name))
    state: dict[str, Any] = {}
    for first, names in owners.items():
        found = sites.get((name, first))
        state.update(dict.fromkeys(names, found or _own(getattr(*locate(module, first)))))
    state |= extra_state_of(module)
    return LazyState({key: state[key] for key in joint.state_keys[name] if key in state})


def _own(tensor: Tensor) -> Handle:
    """A member's own tensor; a copy is made of a view of something larger."""
    tensor = tensor.detach()
    return Made(tuple(tensor.shape), tensor.dtype, tensor.device, partial(compact, tensor))


def follow(joint: JointModel, names: Sequence[str] | None = None) -> None:
    """Take note of what was done to members since they were joined: edits of slots, tensors got and lost.

    Args:
        joint: the joint model.
        names: of the members; all by default.

    Raises:
        PlanError: naming slots that were replaced, and edits that the dictionary cannot hold.
    """
    names = joint.names if names is None else names
    take_edits(joint, names)
    for name in names:
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
