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

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.disk.aside import put_aside
from surgery.fitting.shrinkage import best_share, looked_at, shrunk
from surgery.storage.codecs import Statistics

WIDEST = 2048  # rows or columns up to which a side has a whole moment, and beyond which its diagonal
# Multiplications of one moment; those of half as many columns as it has rows, where that is more.
MOST_WORK = 1 << 30
MOST_OF_PRICE = 1 << 34  # multiplications of a price, beyond which SOME rows say what it is
SOME = 2048
DAMPING = 0.05  # of the mean of a diagonal, added to it: what few draws have not seen
PIECE = 1 << 16  # elements of a gradient that are taken together: they stay in the cache of one core


@dataclass(frozen=True)
class Metric:
    """What an error `[o, n]` in a weight costs, in relative squared output error.

    Attributes:
        out: G / tr G, `[o, o]`, symmetric and positive definite, float32; or its diagonal `[o]`.
        into: H, `[n, n]`, likewise; or its diagonal `[n]`.

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
        """The metric of a site of which the sensitivity alone is known: relative squared output error per squared
        error.
        """
        return cls(
            torch.full((out,), 1 / out, device=device), torch.full((into,), out * sensitivity, device=device)
        )

    def price(self, error: Tensor) -> float:
        """tr(G E H E^T) / tr G; of an error that would take long it is estimated from some of its rows or columns."""
        error = error.to(self.into.device, torch.float32)
        if self.out.ndim == 1 and self.into.ndim == 2:
            return _price_of_rows(error, self.out, self.into)
        if self.out.ndim == 2 and self.into.ndim == 1:
            return _price_of_rows(error.T, self.into, self.out)
        return float((times(times(error.T, self.out).T, self.into) * error).sum(dtype=torch.float64))

    @property
    def sensitivity(self) -> float:
        """Relative squared output error per squared error of independent entries."""
        traces = trace(self.out) * trace(self.into)
        return float(traces) / (len(self.out) * len(self.into))

    @property
    def rows(self) -> Tensor:
        """What an error of each row counts, of all: `[o]`, the diagonal of G / tr G."""
        return self.out if self.out.ndim == 1 else self.out.diagonal()

    @property
    def statistics(self) -> Statistics | None:
        """Of the inputs alone, as codecs make use of them; None where nothing of them is known."""
        return Statistics(self.into, 1) if self.into.ndim == 2 else None

    @property
    def outputs(self) -> Tensor | None:
        """G / tr G, where it is known as a whole."""
        return self.out if self.out.ndim == 2 else None


def _price_of_rows(error: Tensor, weights: Tensor, moment: Tensor) -> float:
    """The sum over rows e of w (e H e^T), of too many of them from some, by the shares that these have of all w |e|^2.

    Args:
        error: `[k, n]`.
        weights: w `[k]`.
        moment: H `[n, n]`.
    """

    def of(rows: Tensor, weights: Tensor) -> float:
        return float(((rows @ moment) * rows).sum(1).dot(weights).double())

    if len(error) <= 2 * SOME or error.numel() * len(moment) < MOST_OF_PRICE:
        return of(error, weights)
    seen = torch.linspace(0, len(error) - 1, SOME, device=error.device).long()
    power = torch.linalg.vector_norm(error, dim=1).square() * weights
    return of(error[seen], weights[seen]) * float(
        power.sum() / power[seen].sum().clamp_min(torch.finfo(power.dtype).tiny)
    )


def times(x: Tensor, side: Tensor) -> Tensor:
    """Multiply `x [k, n]` by a moment that is given as a matrix `[n, n]` or as its diagonal `[n]`."""
    return x * side.to(x) if side.ndim == 1 else x @ side.to(x)


def trace(side: Tensor) -> float:
    """The trace of a moment that is given as a matrix or as its diagonal."""
    return float((side if side.ndim == 1 else side.diagonal()).sum(dtype=torch.float64))


class Draws:
    """Adds up the second moments of gradients of one weight.

    Where draws have many more rows than a moment needs, some are added up before they are multiplied: their signs are
    independent, so that what they have in common is 0 in the mean.

    Args:
        count: how many draws there will be.
        inputs: whether the moment of inputs is wanted as a whole; else its diagonal is.
    """

    def __init__(self, count: int = 1, *, inputs: bool = True) -> None:
        self.count, self.inputs = count, inputs
        self.out: Tensor | None = None
        self.into: Tensor | None = None
        self.pending: Tensor | None = None
        self.own = False  # whether `pending` is this object's alone, so that it may be written to
        self.added = 0  # draws in `pending`

    def add(self, gradient: Tensor) -> Tensor:
        """One draw `[o, n]`; what `mean_square` says of it."""
        if self.pending is None:
            self.pending = put_aside(gradient.float())
            self.own = self.pending is not gradient
            power = mean_square(gradient)
        else:
            self.pending, self.own = self.pending if self.own else self.pending.clone(), True
            power = mean_square(gradient, self.pending)
        self.added += 1
        if self.added == together(len(gradient), gradient.shape[1], self.count):
            self._multiply()
        return power

    def _multiply(self) -> None:
        """Count what was added up."""
        if self.pending is None:
            return
        out = _second_moment(self.pending)
        into = _second_moment(self.pending.T) if self.inputs else self.pending.square().sum(0)
        self.out = put_aside(out) if self.out is None else self.out.add_(out)
        self.into = put_aside(into) if self.into is None else self.into.add_(into)
        self.pending, self.added = None, 0

    def moments(self) -> tuple[Tensor, Tensor] | None:
        """The sums over all draws, of outputs and of inputs; None where there was none."""
        self._multiply()
        return None if self.out is None or self.into is None else (self.out, self.into)


def metric_of(draws: Sequence[Draws], samples: int) -> Metric | None:
    """The metric of draws that were made `samples` times for all inputs; None where no gradient was usable.

    Args:
        draws: of all inputs, or of either half of them: moments are then shrunk (`surgery.fitting.shrinkage`).
        samples: how often.
    """
    found = [own for each in draws if (own := each.moments()) is not None]
    if not found:
        return None
    outs, intos = zip(*found, strict=True)
    out, into = (_sum(each, len(draws)) for each in (outs, intos))
    power = trace(out)
    if not 0 < power < float("inf"):
        return None
    return Metric(put_aside(_damped(out / power)), put_aside(_damped(into / samples)))


def _sum(parts: Sequence[Tensor], count: int) -> Tensor:
    """The sum of moments, of `count` parts where all have draws; that of halves is shrunk where it is a matrix."""
    first, *others = parts
    total = put_aside(first + others[0]) if others else first
    if count == 1 or total.ndim == 1:
        return total
    return shrunk(total, best_share(*map(looked_at, parts)) if others else None)


def mean_square(gradient: Tensor, total: Tensor | None = None) -> Tensor:
    """The mean of a gradient's squared entries, float64, on its device, which is not waited for.

    Args:
        gradient: `[o, ...]`, of any floating-point dtype.
        total: float32, of the same shape, to which it is added in place: so it is read from memory once.
    """
    if not gradient.ndim or gradient.device.type != "cpu":
        wide = gradient.float()
        if total is not None:
            total.add_(wide)
        return wide.square().mean().double()
    rows = max(1, PIECE * len(gradient) // max(1, gradient.numel()))
    power = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(gradient), rows):
        piece = gradient[start : start + rows].float()
        if total is not None:
            total[start : start + rows].add_(piece)
        power += piece.flatten().dot(piece.flatten())
    return power / gradient.numel()


def together(out: int, into: int, count: int) -> int:
    """How many of `count` draws `[out, into]` are added up before they are multiplied.

    Example:
        >>> together(192, 192, 8), together(768, 768, 8), together(768, 3072, 8)
        (1, 2, 8)
    """

    def fewest(side: int, other: int) -> int:
        """Draws that have enough columns for the moment of a side."""
        if side > WIDEST:
            return 1
        rows = max(side / 2, MOST_WORK / side**2)
        return math.ceil(rows / other)

    return max(1, count // max(fewest(out, into), fewest(into, out)))


def _second_moment(rows: Tensor) -> Tensor:
    """`rows @ rows.T` of `rows [k, n]`; of too many rows its diagonal."""
    return rows @ rows.T if len(rows) <= WIDEST else rows.square().sum(1)


def mean_metric(metrics: Sequence[Metric]) -> Metric:
    """The metric of an error that several members share; their prices add up to about as many times its own."""
    return Metric(_mean([each.out for each in metrics]), _mean([each.into for each in metrics]))


def mean_statistics(metrics: Sequence[Metric]) -> Statistics | None:
    """The statistics of `mean_metric`, as codecs make use of them; None where nothing is known of inputs."""
    into = _mean([each.into for each in metrics])
    if into.ndim == 1:
        return None
    coupled = any(each.out.ndim == 2 for each in metrics)
    return Statistics(into, 1, outputs=_mean([each.out for each in metrics]) if coupled else None)


def _mean(sides: Sequence[Tensor]) -> Tensor:
    whole = any(side.ndim == 2 for side in sides)
    found = [side.diag() if whole and side.ndim == 1 else side for side in sides]
    return put_aside(torch.stack(found).mean(0))


def _damped(moment: Tensor) -> Tensor:
    """A moment with a share of its mean diagonal added to its diagonal, scaled back to the same trace."""
    if moment.ndim == 1:
        return (moment + DAMPING * moment.mean()) / (1 + DAMPING)
    found, mean = moment.clone(), moment.diagonal().mean()
    found.diagonal().add_(DAMPING * mean)
    return found.div_(1 + DAMPING)
