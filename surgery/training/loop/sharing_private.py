"""Shared private tensors: what the dictionary does not generate, norms and biases say, as one for several members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from surgery.anatomy.selectors import matches
from surgery.core.joint import JointModel
from surgery.errors import PlanError
from surgery.slots.slots import locate


def share_private(joint: JointModel, selectors: Mapping[str, Sequence[str]]) -> int:
    """Make private tensors of one name, shape and dtype one parameter for all members that have and select them.

    It begins as the mean of what the members had, and is trained by all their losses. Running statistics stay each
    member's own, and an artifact holds the values with each of them.

    Args:
        joint: any; its members' modules change in place.
        selectors: by member, exact names or `re:` patterns of parameters that no bank generates.

    Returns:
        how many parameters less there are to train.

    Raises:
        PlanError: for a selector that no two members share a tensor by; nothing is changed.

    Example:
        >>> share_private(joint, {name: ["re:.*norm.*"] for name in joint.names})
        1536
    """
    alike: dict[tuple, list[tuple[str, nn.Parameter]]] = {}
    for member, chosen in selectors.items():
        for name, parameter in joint.private(member).items():
            if any(matches(selector, name) for selector in chosen):
                key = (name, parameter.shape, parameter.dtype)
                alike.setdefault(key, []).append((member, parameter))
    groups = {key: found for key, found in alike.items() if len(found) > 1}
    names = [name for name, *_ in groups]
    asked = dict.fromkeys(selector for chosen in selectors.values() for selector in chosen)
    if lost := [each for each in asked if not any(matches(each, name) for name in names)]:
        raise PlanError(
            "Every train.share must select a private tensor that two members have in one shape, but "
            f"{', '.join(lost)} does not: correct or remove it."
        )
    saved = 0
    for (name, *_), found in groups.items():
        shared = found[0][1]
        _average(shared, [parameter for _, parameter in found])
        for member, parameter in found[1:]:
            saved += 0 if parameter is shared else parameter.numel()
            for owner in joint.owners[member].get(name, (name,)):
                holder, attribute = locate(joint[member], owner)
                setattr(holder, attribute, shared)
    return saved


@torch.no_grad()
def _average(shared: nn.Parameter, parameters: Sequence[nn.Parameter]) -> None:
    """Equal values stay as they are, bit for bit."""
    if any(not torch.equal(shared, other) for other in parameters[1:]):
        shared.copy_(torch.stack([each.double() for each in parameters]).mean(0))
