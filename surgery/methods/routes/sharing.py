"""Layers that several members have in common: copies of one member's layers in others, trained and stored as one."""

from __future__ import annotations

from collections import defaultdict

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
    """Whether any layer lies in several members."""
    return bool(_in_common(joint))


def tie_private(joint: JointModel) -> None:
    """Make one parameter of each private tensor of a layer and of its copies in other members; sites share rows.

    Raises:
        PlanError: where a tensor is generated in one place and private in another.
    """
    bad: list[str] = []
    for (other, path), ((first, above), *copies) in _in_common(joint).items():
        for member, below in copies:
            given = joint.private(first)
            for key, parameter in joint.private(member).items():
                if not key.startswith(below):
                    continue
                source = f"{above}{key.removeprefix(below)}"
                if source not in given:
                    bad.append(f"{key} of '{member}', of {path} of '{other}'")
                elif parameter is not given[source]:
                    setattr(*locate(joint[member], key), given[source])
    if bad:
        raise PlanError(
            f"What members have in common must be generated in all of them or in none, but {shorten(bad)} is private "
            "and its origin is not: leave `members` out."
        )


def _in_common(joint: JointModel) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """Layers that lie in several members, by whose they are and their path there: each member, and how names of the
    layer's tensors begin in it; that whose layer it is comes first where it still uses it."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for member in joint.names:
        for path, layer in routed_layers(joint, member).items():
            for number, (name, part) in enumerate(zip(layer.own, layer.held, strict=True)):
                adapted = isinstance(part, Adapted)
                other, copied, _ = name.rpartition("/")
                place = member, f"{path}.held.{number}." + "layer." * adapted
                key = (other if copied else member, part.path if adapted else path)
                found[key].insert(len(found[key]) if copied else 0, place)
    return {key: places for key, places in found.items() if len(places) > 1}
