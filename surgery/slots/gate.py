"""Gate: the link from a member's module to the joint model whose dictionary generates its weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from surgery.anatomy.plan import Placement
    from surgery.core.joint import JointModel

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


class Gate:
    """A hook of one module, or what stands in for one of its methods; it does not own its joint model."""

    method = ""
    """The method that it stands in for; a hook has none."""

    __call__: Callable[..., Any]

    def __init__(self, joint: JointModel, member: str, path: str):
        self.joint, self.member, self.path = joint, member, path
        self._on = weakref.ref(joint[member].get_submodule(path))

    @property
    def part(self) -> nn.Module:
        """The module that the gate is on."""
        part = self._on()
        assert part is not None  # it is called by way of it
        return part

    @property
    def below(self) -> str:
        """The prefix of all names below the module."""
        return f"{self.path}." if self.path else ""

    def placements(self, *, recurse: bool = True) -> list[Placement]:
        """The sites with a slot in the module, or below it."""
        return [
            p for p in self.joint.plan.of(self.member) if any(self._mine(o, recurse) for o in p.site.owners)
        ]

    def slots(self, *, recurse: bool = True) -> dict[str, str]:
        """The site of every slot in the module, or below it, by its name seen from the module."""
        return {
            owner.removeprefix(self.below): p.site.name
            for p in self.placements(recurse=recurse)
            for owner in p.site.owners
            if self._mine(owner, recurse)
        }

    def _mine(self, owner: str, recurse: bool) -> bool:
        return owner.startswith(self.below) and (recurse or "." not in owner.removeprefix(self.below))

    def __deepcopy__(self, memo: dict) -> Gate:
        return self  # a copied member is freed of it


def release(module: nn.Module, kind: type[Gate] = Gate, *, deep: bool = True) -> None:
    """Take away whatever gates were put on a module or on what it was copied from."""
    for part in module.modules() if deep else (module,):
        for name in _HOOKS:
            hooks = getattr(part, name)
            for key in [key for key, hook in hooks.items() if _is_gate(hook, kind)]:
                del hooks[key]
                part._forward_hooks_always_called.pop(key, None)
        for name in [name for name, value in vars(part).items() if _is_gate(value, kind)]:
            del part.__dict__[name]


@contextmanager
def unwatched(module: nn.Module) -> Iterator[None]:
    """Inside, no module has a gate; afterwards all are where they were, between the same hooks of others."""
    kept = []
    for part in module.modules():
        before = {name: part.__dict__[name] for name in _HOOKS}
        before |= {name: value for name, value in vars(part).items() if _is_gate(value, Gate)}
        kept.append((part, before))
        for name, value in before.items():
            if name in _HOOKS:
                part.__dict__[name] = type(value)((k, h) for k, h in value.items() if not _is_gate(h, Gate))
            else:
                del part.__dict__[name]
    try:
        yield
    finally:
        for part, before in kept:
            part.__dict__.update(before)


def _is_gate(hook: Any, kind: type[Gate]) -> bool:
    hook = getattr(hook, "hook", hook)  # PyTorch wraps hooks of loading
    # What stands in for a method is bound to its gate.
    return isinstance(getattr(hook, "__self__", hook), kind)
