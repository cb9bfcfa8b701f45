"""Keeps track of which modules belong to which joint model; a module can be part of one only.

Joining takes modules over: their parameters go into a dictionary and come back as slots, which the next forward pass
fills. A second joint model over the same module would take what is left, and each would fill the slots of both. So a
joint model notes its members' modules here, weakly: nothing is kept alive, nothing is written into a module, and a
module is free again once its joint model has let it go or is no more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.disk.untrusted import shown_text
from surgery.errors import PlanError, shorten

if TYPE_CHECKING:
    from surgery.core.joint import JointModel

_occupants: dict[int, tuple[weakref.ref[nn.Module], weakref.ref[JointModel], str]] = {}
"""By the identity of a module: the module, the joint model that it belongs to, and as which member."""


def occupy(joint: JointModel, name: str, module: nn.Module) -> None:
    """Note that a member's modules belong to a joint model; parts without tensors of their own belong to nobody."""
    owner = weakref.ref(joint)
    for part in module.modules():
        if part is module or any(_own(part)):
            _occupants[id(part)] = (weakref.ref(part, _forget(id(part))), owner, name)


def leave(joint: JointModel) -> None:
    """Note that no module belongs to a joint model any longer."""
    # Keys alone: the pairs of `items` would be made, and what is made may end modules meanwhile.
    for key in list(_occupants):
        _, owner, _ = _occupants.get(key, (None, None, ""))
        if owner is None or owner() in (joint, None):
            _occupants.pop(key, None)


def occupant(module: nn.Module) -> tuple[JointModel, str] | None:
    """The joint model that a module belongs to, and as part of which member; None where it is free."""
    part, owner, name = _occupants.get(id(module), (None, None, ""))
    if part is None or owner is None or part() is not module:
        return None
    joint = owner()
    return None if joint is None else (joint, name)


def check_modules(modules: Any, members: Collection[str]) -> None:
    """Refuse what was given as modules by member and is none.

    Args:
        modules: None where nothing was given.
        members: names that there are.

    Raises:
        PlanError: where it is no mapping, or names a member that there is not, or something is no module.
    """
    if modules is None:
        return
    names = ", ".join(members)
    if not isinstance(modules, Mapping):
        raise PlanError(
            f"`modules` must be a mapping from members' names to modules, found {type(modules).__name__}; the members "
            f"are {names}."
        )
    if unknown := [shown_text(str(name)) for name in modules if name not in members]:
        raise PlanError(f"`modules` must name members, found {', '.join(unknown)}; the members are {names}.")
    if wrong := [
        f"{type(each).__name__} for {name}"
        for name, each in modules.items()
        if not isinstance(each, nn.Module)
    ]:
        raise PlanError(
            f"`modules` must hold modules (torch.nn.Module), found {', '.join(wrong)}; give instances."
        )


def check_free(modules: Mapping[str, nn.Module]) -> None:
    """Refuse modules that cannot become members of one joint model.

    Args:
        modules: by the member that each shall be.

    Raises:
        PlanError: naming every module that belongs to a joint model or to two of these members, and every tensor that
            two of them, or one of them and a member of another joint model, hold.
    """
    if not modules:
        return
    check_unoccupied(modules)
    if bad := _shared_modules(modules) or _shared_tensors(modules):
        raise PlanError(
            f"Members need modules and tensors of their own, but {shorten(bad, separator='; ')}; give one of them a "
            "copy.deepcopy, and what is equal is shared."
        )


def check_unoccupied(modules: Mapping[str, nn.Module], joint: JointModel | None = None) -> None:
    """Refuse modules that belong to a joint model.

    Args:
        modules: by member.
        joint: the joint model that they may belong to.

    Raises:
        PlanError: naming them.
    """
    taken: dict[tuple[str, str], str] = {}
    for name, module in modules.items():
        for path, part in module.named_modules():
            owner = occupant(part)
            if owner is not None and owner[0] is not joint:
                found = f"{_named(name, path, part)} is part of '{owner[1]}' of another joint model"
                taken.setdefault((name, owner[1]), found)
    if taken:
        raise PlanError(
            f"Members need modules of their own, but {shorten(taken.values(), separator='; ')}; take an "
            "ordinary copy out of that joint model with its extract, or load the member again."
        )


def _shared_modules(modules: Mapping[str, nn.Module]) -> list[str]:
    """Modules with tensors, or that are members, in two members."""
    user: dict[int, str] = {}
    found: dict[tuple[str, str], str] = {}
    for name, module in modules.items():
        for path, part in module.named_modules():
            first = user.setdefault(id(part), name)
            if first != name and (part is module or part is modules[first] or any(_own(part))):
                found.setdefault((first, name), f"{_named(name, path, part)} is also part of '{first}'")
    return list(found.values())


def _shared_tensors(modules: Mapping[str, nn.Module]) -> list[str]:
    """Parameters and persistent buffers that another member holds, of these or of other joint models."""
    holder: dict[object, str] = {}
    for part_of, owner, member in list(_occupants.values()):
        part = part_of()
        if part is not None and owner() is not None:
            holder |= {_place(t): f"of '{member}' of another joint model" for _, t in _own(part)}
    found = []
    for name, module in modules.items():
        mine = {}
        for path, part in module.named_modules():
            for attribute, tensor in _own(part):
                place, key = _place(tensor), f"{path}.{attribute}" if path else attribute
                if place in holder:
                    found.append(f"{key} of '{name}' is also {holder[place]}")
                mine[place] = f"{key} of '{name}'"
        holder = {**mine, **holder}
    return found


def _own(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and persistent buffers by name."""
    for name, tensor in (*part._parameters.items(), *part._buffers.items()):
        if tensor is not None and name not in part._non_persistent_buffers_set:
            yield name, tensor


def _place(tensor: Tensor) -> object:
    """Equal for one tensor, and for tensors that are the same memory."""
    strided = tensor.layout == torch.strided and not nn.parameter.is_lazy(tensor)
    if not strided or tensor.device.type == "meta" or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _named(member: str, path: str, part: nn.Module) -> str:
    return f"{path or type(part).__name__} of '{member}'"


def _forget(key: int) -> Callable[[weakref.ref[nn.Module]], None]:
    """What removes a module that is no more; one that took its identity since stays."""

    def forget(gone: weakref.ref[nn.Module]) -> None:
        if key in _occupants and _occupants[key][0] is gone:
            del _occupants[key]

    return forget
