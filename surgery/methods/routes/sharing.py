"""Layers that several members have in common: copies of one member's layers in others, trained and stored as one."""

from __future__ import annotations

from collections.abc import Iterator

from surgery.core.joint import JointModel
from surgery.errors import PlanError
from surgery.methods.routes.adapters import Adapted
from surgery.methods.routes.layers import RoutedLayer
from surgery.slots.slots import locate
from surgery.util.text import shorten


def routed_layers(joint: JointModel, member: str) -> dict[str, RoutedLayer]:
    """The routed layers of a member by path."""
    return {path: part for path, part in joint[member].named_modules() if isinstance(part, RoutedLayer)}


def borrows(joint: JointModel) -> bool:
    """Whether any member has copies of another member's layers."""
    return any(next(_copies(joint, member), None) is not None for member in joint.names)


def tie_private(joint: JointModel) -> None:
    """Make one parameter of each private tensor of a layer and of its copies in other members; sites share rows.

    Raises:
        PlanError: where a tensor is generated in one place and private in another.
    """
    bad: list[str] = []
    for member in joint.names:
        for below, other, above, name in _copies(joint, member):
            for key, parameter in joint.private(member).items():
                if not key.startswith(below):
                    continue
                lender = joint.private(other)
                source = f"{above}{key.removeprefix(below)}"
                if source not in lender:
                    bad.append(f"{key} of '{member}', of component {name}")
                    continue
                if parameter is not lender[source]:
                    setattr(*locate(joint[member], key), lender[source])
    if bad:
        raise PlanError(
            f"What members have in common must be generated in all of them or in none, but {shorten(bad)} is private "
            "and its origin is not: leave `members` out."
        )


def _copies(joint: JointModel, member: str) -> Iterator[tuple[str, str, str, str]]:
    """Copies of other members' layers in a member: how names of its tensors begin, whose layer it is, how names begin
    there, and the component's name. What its own member has dropped is a copy no more."""
    for path, layer in routed_layers(joint, member).items():
        for number, (name, part) in enumerate(zip(layer.own, layer.held, strict=True)):
            other, slash, depth = name.rpartition("/")
            if not slash or other not in joint.names:
                continue
            source = part.path if isinstance(part, Adapted) else path
            lender = routed_layers(joint, other).get(source)
            if lender is not None and depth in lender.own:
                below = f"{path}.held.{number}." + "layer." * isinstance(part, Adapted)
                yield below, other, f"{source}.held.{lender.own.index(depth)}.", name
