"""Alignment: which hypermodule generates each location, optimised by many parallel (1+lambda)-EAs.

MUiR (Meyerson and Miikkulainen, arXiv 1906.00097), Algorithms 1 and 2, as pure functions on tensors, without
a loop over locations: draw locations, draw challengers for each, and decide once training has said which
alternative carries the most weight. Challengers are drawn by usage, as in the paper; for pretrained weights
there are those of `surgery.methods.hypermodules.explanation`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def usage(psi: Tensor, hypermodules: int) -> Tensor:
    """How many locations each hypermodule generates: `psi [L]` -> `[K]`."""
    return torch.bincount(psi[psi < hypermodules], minlength=hypermodules)


def draw_locations(locations: int, fraction: float, generator: torch.Generator) -> Tensor:
    """`p*L` of L locations, at least one, ascending and without repetition: `[N]`.

    Args:
        locations: L.
        fraction: p, above 0 and at most 1.
        generator: on the CPU, so that every process and device draws the same.
    """
    count = min(locations, max(1, round(fraction * locations)))
    chosen = torch.zeros(locations, dtype=torch.bool)
    chosen[torch.randperm(locations, generator=generator)[:count]] = True
    return chosen.nonzero().squeeze(1)


def draw_by_usage(psi: Tensor, count: int, challengers: int, generator: torch.Generator) -> Tensor:
    """Challengers with `P(H_k) = usage_k / L`: the hypermodule of a location drawn uniformly. # Alg. 2, line 11

    Args:
        psi: `[L]`.
        count: N locations, each of which gets `challengers`.
        challengers: lambda.
        generator: on the CPU.

    Returns:
        `[N, lambda]`.
    """
    return draw_uniformly(psi, count, challengers, generator)


def draw_uniformly(hypermodules: Tensor, count: int, challengers: int, generator: torch.Generator) -> Tensor:
    """Challengers among `hypermodules [K']`, each equally likely: `[N, lambda]`."""
    place = torch.randint(len(hypermodules), (count, challengers), generator=generator)
    return hypermodules[place.to(hypermodules.device)]


def draw_new(
    challengers: Tensor, epsilon: float, unused: int, first: int, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Replace each challenger by a new hypermodule with probability epsilon, while unused ones remain.

    Unused hypermodules are not kept in memory; one that is drawn is made anew, with a number from `first` on.

    Args:
        challengers: `[N, lambda]`.
        epsilon: probability of a new one.
        unused: how many there may be; the draws beyond that share them.
        first: number of the first new one, K.
        generator: on the CPU.

    Returns:
        The challengers, and how many new hypermodules they name: `first .. first + new - 1`.
    """
    if unused <= 0 or epsilon <= 0:
        return challengers, 0
    new = (torch.rand(challengers.shape, generator=generator) < epsilon).to(challengers.device)
    number = torch.randint(unused, challengers.shape, generator=generator).to(challengers.device)
    drawn, compact = torch.unique(number[new], return_inverse=True)
    challengers = challengers.clone()
    challengers[new] = first + compact
    return challengers, len(drawn)


def starting_weight(alpha: float, challengers: int) -> float:
    """Where a challenger's soft weight starts, so that the incumbent, at 0, has probability 1 - alpha.

    Raises:
        ValueError: where alpha does not lie between 0 and 1.

    Example:
        >>> s = torch.tensor([0.0] + [starting_weight(0.5, 4)] * 4)
        >>> round(float(s.softmax(0)[0]), 6)
        0.5
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, found {alpha}")
    return math.log(alpha) - math.log(challengers) - math.log(1 - alpha)


def mass(candidates: Tensor, soft: Tensor) -> Tensor:
    """The softmax mass of each alternative, that of its duplicates added: `[N, A]`. # Alg. 2, line 22

    Args:
        candidates: `[N, A]` hypermodules, the incumbent first.
        soft: `[N, A]` soft weights.
    """
    probability = soft.softmax(1)
    columns = [  # one pass for each alternative: [N, A, A] would be written and read as a whole
        torch.where(candidates == candidates[:, a : a + 1], probability, 0.0).sum(1)
        for a in range(candidates.shape[1])
    ]
    return torch.stack(columns, 1)


def decide(candidates: Tensor, soft: Tensor) -> Tensor:
    """The column of the winning alternative of each location, the first of those equal: `[N]`.

    Example:
        >>> decide(torch.tensor([[7, 3, 3]]), torch.tensor([[0.1, 0.0, 0.0]]))
        tensor([1])
    """
    return mass(candidates, soft).argmax(1)
