"""Slots: the places in a member where generated tensors are put.

The `Parameter` of a site is removed from every owner and a plain tensor takes its place as an attribute, so
the member keeps its class, its forward and its speed. `setattr` is used throughout: assigning into
`_parameters` would leave the flat weights of an LSTM stale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn


def locate(module: nn.Module, owner: str) -> tuple[nn.Module, str]:
    """The submodule and the attribute that a state-dict key names."""
    path, _, attribute = owner.rpartition(".")
    return module.get_submodule(path), attribute


def take_out(module: nn.Module, owners: Iterable[str]) -> nn.Parameter:
    """Remove a parameter from all its owners and return it; the slots are empty until `put_in`."""
    parameter: nn.Parameter | None = None
    for owner in owners:
        holder, attribute = locate(module, owner)
        found = holder._parameters.pop(attribute, None)  # two owners may be one module under two names
        parameter = found if parameter is None else parameter
    if parameter is None:
        raise KeyError(f"no parameter under {list(owners)}")
    return parameter


def put_in(module: nn.Module, owners: Iterable[str], tensor: Tensor) -> None:
    """Fill the slots of all owners with one tensor."""
    for owner in owners:
        holder, attribute = locate(module, owner)
        setattr(holder, attribute, tensor)


def has_slot(module: nn.Module, owner: str) -> bool:
    """Whether a slot is still where a parameter was taken out: its layer may have been replaced or wrapped."""
    try:
        holder, attribute = locate(module, owner)
    except AttributeError:
        return False
    return isinstance(holder.__dict__.get(attribute), Tensor) and attribute not in holder._parameters


def put_back(module: nn.Module, owners: Iterable[str], tensor: Tensor, requires_grad: bool = True) -> None:
    """Turn slots into one ordinary parameter again, shared by all owners."""
    parameter = nn.Parameter(tensor.detach(), requires_grad=requires_grad and tensor.is_floating_point())
    for owner in owners:
        holder, attribute = locate(module, owner)
        holder.__dict__.pop(attribute, None)
        setattr(holder, attribute, parameter)


def reorder(module: nn.Module, keys: Sequence[str]) -> None:
    """Put parameters back in the order of the state-dict keys `keys`: setting one moved it to the end."""
    rank = {key: number for number, key in enumerate(keys)}
    for path, holder in module.named_modules():
        own = holder._parameters
        ordered = sorted(own, key=lambda name: rank.get(f"{path}.{name}" if path else name, -1))
        if ordered != list(own):
            tensors = {name: own[name] for name in ordered}
            own.clear()
            own.update(tensors)


def assign(module: nn.Module, tensors: Mapping[str, Tensor], owners: Mapping[str, tuple[str, ...]]) -> None:
    """Give a module its plain tensors, without copying; tied names get the same `Parameter`.

    Args:
        module: parameters may be on the meta device.
        tensors: by first owner; parameters and buffers.
        owners: all owners by first owner.
    """
    for name, tensor in tensors.items():
        holder, attribute = locate(module, name)
        if attribute in holder._buffers:
            for owner in owners.get(name, (name,)):
                at, attribute = locate(module, owner)
                at._buffers[attribute] = tensor
        else:
            own = holder._parameters  # of a scripted module it is no dict, and has no `get`
            current = dict(own.items()).get(attribute)
            learns = current is None or current.requires_grad
            put_back(module, owners.get(name, (name,)), tensor, learns)


def forget_derived(module: nn.Module) -> None:
    """Make a module in eval mode forget what it derived from its weights and kept.

    Some models cache such tensors after a forward pass in eval mode and drop them when set to training; every
    submodule's mode is put back as it was.
    """
    modes = [(each, each.training) for each in module.modules()]
    if all(training for _, training in modes):
        return
    module.train()
    for each, training in modes:
        each.training = training
