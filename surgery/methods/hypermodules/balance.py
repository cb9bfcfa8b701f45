"""Balance: one step of an optimizer moves generated weights as far as it moves them in plain training.

A block is `f * sum_j u_j * R_j`: rows R of its hypermodule, the location's contexts u, and a fixed factor f. With the
paper's constants a step of Adam moves a block by `lr * |z|_1`, where |z| is the deviation of the layer's weights: a
hundredth to a tenth of a plain step. Here rows carry deviations, |z|_1 = 1 at a location that is the home of its
hypermodule, and contexts begin at 1 / rate, so that a step changes them relatively; where this would still move a block
further than a tenth of what rows do, as in layers of large weights, contexts learn more slowly.

The factor of a location l on hypermodule k is `scale_l / size_k`, with the size of the hypermodule's rows below it: one
from another layer or member generates a block of the deviation that the location's own has.

Members may learn at rates of their own, r times the run's: rows are kept r times smaller and the factor makes up for
it, so that one step of one optimizer moves them r times as far. Rows that members share move at their home's rate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from surgery.settings.training import Optimizer

if TYPE_CHECKING:
    from surgery.core.joint import JointModel
    from surgery.methods.hypermodules.bank import HypermoduleBank

SHARE = 0.1
"""The most that contexts may move a block in a step, relative to what its rows do."""


def norm_of(settings: Optimizer) -> int:
    """Which norm of a location's coefficients says how far a step of its rows moves the block.

    Steps of Adam have the size of the learning rate in each row, whatever its gradient, so they add up to |z|_1; those
    of SGD follow a gradient that is z_j times the block's, and add up to |z|_2 squared.

    Args:
        settings: of the optimizer.
    """
    return 2 if settings.name == "sgd" else 1


def member_rates(joint: JointModel, settings: Optimizer) -> dict[str, float]:
    """The learning rate of each member relative to that of the run."""
    return {name: settings.rates.get(name, settings.lr) / settings.lr for name in joint.names}


@torch.no_grad()
def balance(bank: HypermoduleBank, rates: Tensor, norm: int) -> None:
    """Bring rows, contexts and factors of a bank into balance; blocks stay what they are, up to rounding.

    Args:
        bank: with hypermodules only, aligned as training begins, in no contest.
        rates: `[L]` of each location's member, relative to that of the run.
        norm: see `norm_of`.
    """
    c, coefficient = bank.context, bank.coefficients.detach()
    rates = rates.to(coefficient)
    length = coefficient.abs().pow(norm).sum(1).pow(1 / norm)
    home = homes(bank.psi, bank.hypermodules)
    wanted = rates[home].pow(1 / norm)
    ratio = torch.where(length[home] > 0, length[home], wanted) / wanted  # [K] how much longer rows get
    ratio = torch.where(bank.kept_hypermodules, 1.0, ratio)
    bank.rows.mul_(ratio.repeat_interleave(c).unsqueeze(1))
    coefficient = coefficient / ratio[bank.psi].unsqueeze(1)
    size = _sizes(bank)
    if not bank.contexts.requires_grad:  # coefficients stay 1: a location's block is the row as it is
        size = rates[home].pow(-1 / norm).to(size)
        bank.set_factors(torch.ones_like(length), size)
        bank.contexts.copy_(coefficient * size[bank.psi].unsqueeze(1))
        return
    mine, length = size[bank.psi], length / ratio[bank.psi]
    if norm == 1:
        factor = torch.minimum(rates * length / c, SHARE * rates / (c**0.5 * mine))
    else:
        most = (SHARE / bank.width) ** 0.5  # dB = f^2 sum_j <g, R_j> R_j is then at most c SHARE |g|
        factor = rates.sqrt() * torch.minimum(torch.ones_like(mine), most / mine)
    factor = torch.where(factor > 0, factor, torch.ones_like(factor))
    factor = factor if bank.kept is None else torch.where(bank.kept, 1.0, factor)
    bank.set_factors(factor * mine, size)
    bank.contexts.copy_(coefficient / bank.factors.unsqueeze(1))


def homes(psi: Tensor, hypermodules: int) -> Tensor:
    """The first location that uses each hypermodule: `psi [L]` -> `[K]`; 0 for one that none uses.

    Example:
        >>> homes(torch.tensor([1, 0, 1]), 3)
        tensor([1, 0, 0])
    """
    first = torch.full((hypermodules,), len(psi), device=psi.device)
    first.scatter_reduce_(0, psi, torch.arange(len(psi), device=psi.device), "amin")
    return torch.where(first < len(psi), first, 0)


def balance_banks(joint: JointModel, settings: Optimizer, contexts: bool) -> None:
    """Balance every bank of hypermodules.

    Args:
        joint: opened and aligned for training.
        settings: of the optimizer, with the members' rates.
        contexts: whether blocks have contexts and steps shall be balanced; otherwise only members' rates are applied.
    """
    relative = member_rates(joint, settings)
    for key in joint.plan.keys_of("hypermodules"):
        placed = joint.plan.in_bank(key)
        rates = _by_location([(p.start, p.stop, relative[p.site.member]) for p in placed])
        if contexts or bool((rates != 1).any()):
            balance(joint.dictionary[key], rates, norm_of(settings))  # type: ignore[arg-type]


def _by_location(values: list[tuple[int, int, float]]) -> Tensor:
    found = torch.ones(max(stop for _, stop, _ in values))
    for start, stop, value in values:
        found[start:stop] = value
    return found


def _sizes(bank: HypermoduleBank) -> Tensor:
    """The deviation of the rows of each hypermodule `[K]`, about 0; 1 where all are 0."""
    size = bank.basis.square().mean((1, 2)).sqrt()
    return torch.where(size > 0, size, torch.ones_like(size))
