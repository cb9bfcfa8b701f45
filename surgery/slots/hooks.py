"""Hooks: a member's slots follow the dictionary whichever part of it is called.

Calling a member is not the only way in: `generate` of an encoder-decoder model calls the encoder first,
timm's `forward_features` calls the stages, and fast paths read the weights of submodules that they never
call. So every module above a slot is watched; the outermost one that is entered has everything below it made
current, once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgery.slots.gate import Gate, release
from surgery.slots.guards import GUARDS, Register
from surgery.slots.states import Give, Take

if TYPE_CHECKING:
    from surgery.core.joint import JointModel


class Enter(Gate):
    """Forward pre-hook: makes slots current where the call comes from outside the member."""

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Tell the joint model that the module is about to run."""
        filler = self.joint.filler
        if not self.path:
            filler.enter(self.member, "")
        # Inside a compiled graph the root's gate, which runs outside of it, has seen to everything.
        elif (
            not torch.compiler.is_compiling()
            and not filler.is_within(self.member)
            and filler.enter(self.member, self.path)
        ):
            module.register_forward_hook(Leave(self.joint, self.member, self.path), always_call=True)


class Listen(Gate):
    """Forward pre-hook of a module that depends on the task: it may run again in a backward pass."""

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Tell the module which task it serves."""
        if not torch.compiler.is_compiling():
            self.joint.filler.listen(torch._C._current_graph_task_id() != -1)


class Leave(Gate):
    """Forward hook, called after exceptions too: the next call comes from outside again."""

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Tell the joint model that the module ran."""
        self.joint.filler.leave(self.member, self.path)
        if self.path:
            release(module, Leave, deep=False)


class Door(OrderedDict):
    """The forward pre-hooks of a module within a member: as good as none where its gates would find nothing to do.

    PyTorch asks whether there are any, and takes a slower way through a module that has some, which costs about as much
    as a small linear map. While the member runs, all was seen to when it was entered, the task too; within a backward
    pass it does not.

    Attributes:
        gates: keys of the gates among the hooks.
        member: whose module it is.
        inside: names of members that run.
    """

    gates: frozenset[int] = frozenset()
    member: str = ""
    inside: Container[str] = ()

    def __bool__(self) -> bool:
        if self.member in self.inside and self.keys() == self.gates:
            return False
        return len(self) > 0

    def __reduce__(self) -> Any:
        return OrderedDict, (list(self.items()),)  # a copied member has ordinary hooks


def watch(joint: JointModel, member: str, module: nn.Module, owners: list[str]) -> None:
    """Put gates on every module of a member that has a slot in it or below it.

    Args:
        joint: the joint model.
        member: the member's name.
        module: its module.
        owners: of all its sites.
    """
    paths = {".".join(owner.split(".")[:depth]) for owner in owners for depth in range(owner.count(".") + 1)}
    parts: dict[int, str] = {}
    for path in sorted(paths):
        parts.setdefault(id(module.get_submodule(path)), path)  # one module may have two names
    for path, part in module.named_modules():
        if hasattr(type(part), "serve_task"):
            _at_door(part, Listen(joint, member, path))
    holders = {owner.rpartition(".")[0] for owner in owners}
    for path in parts.values():
        part, below = module.get_submodule(path), f"{path}." if path else ""
        _at_door(part, Enter(joint, member, path))
        if (
            not path
        ):  # others have this hook only while a call from outside runs: two hooks each would be felt
            part.register_forward_hook(Leave(joint, member, path), always_call=True)
        keys = [key.removeprefix(below) for key in joint.state_keys[member] if key.startswith(below)]
        give = Give(joint, member, path, keys)
        part.register_state_dict_pre_hook(give)
        part.register_state_dict_post_hook(give)
        part.register_load_state_dict_pre_hook(Take(joint, member, path))
        for kind in (*GUARDS, Register) if path in holders else GUARDS:
            part.__dict__[kind.method] = kind(joint, member, path).__call__  # a bound method, as it was


def _at_door(part: nn.Module, gate: Gate) -> None:
    """Make a gate a forward pre-hook of a module within its member, behind a door where all hooks are gates."""
    # Whoever holds the hooks that there are goes on holding them.
    if gate.path and not part._forward_pre_hooks:
        part._forward_pre_hooks = Door()
    handle, door = part.register_forward_pre_hook(gate), part._forward_pre_hooks
    if isinstance(door, Door):
        door.gates |= {handle.id}
        door.member, door.inside = gate.member, gate.joint.filler.inside
