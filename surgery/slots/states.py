"""State dicts of members: generated weights are in them as if they were parameters.

`torch.save(module.state_dict())`, safetensors, accelerate, the hub client and `save_pretrained` all ask a module for
its state dict, and `load_state_dict` gives it one. A member's has every site's weight as it is generated now, in the
place that it always had; values that are loaded go into the dictionary where it can hold exactly these. The state
dict of the joint model has rows and codes instead, and what is private to members, nothing twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from surgery.slots.edits import take
from surgery.slots.gate import Gate


class Give(Gate):
    """Hook before and after a module's `state_dict`: puts in the weights of the module's own slots.

    Args:
        joint: the joint model.
        member: the member's name.
        path: of the module.
        keys: of the module's state dict in their order, when it still had parameters for its slots.
    """

    def __init__(self, joint: Any, member: str, path: str, keys: Sequence[str]):
        super().__init__(joint, member, path)
        self.keys, self.own = tuple(keys), self.slots(recurse=False)
        self._from_public_api = True  # to PyTorch: this hook returns nothing
        self._keep_vars = False

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Before: `(prefix, keep_vars)`; afterwards: `(state_dict, prefix, metadata)`."""
        if self.joint.slots.whole:
            return
        if len(args) == 2:
            self._keep_vars = args[1]
            self.joint.filler.make_current(self.member, self.below)
            return
        state, prefix, _ = args
        for key in self.own:
            tensor: Tensor = getattr(module, key)
            state[prefix + key] = tensor if self._keep_vars else tensor.detach()
        for key in self.keys if self.own else ():
            if prefix + key in state:
                state[prefix + key] = state.pop(prefix + key)


class Take(Gate):
    """Hook before a module's share of `load_state_dict`: writes what is there for slots into the dictionary.

    The outermost module that is asked sees to all slots below it, so that nothing is written where something must
    be refused.
    """

    def __call__(
        self,
        module: nn.Module,
        state: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        """Take the module's slots out of the state dict, which PyTorch would call unexpected."""
        found = {f"{self.below}{key}": state[prefix + key] for key in self.slots() if prefix + key in state}
        take(self.joint, self.member, found, bool(metadata.get("assign_to_params_buffers")), errors)
        for key in self.slots(recurse=False):
            if prefix + key in state:
                del state[prefix + key]
            elif strict:
                missing.append(prefix + key)


def keep_slots(joint: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Fill the members' weights into a joint model's state dict, which has rows instead, so that none counts as
    missing.
    """
    joint.begin("Loading a state dict")
    for number, name in enumerate(joint.names):
        for p in joint.plan.of(name):
            for owner in p.site.owners:
                held = joint.slots.fillings[name][p.site.name].tensor
                state.setdefault(f"{prefix}bodies.{number}.{owner}", held)
