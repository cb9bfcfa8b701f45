"""Optimizers and schedules of joint training, by name; a new one is a line in `OPTIMIZERS` or `SCHEDULES`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.core.bank import Trained
from surgery.core.joint import JointModel
from surgery.settings.training import Optimizer

if TYPE_CHECKING:
    from surgery.core.moves import Moves

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
    joint: JointModel, settings: Optimizer, moves: Sequence[Moves] = ()
) -> torch.optim.Optimizer:
    """One optimizer for the whole joint model; its groups carry their `role`.

    Those of banks come first, what decays before what does not, then private parameters, then what methods have
    besides. A run's state numbers parameters in this order.

    Args:
        joint: opened for training.
        settings: of the optimizer.
        moves: of the methods whose parameters are trained.
    """
    found = sorted(_merged(t for each in moves for t in each.groups()), key=lambda t: (not t.decay, t.role))
    more = [_stepped(joint, t) for each in moves for t in each.more_groups()]
    apart = {id(p) for trained in more for p in trained.parameters}
    private = [p for p in joint.trained_private() if id(p) not in apart]
    groups = [*found, *_private(joint, private, settings), *more]
    return OPTIMIZERS[settings.name]([_group(trained, settings) for trained in groups], settings)


def _private(joint: JointModel, parameters: Sequence[nn.Parameter], settings: Optimizer) -> list[Trained]:
    """One group for each learning rate of members; what several of them share takes the lowest of theirs."""
    rates: dict[int, float] = {}
    for name in joint.names if settings.rates else ():
        rate = settings.rates.get(name, settings.lr)
        for p in joint.private(name).values():
            own = joint.stepped(p)
            rates[id(own)] = min(rate, rates.get(id(own), rate))
    groups: dict[float, list[nn.Parameter]] = {}
    for p in parameters:
        groups.setdefault(rates.get(id(p), settings.lr), []).append(p)
    if not groups:
        return [Trained("private", ())]
    return [Trained("private", tuple(own), lr=rate) for rate, own in groups.items()]


def _group(trained: Trained, settings: Optimizer) -> dict[str, Any]:
    return {
        "params": list(trained.parameters),
        "role": trained.role,
        "weight_decay": settings.weight_decay if trained.decay else 0.0,
        "lr": trained.lr or settings.lr,
        "scheduled": trained.scheduled,
        **trained.options,
    }


def _merged(groups: Iterable[Trained]) -> list[Trained]:
    """Groups that are stepped alike as one; a parameter that several banks share is stepped once."""
    found: dict[tuple, tuple[Trained, dict[int, nn.Parameter]]] = {}
    for each in groups:
        key = (each.role, each.decay, each.lr, each.scheduled, tuple(sorted(each.options.items())))
        found.setdefault(key, (each, {}))[1].update({id(p): p for p in each.parameters})
    return [replace(each, parameters=tuple(own.values())) for each, own in found.values()]


def _stepped(joint: JointModel, trained: Trained) -> Trained:
    return replace(trained, parameters=tuple(joint.stepped(p) for p in trained.parameters))


def make_scheduler(
    optimizer: torch.optim.Optimizer, settings: Optimizer, steps: int
) -> torch.optim.lr_scheduler.LambdaLR | None:
    """The learning rate over all steps, of groups that follow it. None where nothing changes."""
    if settings.schedule == "constant" and not settings.warmup:
        return None
    shape = SCHEDULES[settings.schedule]

    def factor(step: int) -> float:
        if step < settings.warmup:
            return (step + 1) / settings.warmup
        return shape((step - settings.warmup) / max(1, steps - settings.warmup))

    factors = [factor if g["scheduled"] else (lambda step: 1.0) for g in optimizer.param_groups]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors)


def set_rates(scheduler: torch.optim.lr_scheduler.LambdaLR, steps: int) -> None:
    """Learning rates as they are once so many steps are done; the scheduler goes on from there."""
    scheduler.last_epoch = steps
    groups = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    for group, rate, factor in groups:
        group["lr"] = rate * factor(steps)


def plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's, or itself."""
    return getattr(optimizer, "optimizer", optimizer)


@dataclass(frozen=True)
class Resized:
    """A parameter that took another's place: row r of `new` was row `source[r]` of `old`, -1 where it is new."""

    old: nn.Parameter
    new: nn.Parameter
    source: Tensor


def carry(optimizer: torch.optim.Optimizer, resized: Resized) -> None:
    """Put a resized parameter in its predecessor's place in an optimizer; new rows start without history."""
    for group in optimizer.param_groups:
        group["params"] = [resized.new if p is resized.old else p for p in group["params"]]
    state = optimizer.state.pop(resized.old, None)
    if state is None:
        return
    fresh = resized.source < 0
    moved = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == resized.old.shape:
            value = value[resized.source.clamp_min(0)]
            value[fresh] = 0
        moved[key] = value
    optimizer.state[resized.new] = moved


def drop(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Step some parameters no more, and forget what was kept of them."""
    gone = {id(p): p for p in parameters}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]
    for parameter in gone.values():
        optimizer.state.pop(parameter, None)


def enter(optimizer: torch.optim.Optimizer, role: str, parameter: nn.Parameter) -> None:
    """Step one more parameter, in the first group of a role."""
    group = next(group for group in optimizer.param_groups if group["role"] == role)
    group["params"].append(parameter)
