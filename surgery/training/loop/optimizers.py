"""Optimizers and schedules of joint training, by name; a new one is a line in `OPTIMIZERS` or `SCHEDULES`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from surgery.core.joint import JointModel
from surgery.settings.training import Optimizer

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda groups, settings: torch.optim.Adam(groups, lr=settings.lr, fused=True),
    "adamw": lambda groups, settings: torch.optim.AdamW(groups, lr=settings.lr, fused=True),
    "sgd": lambda groups, settings: torch.optim.SGD(
        groups, lr=settings.lr, momentum=settings.momentum, fused=True
    ),
}
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


def make_optimizer(
    joint: JointModel, settings: Optimizer, mixture_lr: float | None = None
) -> torch.optim.Optimizer:
    """One optimizer for the whole joint model; its groups carry their `role`.

    Roles are those of the banks, such as `rows`, `contexts` and `mixtures`, then `private` and `soft`, the last with a
    learning rate of its own and, between contests, no parameters.

    Args:
        joint: opened for training.
        settings: of the optimizer.
        mixture_lr: learning rate of mixtures; as everything else by default.
    """
    found: dict[str, dict[int, nn.Parameter]] = {"rows": {}, "contexts": {}, "mixtures": {}}
    decays, rates = {"rows": True}, {}
    for key in joint.dictionary:
        for trained in joint.dictionary[key].trained():
            # One that several banks share is stepped once.
            found.setdefault(trained.role, {}).update({id(p): p for p in trained.parameters})
            decays[trained.role], rates[trained.role] = trained.decay, trained.lr
    rates["mixtures"] = mixture_lr
    decay = settings.weight_decay
    groups: list[dict[str, Any]] = [
        {
            "params": list(parameters.values()),
            "role": role,
            "weight_decay": decay if decays.get(role) else 0.0,
            "lr": rates.get(role) or settings.lr,
        }
        for role, parameters in found.items()
    ]
    groups += [
        {"params": joint.trained_private(), "role": "private", "weight_decay": decay},
        {"params": [], "role": "soft", "weight_decay": 0.0, "lr": settings.soft_lr, "eps": settings.soft_eps},
    ]
    return OPTIMIZERS[settings.name](groups, settings)


def make_scheduler(
    optimizer: torch.optim.Optimizer, settings: Optimizer, steps: int
) -> torch.optim.lr_scheduler.LambdaLR | None:
    """The learning rate over all steps; the soft weights' stays as it is. None where nothing changes."""
    if settings.schedule == "constant" and not settings.warmup:
        return None
    shape = SCHEDULES[settings.schedule]

    def factor(step: int) -> float:
        if step < settings.warmup:
            return (step + 1) / settings.warmup
        return shape((step - settings.warmup) / max(1, steps - settings.warmup))

    factors = [(lambda step: 1.0) if g["role"] == "soft" else factor for g in optimizer.param_groups]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors)


def plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's, or itself."""
    return getattr(optimizer, "optimizer", optimizer)
