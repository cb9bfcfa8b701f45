"""Opens the dictionary of a joint model for a run, as its methods and the run's settings want it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from surgery.anatomy.selectors import matches
from surgery.core.joint import JointModel
from surgery.core.registry import active_methods, methods_of
from surgery.errors import PlanError
from surgery.settings.training import Training


def start(joint: JointModel, config: Training, seed: int) -> None:
    """Open every bank for training and let each method prepare what is its own.

    Args:
        joint: as `join` made it, or loaded from an artifact.
        config: settings of the run.
        seed: of all that is drawn; each method draws from a generator of its own.

    Raises:
        PlanError: naming all settings that do not suit the joint model; nothing is changed.
    """
    methods = active_methods(joint)
    if wrong := [reason for method in methods for reason in method.unsuited(joint, config)]:
        raise PlanError(" ".join(wrong))
    joint.open_by({method.name: method.training_options(config) for method in methods_of(joint.plan)}, seed)
    for method in methods:
        method.start(joint, config, torch.Generator().manual_seed(seed))
    joint.refresh()


def freeze(joint: JointModel, selectors: Mapping[str, Sequence[str]]) -> None:
    """Let private parameters stay as they are.

    Args:
        joint: any.
        selectors: by member, exact names or `re:` patterns of tensors that no bank generates.
    """
    for name, chosen in selectors.items():
        for key, parameter in joint.private(name).items():
            if any(matches(selector, key) for selector in chosen):
                parameter.requires_grad_(False)


def keep_private(joint: JointModel, members: Collection[str]) -> None:
    """Let all private parameters of some members stay as they are."""
    for name in members:
        for parameter in joint.private(name).values():
            parameter.requires_grad_(False)
