"""Shrinkage: how far a second moment is trusted, by what feedback under one half of the inputs costs on the other.

Error feedback (`surgery.storage.codecs.feedback`) lets errors lie where a moment is small, and a moment of few inputs
is also small where these few happen not to lie. A share of its mean diagonal is added to its diagonal, as GPTQ does,
that with which feedback under the moment of either half costs least on the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from surgery.storage.codecs.feedback import DAMPING

SHARES = (0.0, 0.4, 2.0, 8.0)  # of the mean diagonal, beside what codecs add
DRAWN = 64  # rows of errors by which a share is chosen
LARGEST = 1024  # rows and columns that are looked at, spread over all of them


def looked_at(moment: Tensor) -> Tensor:
    """Of a moment `[..., n, n]` the rows and columns that its share is chosen by."""
    n = moment.shape[-1]
    if n <= LARGEST:
        return moment
    seen = torch.linspace(0, n - 1, LARGEST, device=moment.device).long()
    return moment[..., seen[:, None], seen]


def shrunk(moment: Tensor, share: float | None) -> Tensor:
    """A moment with a share of its mean diagonal added, scaled back to the same trace; its diagonal where that is None.

    Example:
        >>> shrunk(torch.tensor([[1.0, 0.5], [0.5, 1.0]]), 1.0)
        tensor([[1.0000, 0.2500],
                [0.2500, 1.0000]])
    """
    if share is None:
        return moment.diagonal().diag()
    return _added(moment, share).div_(1 + share) if share else moment


def best_share(first: Tensor, second: Tensor) -> float | None:
    """The share that is best added to the sum of two halves; None where no feedback serves either from the other.

    Args:
        first: moment `[k, k]` of one half of the inputs, symmetric and positive semidefinite.
        second: of the other half.

    Example:
        >>> few, others = (torch.randn(4, 64, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
        >>> best_share(few.T @ few, few.T @ few), best_share(few.T @ few, others.T @ others)
        (0.0, None)
    """
    sizes = [float(each.diagonal().mean(dtype=torch.float64)) for each in (first, second)]
    if not all(0 < size < math.inf for size in sizes):
        return None
    halves = [each.double() / size for each, size in zip((first, second), sizes, strict=True)]
    errors = _errors(len(first)).to(halves[0])
    costs = {share: sum(cost(a, b, share, errors) for a, b in (halves, halves[::-1])) for share in SHARES}
    plain = sum(_price(errors, each) for each in halves)
    best = min(costs, key=costs.__getitem__)
    # Of twice as many inputs as one half has, chance is half as much.
    return best / 2 if costs[best] < plain else None


def cost(learned: Tensor, seen: Tensor, share: float, errors: Tensor) -> float:
    """What rounding errors cost on inputs of one moment, fed back under another.

    With H = N F N^T damped, N unit upper triangular, a row's error is E = D N^-1, D what rounding each of its entries
    leaves; under S it costs E S E^T (for S = H see QuIP: Chee et al. 2023, arXiv 2307.13304, Theorem 1).

    Args:
        learned: H `[k, k]`, float64.
        seen: S `[k, k]`, likewise.
        share: of the mean diagonal that H is damped by, beside what codecs add.
        errors: D `[d, k]`.
    """
    upper = torch.linalg.cholesky(_added(learned, share + DAMPING).flip(0, 1)).flip(0, 1)
    unit = upper / upper.diagonal()
    spread = torch.linalg.solve_triangular(unit, errors, upper=True, left=False, unitriangular=True)
    return _price(spread, seen)


def _price(errors: Tensor, seen: Tensor) -> float:
    """The sum over rows of E S E^T."""
    return float(((errors @ seen) * errors).sum())


def _errors(count: int) -> Tensor:
    """Errors of variance 1 whose costs are compared: each entry's own, or random signs where entries are many."""
    if count <= DRAWN:
        return torch.eye(count)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (DRAWN, count), generator=generator) * 2.0 - 1


def _added(moment: Tensor, share: float) -> Tensor:
    found = moment.clone()
    found.diagonal().add_(share * moment.diagonal().mean())
    return found
