"""Differences of siblings from a matrix that they share, as products of low rank in the metric of their outputs.

Member i's matrix is `W_i = M + U_i A_i`: every row of it is the row of M plus a sum of r_i private rows of 1 x n. This
is the one equation of all sharing, blocks = codes x rows, with the rows of M and of A_i for rows and U_i for contexts.

An error E costs tr(G E H E^T), H of the inputs and G of the outputs. The best product of rank r under this metric is
the truncated SVD of G^(1/2) D H^(1/2), D the difference (Eckart and Young; as weighted low rank approximation: Srebro
and Jaakkola 2003). With G = L L^T, its left singular vectors V are the eigenvectors of L^T D H D^T L, and the product
is `L^-T V V^T L^T D`: no root and no inverse of H is needed, and with all directions it is D itself. What a truncation
leaves out costs exactly the sum of the eigenvalues that it drops.

Of large differences few directions are wanted, and these are found without the others: by power iterations of a random
frame (Halko, Martinsson and Tropp 2011, SIAM Review 53(2), Algorithm 4.4), within which the eigenvectors are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.fitting.metric import times

WIDE = 1500  # rows and columns from which a few of the directions take less time than all of them
SPARE = 32  # vectors of a frame beyond the directions that are wanted
POWERS = 3  # times that a frame is multiplied, and made orthonormal, after the first


@dataclass(frozen=True)
class Factors:
    """A product of low rank; its directions in the order in which they move outputs, the strongest first.

    Attributes:
        contexts: U `[out, k]`.
        rows: A `[k, n]`.
        energy: `[k]`, float64: what leaving out each direction costs, in tr(G E H E^T).
    """

    contexts: Tensor
    rows: Tensor
    energy: Tensor

    def product(self, rank: int | None = None) -> Tensor:
        """U A `[out, n]` of the first directions, all by default."""
        return self.contexts[:, :rank] @ self.rows[:rank]

    def first(self, rank: int) -> Factors:
        """The product of the first directions alone."""
        return Factors(self.contexts[:, :rank], self.rows[:rank], self.energy[:rank])

    @property
    def tails(self) -> Tensor:
        """What truncation to each rank 0 to k costs: `[k + 1]`, float64, without what all k leave out."""
        after = self.energy.flip(0).cumsum(0).flip(0)
        return torch.cat([after, after.new_zeros(1)])


def factors(difference: Tensor, into: Tensor, out: Tensor | None = None, most: int | None = None) -> Factors:
    """The directions of a difference, in the metric of its inputs and outputs.

    Args:
        difference: D `[out, n]`, float32 or float64, in which everything is computed.
        into: H `[n, n]`, symmetric and positive semidefinite, or its diagonal `[n]`.
        out: G `[out, out]`, positive definite, or its diagonal `[out]`; by default the identity, and with H = I this is
            then the plain SVD.
        most: number of directions to keep; by default min(out, n), whose product is D up to rounding.

    Example:
        >>> found = factors(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.eye(2))
        >>> found.energy.tolist(), found.tails.tolist()
        ([9.0, 4.0], [13.0, 4.0, 0.0])
    """
    if most == 0:
        none = difference.new_zeros(0)
        return Factors(difference[:, :0], difference[:0], none.double())
    lower = None if out is None else _lower(out).to(difference)
    turned = difference if lower is None else times(difference.T, lower).T
    side = min(turned.shape)
    if most is not None and side >= WIDE and most + SPARE < side:
        frame = _leading(turned, into, most)
    else:  # where there are more rows than columns, within what the columns span
        frame = _whole(turned)
    inner = turned if frame is None else frame.T @ turned
    energy, vectors = torch.linalg.eigh(times(inner, into) @ inner.T)
    energy, vectors = energy.double().flip(0).clamp_min(0.0)[:most], vectors.flip(1)[:, :most]
    rows = vectors.T @ inner
    contexts = vectors if frame is None else frame @ vectors
    if lower is not None and lower.ndim == 1:
        contexts = contexts / lower[:, None]
    elif lower is not None:
        contexts = torch.linalg.solve_triangular(lower.T, contexts, upper=True)
    tiny = torch.finfo(rows.dtype).tiny
    # Both factors of each direction of one size: neighbours then round alike.
    size = (rows.square().mean(1) / contexts.square().mean(0).clamp_min(tiny)).clamp_min(tiny).pow(0.25)
    rows, contexts = rows / size[:, None], contexts * size
    return Factors(contexts, rows, energy)


def _whole(turned: Tensor) -> Tensor | None:
    """An orthonormal frame of what the columns of `[out, n]` span, where there are fewer of them than rows."""
    return torch.linalg.qr(turned).Q if len(turned) > turned.shape[1] else None


def _leading(turned: Tensor, into: Tensor, most: int) -> Tensor:
    """An orthonormal frame `[out, most + SPARE]` that has all but a little of the leading eigenvectors of T H T^T."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(turned.shape[1], most + SPARE, generator=generator)
    frame = torch.linalg.qr(turned @ drawn.to(turned)).Q
    for _ in range(POWERS):
        frame = torch.linalg.qr(turned @ times(frame.T @ turned, into).T).Q
    return frame


def _lower(moment: Tensor) -> Tensor:
    """L of G = L L^T; of a diagonal its diagonal."""
    exact = moment.double()
    return exact.sqrt() if exact.ndim == 1 else torch.linalg.cholesky(exact)
