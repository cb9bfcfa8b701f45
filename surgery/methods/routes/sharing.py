"""Layers that several members have in common: copies of one member's layers in others, trained and stored as one."""

from __future__ import annotations

from collections.abc import Iterator

from surgery.core.joint import JointModel
from surgery.errors import PlanError
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
        for path, number, other, name in _copies(joint, member):
            below = f"{path}.held.{number}."
            for key, parameter in joint.private(member).items():
                if not key.startswith(below):
                    continue
                lender = joint.private(other)
                source = f"{path}.held.0.{key.removeprefix(below)}"
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


def _copies(joint: JointModel, member: str) -> Iterator[tuple[str, int, str, str]]:
    """Copies of other members' layers in a member: path of the routed layer, number, whose it is, and its name."""
    for path, layer in routed_layers(joint, member).items():
        for number, name in enumerate(layer.own):
            other, slash, _ = name.rpartition("/")
            if slash and other in joint.names:
                yield path, number, other, name
