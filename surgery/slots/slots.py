"""Slots: the places in a member where generated tensors are put.

The `Parameter` of a site is removed from every owner and a plain tensor takes its place as an attribute, so
the member keeps its class, its forward and its speed. `setattr` is used throughout: assigning into
`_parameters` would leave the flat weights of an LSTM stale. What is in a slot is a `Slot`, so that whatever is done
to it in place leaves its mark in the tensor's version, also what is done through `.data`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from surgery.errors import PlanError
from surgery.util.modules import kept_modes


class Slot(Tensor):
    """A generated tensor in its slot; like `nn.Parameter` it is a plain tensor in every computation."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The same memory without history; writing to it counts as writing to the slot."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.shape != self.shape or value.dtype != self.dtype or value.device != self.device:
            raise PlanError(
                f"A weight that a dictionary generates keeps its shape, dtype and device, {describe(self)}, but its "
                f".data was given {describe(value)}; take joint.extract(NAME), whose weights are its own."
            )
        with torch.no_grad():
            self.copy_(value)

    def __deepcopy__(self, memo: dict) -> Tensor:
        copied = memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().__reduce_ex__(protocol)  # files hold plain tensors


def describe(tensor: Tensor) -> str:
    """A tensor's shape, dtype and device for an error.

    Example:
        >>> describe(torch.zeros(2, 3))
        '2x3 float32 on cpu'
    """
    size = "x".join(map(str, tensor.shape)) or "scalar"
    return f"{size} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


@dataclass(frozen=True)
class Filling:
    """What was put in the slots of a site.

    Attributes:
        tensor: itself.
        version: of it when it was put there, with where its memory lies and whether it requires a gradient.
    """

    tensor: Tensor
    version: tuple

    @property
    def touched(self) -> bool:
        """Whether the tensor has been written to since."""
        return _version(self.tensor) != self.version


def _version(tensor: Tensor) -> tuple:
    if not isinstance(tensor, Slot):
        return 0, 0, tensor.requires_grad
    return tensor._version, tensor.data_ptr(), tensor.requires_grad


class Slots:
    """The slots of all members of a joint model: where they are, and what was put in them.

    Attributes:
        fillings: by member and site.
        whole: whether the state dict of the joint model is taken, which has rows in place of weights.
        moving: whether modules are moved, with all that the dictionary holds for them.
        taken: what `load_state_dict` has given for an owner: the tensor, and versions of it and the dictionary.
    """

    def __init__(self) -> None:
        self.fillings: dict[str, dict[str, Filling]] = {}
        self.whole, self.moving = False, False
        self.taken: dict[tuple[str, str], tuple] = {}
        self._places: dict[str, dict[str, list[tuple[nn.Module, str]]]] = {}
        self._parents: dict[str, list[tuple[nn.Module, str, nn.Module, str]]] = {}

    def wire(self, member: str, module: nn.Module, owners: Mapping[str, Sequence[str]]) -> None:
        """Find the slots of a member, whose sites have these owners."""
        self.fillings[member] = {}
        self._places[member] = {
            site: [locate(module, owner) for owner in names] for site, names in owners.items()
        }
        parents = {}
        for owner in (owner for names in owners.values() for owner in names):
            above, path = module, ""
            for step in owner.split(".")[:-1]:
                path, below = f"{path}.{step}" if path else step, above.get_submodule(step)
                parents[path] = (above, step, below, path)
                above = below
        self._parents[member] = list(parents.values())

    def put(self, member: str, site: str, tensor: Tensor) -> None:
        """Fill the slots of a site with a tensor, which becomes a `Slot`."""
        if type(tensor) is Tensor:  # others, as of an export, have a meaning of their own
            tensor.__class__ = Slot
        for holder, attribute in self._places[member][site]:
            holder._parameters.pop(attribute, None)
            setattr(holder, attribute, tensor)
        self.fillings[member][site] = Filling(tensor, _version(tensor))

    def leave_in_place(self, member: str, site: str) -> None:
        """Let recurrent layers take what is in the slots of a site for the weights of their last pass.

        Otherwise they move new weights, and biases beside them, into other memory on a device as each pass begins. That
        looks as if weights had been written to, and a captured step would take its biases from where they were before.
        """
        for holder, attribute in self._places[member][site]:
            names = getattr(holder, "_flat_weights_names", None)
            seen = getattr(holder, "_flat_weight_refs", None)
            if isinstance(holder, nn.RNNBase) and names and seen and attribute in names:
                seen[names.index(attribute)] = weakref.ref(self.fillings[member][site].tensor)

    def put_again(self, member: str) -> None:
        """Put back what an assignment took away."""
        for site, filling in self.fillings[member].items():
            for holder, attribute in self._places[member][site]:
                if holder.__dict__.get(attribute) is None and attribute not in holder._parameters:
                    holder.__dict__[attribute] = filling.tensor

    def accept(self, member: str, site: str) -> None:
        """Take what is in the slots of a site for what the dictionary generates."""
        tensor = self.fillings[member][site].tensor
        self.fillings[member][site] = Filling(tensor, _version(tensor))

    def replaced(self, member: str) -> list[str]:
        """What stands where a slot or a module above one was: `path (class)`."""
        found = [
            f"{path} ({_kind(parent._modules.get(child))})"
            for parent, child, module, path in self._parents.get(member, ())
            if parent._modules.get(child) is not module
        ]
        for site, filling in self.fillings.get(member, {}).items():
            for holder, attribute in self._places[member][site]:
                if holder.__dict__.get(attribute) is not filling.tensor:
                    found.append(f"{site} ({_kind(getattr(holder, attribute, None))})")
        return found

    @contextmanager
    def mark(self, name: str) -> Iterator[None]:
        """Inside, `whole` or `moving` is true."""
        before = getattr(self, name)
        setattr(self, name, True)
        try:
            yield
        finally:
            setattr(self, name, before)


def _kind(found: Any) -> str:
    return "gone" if found is None else type(found).__name__


def locate(module: nn.Module, owner: str) -> tuple[nn.Module, str]:
    """The submodule and the attribute that a state-dict key names."""
    path, _, attribute = owner.rpartition(".")
    holder = module
    for part in path.split(".") if path else ():
        children = holder._modules  # of a scripted module it is no dict, and has no `get`
        if part not in children or children[part] is None:
            holder = module.get_submodule(path)  # an attribute that is no child, or an error that names it
            break
        holder = cast(nn.Module, children[part])
    return holder, attribute


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


def put_back(module: nn.Module, owners: Iterable[str], tensor: Tensor, requires_grad: bool = True) -> None:
    """Turn slots into one ordinary parameter again, shared by all owners."""
    if not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor.detach(), requires_grad=requires_grad and tensor.is_floating_point())
    parameter = tensor
    for owner in owners:
        holder, attribute = locate(module, owner)
        holder.__dict__.pop(attribute, None)
        setattr(holder, attribute, parameter)


def reorder(module: nn.Module, keys: Sequence[str]) -> None:
    """Put parameters back in the order of the state-dict keys `keys`: setting one moved it to the end."""
    rank = {key: number for number, key in enumerate(keys)}
    for path, holder in module.named_modules():
        own = holder._parameters
        if isinstance(holder, torch.jit.ScriptModule):  # its order is compiled
            continue
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
    if all(each.training for each in module.modules()):
        return
    with kept_modes(module.modules()):
        module.train()
