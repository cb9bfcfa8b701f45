"""Detects changes made to a slot in place and writes them into the dictionary.

`weight.mul_(2)`, `nn.init.zeros_(weight)` and `weight.data = ...` change a generated tensor, which the next fill would
quietly replace. A slot's version tells that it was written to. The values go into the dictionary where it can hold
exactly these, so that ordinary code works on a member that shares nothing; where they would change what others use, or
be lost, an error says so.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.errors import PlanError
from surgery.slots.slots import describe, forget_derived
from surgery.slots.writeback import changes, write
from surgery.util.text import shorten

if TYPE_CHECKING:
    from surgery.core.joint import JointModel


def take_edits(joint: JointModel, names: Sequence[str]) -> None:
    """Write what was done to the slots of some members into the dictionary.

    Raises:
        PlanError: naming every slot whose values the dictionary cannot hold, and every one that was replaced.
    """
    if replaced := [(each, name) for name in names for each in joint.slots.replaced(name)]:
        found = [f"{each} of '{name}'" for each, name in replaced]
        raise PlanError(
            "Members must keep the modules and slots that the dictionary fills, but others stand in place of "
            f"{shorten(found)}: make such changes to joint.extract('{replaced[0][1]}'), whose weights are its own, and "
            "join that."
        )
    if not any(filling.touched for name in names for filling in joint.slots.fillings.get(name, {}).values()):
        return
    touched = [p for p in joint.plan.placements if joint.slots.fillings[p.site.member][p.site.name].touched]
    given = [(p, joint.slots.fillings[p.site.member][p.site.name].tensor) for p in touched]
    labels = {number: f"{p.site.name} of '{p.site.member}'" for number, (p, _) in enumerate(given)}
    found, reasons = changes(joint.dictionary, given, labels)
    for number, (p, tensor) in enumerate(given):
        before = joint.slots.fillings[p.site.member][p.site.name]
        if tensor.requires_grad != before.version[2]:
            reasons.append(f"{labels[number]} (its requires_grad was set: use that of the member)")
        elif found and not joint.filler.is_filled(p.site.member):
            reasons.append(f"{labels[number]} (the dictionary may have changed since it was generated)")
    if reasons:
        first = given[0][0].site.member
        raise PlanError(
            "Weights that the dictionary generates were changed in place, which it can follow only where each has "
            f"rows of its own, but not for {shorten(reasons)}: change joint.extract('{first}'), whose weights are its "
            "own, or call joint.refresh() before, which also takes changes back."
        )
    with joint.filler.still_filled():
        write(joint.dictionary, found)
    for p in touched:
        joint.slots.accept(p.site.member, p.site.name)
    for name in {p.site.member for p in touched}:
        forget_derived(joint[name])


@torch.no_grad()
def take(joint: JointModel, name: str, found: Mapping[str, Any], assign: bool, errors: list[str]) -> None:
    """Load values for slots of a member, by owner; all of them or none.

    Args:
        joint: the joint model.
        name: the member's name.
        found: tensors by owner; those that are in the slots already are left out.
        assign: whether the member was asked to hold the very tensors.
        errors: PyTorch's own list of what does not fit.

    Raises:
        PlanError: where the dictionary cannot hold the values.
    """
    given, labels, reasons = [], {}, []
    for p in joint.plan.of(name):
        filling = joint.slots.fillings[name][p.site.name]
        for owner in p.site.owners:
            value = found.get(owner)
            if value is None or value is filling.tensor or _seen(joint, name, owner, value):
                continue
            if not isinstance(value, Tensor) or tuple(value.shape) != p.site.shape:
                size = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                errors.append(
                    f"size mismatch for {owner}: {size} from checkpoint, {p.site.shape} in the model."
                )
            elif assign and value.dtype != filling.tensor.dtype:
                reasons.append(f"{owner} (assign=True would make it {describe(value)})")
            elif value.is_meta and not filling.tensor.is_meta:
                reasons.append(f"{owner} (its values are on the meta device, where there are none)")
            else:
                labels[len(given)] = owner
                given.append((p, value))
    changed, impossible = changes(joint.dictionary, given, labels)
    if reasons := [*reasons, *impossible]:
        raise PlanError(
            f"Loading into member '{name}' writes into the dictionary, which can hold given values only where a "
            f"weight has rows of its own, but not for {shorten(reasons)}: load them into joint.extract('{name}'), "
            "whose weights are its own, and join that again. Nothing was loaded."
        )
    if not errors and changed:
        write(joint.dictionary, changed)
    now = joint.versions()
    for owner, value in found.items():
        if isinstance(value, Tensor) and not value.is_inference():
            joint.slots.taken[name, owner] = (weakref.ref(value), value._version, now)


def _seen(joint: JointModel, name: str, owner: str, value: Any) -> bool:
    """Whether an outer module's share of one `load_state_dict` has seen to a value."""
    known = joint.slots.taken.get((name, owner))
    return known is not None and known[0]() is value and known[1:] == (value._version, joint.versions())
