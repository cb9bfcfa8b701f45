"""Hooks: a member's slots follow the dictionary whichever part of it is called, and what would write it
broken refuses.

Calling a member is not the only way in: `generate` of an encoder-decoder model calls the encoder first,
timm's `forward_features` calls the stages, and fast paths read the weights of submodules that they never
call. So every module above a slot is watched; the outermost one that is entered has everything below it made
current, once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgery.errors import PlanError

if TYPE_CHECKING:
    from surgery.joint import JointModel


class Gate(ABC):
    """Watches one module of a member; it knows its joint model, which it does not own."""

    def __init__(self, joint: JointModel, member: str, path: str):
        self.joint, self.member, self.path = joint, member, path

    @abstractmethod
    def __call__(self, module: nn.Module, *args: Any) -> None:
        """What happens around a call of the module."""

    def __deepcopy__(self, memo: dict) -> Gate:
        return self  # a copied member is freed of it by `release`


class Enter(Gate):
    """Forward pre-hook: makes slots current where the call comes from outside the member."""

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Tell the joint model that the module is about to run."""
        if not self.path:
            self.joint.enter(self.member, "")
        # Inside a compiled graph the root's gate, which runs outside of it, has seen to everything.
        elif not torch.compiler.is_compiling() and self.joint.enter(self.member, self.path):
            module.register_forward_hook(Leave(self.joint, self.member, self.path), always_call=True)


class Leave(Gate):
    """Forward hook, called after exceptions too: the next call comes from outside again."""

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Tell the joint model that the module ran."""
        self.joint.leave(self.member, self.path)
        if self.path:
            release(module, Leave, deep=False)


class Refuse:
    """Takes the place of `save_pretrained`, which would silently leave out every slot."""

    def __init__(self, member: str):
        self.member = member

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Say what would be lost, and what to do."""
        raise PlanError(
            f"Member '{self.member}' keeps its site weights in the dictionary, so its own save_pretrained "
            "would write a broken model; use surgery.export, or "
            f"joint.extract('{self.member}').save_pretrained(...)."
        )


def watch(joint: JointModel, member: str, module: nn.Module, owners: list[str]) -> None:
    """Put gates on every module of a member that has a slot in it or below it, and guard what saves it."""
    paths = {".".join(owner.split(".")[:depth]) for owner in owners for depth in range(owner.count(".") + 1)}
    for path in sorted(paths):
        part = module.get_submodule(path)
        part.register_forward_pre_hook(Enter(joint, member, path))
        if (
            not path
        ):  # others have this hook only while a call from outside runs: two hooks each would be felt
            part.register_forward_hook(Leave(joint, member, path), always_call=True)
    for part in module.modules():
        if owners and hasattr(part, "save_pretrained"):
            part.__dict__["save_pretrained"] = Refuse(member)


def release(module: nn.Module, kind: type[Gate] = Gate, *, deep: bool = True) -> None:
    """Take away whatever `watch` put on a module or on what it was copied from."""
    for part in module.modules() if deep else (module,):
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
                del hooks[key]
                part._forward_hooks_always_called.pop(key, None)
        if deep and isinstance(part.__dict__.get("save_pretrained"), Refuse):
            del part.__dict__["save_pretrained"]
