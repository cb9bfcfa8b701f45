"""Metrics: what any error in the weight of a site costs, rounding or what is left out.

Estimates that take entries of an error for independent hold for rounding alone: what a truncation leaves out lies along
few directions, and adds up over tokens and layers. With v a vector of random signs and g = v^T J the gradient of the
outputs that it picks, an error E moves the outputs by E[<g, E>^2] in the mean. The second moment of g is taken for a
Kronecker product, `G x H / tr G` with G = E[g g^T] over outputs and H = E[g^T g] over inputs (as Shampoo's
preconditioner: Gupta, Koren and Singer 2018, arXiv 1802.09568; of tokens one by one: Martens and Grosse 2015,
arXiv 1503.05671), so that

    relative squared output error = tr(G E H E^T) / tr(G).

It comes from the backward passes that sensitivities need anyway, for whatever operation uses the weight; for entries
that are independent it is the sensitivity times |E|^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.storage.codecs import Statistics

WIDEST = 4096  # rows or columns up to which a side has a moment; a wider one counts as independent
DAMPING = 0.05  # of the mean of a diagonal, added to it: what few draws have not seen


@dataclass(frozen=True)
class Metric:
    """What an error `[o, n]` in a weight costs, in relative squared output error.

    Attributes:
        out: G / tr G, `[o, o]`, symmetric and positive definite, float32.
        into: H, `[n, n]`, likewise.

    Example:
        >>> Metric.independent(2.0, 1, 2).price(torch.tensor([[1.0, 3.0]]))
        20.0
    """

    out: Tensor
    into: Tensor

    @classmethod
    def independent(
        cls, sensitivity: float, out: int, into: int, device: torch.device | None = None
    ) -> Metric:
        """That of which only the sensitivity is known: relative squared output error per squared error."""
        sides = torch.eye(out, device=device) / out, torch.eye(into, device=device) * (out * sensitivity)
        return cls(*sides)

    def price(self, error: Tensor) -> float:
        """tr(G E H E^T) / tr G."""
        error = error.to(self.into.device, torch.float32)
        return float(((self.out @ error @ self.into) * error).sum(dtype=torch.float64))

    @property
    def sensitivity(self) -> float:
        """Relative squared output error per squared error of independent entries."""
        traces = self.out.diagonal().sum() * self.into.diagonal().sum()
        return float(traces) / (len(self.out) * len(self.into))

    @property
    def statistics(self) -> Statistics:
        """Of the inputs, as codecs make use of them."""
        return Statistics(self.into, 1)


class Draws:
    """Adds up the second moments of gradients of one weight."""

    def __init__(self) -> None:
        self.out: Tensor | None = None
        self.into: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """One draw `[o, n]`."""
        g = gradient.float()
        out = (
            g @ g.T if len(g) <= WIDEST else torch.eye(len(g), device=g.device) * (g.square().sum() / len(g))
        )
        wide = g.shape[1]
        into = g.T @ g if wide <= WIDEST else torch.eye(wide, device=g.device) * (g.square().sum() / wide)
        self.out = out if self.out is None else self.out.add_(out)
        self.into = into if self.into is None else self.into.add_(into)

    def metric(self, samples: int) -> Metric | None:
        """The metric of draws that were made `samples` times for all inputs; None where no gradient was usable."""
        if self.out is None or self.into is None:
            return None
        power = float(self.out.diagonal().sum(dtype=torch.float64))
        if not 0 < power < float("inf"):
            return None
        return Metric(_damped(self.out / power), _damped(self.into / samples))


def mean_metric(metrics: Sequence[Metric]) -> Metric:
    """That of an error which several members share; prices of these add up to about as many times its own."""
    out = torch.stack([each.out for each in metrics]).mean(0)
    return Metric(out, torch.stack([each.into for each in metrics]).mean(0))


def _damped(moment: Tensor) -> Tensor:
    """With a share of the mean on the diagonal, and the same trace."""
    mean = moment.diagonal().mean()
    return (moment + torch.eye(len(moment), device=moment.device) * (DAMPING * mean)) / (1 + DAMPING)
