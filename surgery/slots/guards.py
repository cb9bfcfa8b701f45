"""Replaces methods of a member that would bypass its slots.

A slot is no parameter, so `to`, `half`, `requires_grad_`, `parameters` and copies would see to everything but the
weights that are generated, without a word. Each goes to the dictionary where that is what was meant, and refuses where
it would change other members as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from surgery.errors import PlanError
from surgery.slots.extracting import extract
from surgery.slots.gate import Gate
from surgery.slots.moving import move
from surgery.slots.slots import Slot, locate


class Move(Gate):
    """`to`, `half`, `cuda` and whatever else changes all tensors of a module."""

    method = "_apply"

    def __call__(self, change: Callable, recurse: bool = True) -> nn.Module:
        """Change what the module owns, and what the dictionary generates for it."""
        part = self.part
        if self.joint.slots.moving or not recurse:
            return type(part)._apply(part, change, recurse)
        move(self.joint, self.member, self.path, change)
        return part


class Parameters(Gate):
    """`named_parameters`, and with it `parameters` and `zero_grad`: the dictionary's are among a member's."""

    method = "named_parameters"

    def __call__(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The module's own parameters, then those of the banks that its weights are generated from.

        While the member runs they are the weights themselves, under their names, which is what code in a forward
        pass asks for: a functional call with them works as it does in the original.
        """
        part = self.part
        yield from type(part).named_parameters(part, prefix, recurse, remove_duplicate)
        start = f"{prefix}." if prefix else ""
        if self.joint.filler.runs(self.member):
            yield from self._generated(start, recurse, remove_duplicate)
            return
        for key in dict.fromkeys(p.bank for p in self.placements(recurse=recurse)):
            for name, parameter in self.joint.dictionary[key].named_parameters():
                yield f"{start}dictionary.banks.{key}.{name}", parameter

    def _generated(self, start: str, recurse: bool, remove_duplicate: bool) -> Iterator[tuple[str, Any]]:
        seen: set[int] = set()
        for name in self.slots(recurse=recurse):
            holder, attribute = locate(self.part, name)
            weight = getattr(holder, attribute)
            if not remove_duplicate or id(weight) not in seen:
                seen.add(id(weight))
                yield f"{start}{name}", weight


class Freeze(Gate):
    """`requires_grad_`: freezes, or trains, the banks of a member that draws on them alone."""

    method = "requires_grad_"

    def __call__(self, requires_grad: bool = True) -> nn.Module:
        """Set it for everything that the module's weights depend on.

        Raises:
            PlanError: where other places draw on the same rows.
        """
        part, mine = self.part, self.placements()
        if others := users_besides(self.joint, mine):
            raise PlanError(
                f"requires_grad_ of {where(self)} has to reach the rows that its weights are generated from, but "
                f"{', '.join(others)} also draws on these: use joint.dictionary.requires_grad_ for all of them, or "
                f"joint.extract('{self.member}'), whose weights are its own."
            )
        self.joint.freeze(mine, requires_grad)
        return type(part).requires_grad_(part, requires_grad)


class Register(Gate):
    """`register_parameter`: what pruning, quantisation and an assignment use to replace a weight."""

    method = "register_parameter"

    def __call__(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter that is none of the module's slots and is not made of one.

        Raises:
            PlanError: otherwise.
        """
        part = self.part
        own = self.slots(recurse=False)
        if name in own or isinstance(param, Slot):
            self.joint.slots.put_again(self.member)  # an assignment takes away first what was there
            raise PlanError(
                f"{self.below}{name} of member '{self.member}' was to become a parameter, but what "
                f"{', '.join(f'{self.below}{each}' for each in own)} is comes from the dictionary: change "
                f"joint.extract('{self.member}'), whose weights are its own."
            )
        type(part).register_parameter(part, name, param)


class Copy(Gate):
    """`copy.deepcopy` of a module: a copy that depends on nothing."""

    method = "__deepcopy__"

    def __call__(self, memo: dict) -> nn.Module:
        """The copy that `JointModel.extract` gives."""
        return extract(self.joint, self.member, self.path, memo)


class Pickle(Gate):
    """`pickle`, `torch.save` and `copy.copy` of a module: they get the copy that depends on nothing."""

    method = "__reduce_ex__"

    def __call__(self, protocol: Any) -> tuple:
        """Reduce the module to a copy of it that depends on nothing."""
        return _itself, (extract(self.joint, self.member, self.path),)


GUARDS: tuple[type[Gate], ...] = (Move, Parameters, Freeze, Copy, Pickle)
"""For every module with a slot in it or below it; those with a slot of their own have `Register` too."""


def where(gate: Gate) -> str:
    """What a gate is on, for errors."""
    return f"'{gate.path}' of member '{gate.member}'" if gate.path else f"member '{gate.member}'"


def users_besides(joint: Any, mine: list) -> list[str]:
    """What else draws on the banks of some placements: `'b'`, or `other layers of 'a'`."""
    known, keys, members = set(map(id, mine)), {p.bank for p in mine}, {p.site.member for p in mine}
    rest = [p for p in joint.plan.placements if p.bank in keys and id(p) not in known]
    return list(
        dict.fromkeys(
            f"other layers of '{p.site.member}'" if p.site.member in members else f"'{p.site.member}'"
            for p in rest
        )
    )


def _itself(module: nn.Module) -> nn.Module:
    return module
