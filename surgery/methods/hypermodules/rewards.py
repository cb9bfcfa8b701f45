"""Rewards: contests judged by trying, not by gradients, as learned weight sharing does.

One alternative of each location is drawn for every step, and its weights alone are generated. Of a population of draws
each location's are ranked by the loss that its member had with them, less what they saved; a natural evolution strategy
then moves the location's probabilities towards those that came off well.

# J. Prellberg and O. Kramer, Learned Weight Sharing for Deep Multi-Task Learning by Natural Evolution Strategy and
# Stochastic Gradient Descent, arXiv 2003.10159. There a population is tried on one batch beside the step; here each
# draw is a step that is taken, so that a step costs what it did.
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.methods.hypermodules.contest import Contest

POPULATION = 8
"""Draws that are compared with each other, as in the paper."""

LEAST = 0.001
"""The least probability of an alternative, as in the paper: no decision is final before the contest ends."""


def draw(soft: Tensor, generator: torch.Generator) -> Tensor:
    """A column for each location, with the probabilities of its alternatives: `soft [N, A]` -> `[N]`.

    Args:
        soft: logarithms of probabilities, up to a constant.
        generator: on the CPU, so that every process draws the same.
    """
    probability = soft.detach().double().softmax(1).cpu()
    return torch.multinomial(probability, 1, generator=generator).squeeze(1).to(soft.device)


def utilities(costs: Tensor) -> Tensor:
    """From 1 for a location's least cost among P draws to -1 for its greatest: `[P, N]` -> `[P, N]`.

    Example:
        >>> utilities(torch.tensor([[0.3], [0.1], [0.2]])).flatten().tolist()
        [-1.0, 1.0, 0.0]
    """
    if len(costs) < 2:
        return torch.zeros_like(costs)
    place = costs.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    return place.to(costs) / (len(costs) - 1) * 2 - 1


def natural_step(soft: Tensor, tried: Tensor, costs: Tensor, rate: float) -> Tensor:
    """Soft weights after a population: `softmax(s) + rate * mean_p u_p (e_p - softmax(s))`, then their logarithm.

    Args:
        soft: `[N, A]`.
        tried: `[P, N]` columns that were drawn.
        costs: `[P, N]` what each location's draw led to.
        rate: of a whole utility.

    Example:
        >>> soft = natural_step(torch.zeros(1, 2), torch.tensor([[0], [1]]), torch.tensor([[0.5], [0.1]]), 0.2)
        >>> [round(p, 3) for p in soft.exp().flatten().tolist()]
        [0.4, 0.6]
    """
    probability = soft.softmax(1)
    chosen = torch.nn.functional.one_hot(tried, soft.shape[1]).to(soft)
    step = (utilities(costs).to(soft).unsqueeze(2) * (chosen - probability)).mean(0)
    probability = (probability + rate * step).clamp_min(LEAST)
    return (probability / probability.sum(1, keepdim=True)).log()


@torch.no_grad()
def note(contest: Contest, costs: Tensor, rate: float) -> None:
    """Take down what the present draw led to; soft weights move once there is a population.

    Args:
        contest: with a draw, which is forgotten.
        costs: `[N]`, of each sampled location.
        rate: see `natural_step`.
    """
    assert contest.drawn is not None
    contest.tried = torch.cat([contest.tried, contest.drawn.unsqueeze(0)])
    contest.costs = torch.cat([contest.costs, costs.to(contest.costs).unsqueeze(0)])
    contest.drawn = None
    if len(contest.tried) == POPULATION:
        contest.soft.copy_(natural_step(contest.soft, contest.tried, contest.costs, rate))
        contest.tried, contest.costs = contest.tried[:0], contest.costs[:0]


def costs_of(losses: Tensor, member: Tensor, saved: Tensor, price: float) -> Tensor:
    """What one draw costs each location: its member's losses, less what all locations of that member saved.

    Args:
        losses: `[M]` of members, weighted.
        member: `[N]` of each location, numbers below M.
        saved: `[N]` blocks that the drawn alternatives save.
        price: of a block, in units of the loss.

    Returns:
        `[N]`.

    Example:
        >>> costs_of(torch.tensor([2.0, 1.0]), torch.tensor([0, 0, 1]), torch.tensor([1.0, 1.0, 0.0]), 0.25).tolist()
        [1.5, 1.5, 1.0]
    """
    freed = torch.zeros_like(losses).index_add(0, member, saved.to(losses))
    return (losses - price * freed)[member]
