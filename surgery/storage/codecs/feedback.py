"""Error feedback: rounding that makes up, in later columns, for the errors of earlier ones.

The output error of a rounded matrix is tr(E H E^T), E the rounding error and H the second moment of the matrix's
inputs. Columns are rounded from the first to the last; what rounding one of them does to the outputs is taken back as
far as the columns that are still to be rounded can (GPTQ: Frantar et al. 2022, arXiv 2210.17323, Algorithm 1), then
every column is rounded again, given all others, for as long as that lowers the error (coordinate descent: Behdin et
al. 2023, arXiv 2309.01885, Algorithm 1). Each row keeps the cheaper of this and plain rounding.

What is stored is what plain rounding stores, codes and a scale for each group: only their values differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

DAMPING = (
    0.1  # of the mean of H's diagonal, added to it: ten times what GPTQ has, for less data (section 3.3)
)
SWEEPS = 3  # of coordinate descent, at most
SETTLED = 0.002  # share of codes changed in a sweep below which another does not pay


class Grid(Protocol):
    """The values that the entries of one group of each row can take."""

    def codes(self, column: Tensor) -> Tensor:
        """Codes `[R, w]`, as floats, of the values nearest to `column [R, w]`."""
        ...

    def values(self, codes: Tensor) -> Tensor:
        """What codes `[R, w]` decode to, in float32."""
        ...


@dataclass(frozen=True)
class Rounded:
    """A rounded matrix.

    Attributes:
        codes: `[R, n]`, as floats.
        grids: of the groups of columns, in their order.
        error: `[R]`, each row's part of tr(E H E^T), under the damped H.
    """

    codes: Tensor
    grids: tuple[Grid, ...]
    error: Tensor


def price(error: Tensor, moment: Tensor) -> Tensor:
    """Each row's part of tr(E H E^T): `[R]` for `error [R, n]` and `moment [n, n]`.

    Example:
        >>> price(torch.tensor([[1.0, 2.0]]), torch.eye(2))
        tensor([5.])
    """
    return ((error @ moment) * error).sum(1)


def damped(moment: Tensor, damping: float = DAMPING) -> Tensor:
    """H with a share of its mean diagonal added to the diagonal: positive definite, whatever inputs were seen.

    Args:
        moment: `[n, n]`, symmetric and positive semidefinite.
        damping: the share.
    """
    diagonal = moment.diagonal()
    mean = diagonal.sum() / (diagonal > 0).sum().clamp_min(1)  # columns that fill a group up have no inputs
    add = torch.where(mean > 0, damping * mean, torch.ones_like(mean))
    return moment + torch.diag_embed(add.expand(len(moment)))


def expected_gain(moment: Tensor) -> float:
    """What error feedback makes of the error of plain rounding, as a factor of at most 1, before it is tried.

    With rounding errors of one variance, GPTQ leaves tr(D) of tr(H), where H = L D L^T and L is unit triangular (QuIP:
    Chee et al. 2023, arXiv 2307.13304, Theorem 1). Coordinate descent, which comes after, gains some percent more.

    Args:
        moment: `[n, n]`, float32; it is damped here.

    Example:
        >>> round(expected_gain(torch.tensor([[1.0, 0.9], [0.9, 1.0]])), 2)
        0.67
    """
    moment = damped(moment).double()
    pivots = torch.linalg.cholesky(moment.flip(0, 1)).diagonal().square()  # each column given those after it
    return min(float(pivots.sum() / moment.diagonal().sum()), 1.0)


@dataclass(frozen=True)
class Inputs:
    """What feeding errors back needs of H, for any rows.

    Attributes:
        moment: H `[n, n]`, damped.
        root: the upper triangular U of H^-1 = U^T U; None where H is diagonal.
    """

    moment: Tensor
    root: Tensor | None

    @classmethod
    def of(cls, moment: Tensor) -> Inputs:
        """From `moment [n, n]`, float32, which is damped here."""
        moment = damped(moment)
        diagonal = torch.equal(moment, moment.diagonal().diag())
        return cls(moment, None if diagonal else _inverse_root(moment))


def feed_back(rows: Tensor, inputs: Inputs, width: int, grid: Callable[[Tensor], Grid]) -> Rounded:
    """Round a matrix so that tr(E H E^T) is small.

    Where H is diagonal, and for every row in which nothing is gained, this is plain rounding, bit for bit.

    Args:
        rows: `[R, n]`, float32.
        inputs: of H.
        width: number of columns that have a grid of their own; divides n.
        grid: makes the grid of `[R, width]` values.

    Example:
        >>> class Whole:
        ...     def codes(self, column): return column.round()
        ...     def values(self, codes): return codes
        >>> moment = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
        >>> feed_back(torch.tensor([[0.4, 0.3]]), Inputs.of(moment), 2, lambda columns: Whole()).codes
        tensor([[0., 1.]])
    """
    plain, moment = _plain(rows, width, grid), inputs.moment
    plain = Rounded(plain.codes, plain.grids, price(rows - _decoded(plain, width), moment))
    if inputs.root is None:
        return plain
    fed = _descend(rows, moment, width, _forward(rows, moment, inputs.root, width, grid))
    better = fed.error < plain.error
    if not bool(better.any()):
        return plain
    grids = tuple(_Either(better[:, None], *pair) for pair in zip(fed.grids, plain.grids, strict=True))
    codes = torch.where(better[:, None], fed.codes, plain.codes)
    return Rounded(codes, grids, torch.where(better, fed.error, plain.error))


@dataclass(frozen=True)
class _Either:
    """Of each row one of two grids."""

    first: Tensor  # [R, 1], boolean
    one: Grid
    other: Grid

    def codes(self, column: Tensor) -> Tensor:
        return torch.where(self.first, self.one.codes(column), self.other.codes(column))

    def values(self, codes: Tensor) -> Tensor:
        return torch.where(self.first, self.one.values(codes), self.other.values(codes))


def _plain(rows: Tensor, width: int, grid: Callable[[Tensor], Grid]) -> Rounded:
    grids = tuple(grid(columns) for columns in rows.split(width, 1))
    codes = [each.codes(columns) for each, columns in zip(grids, rows.split(width, 1), strict=True)]
    return Rounded(torch.cat(codes, 1), grids, rows.new_zeros(len(rows)))


def _decoded(rounded: Rounded, width: int) -> Tensor:
    parts = zip(rounded.grids, rounded.codes.split(width, 1), strict=True)
    return torch.cat([grid.values(codes) for grid, codes in parts], 1)


def _forward(
    rows: Tensor, moment: Tensor, upper: Tensor, width: int, grid: Callable[[Tensor], Grid]
) -> Rounded:
    """GPTQ: each group's grid is made of what earlier groups left, and each column's error goes to later ones."""
    left, codes, grids = _columns(rows), torch.empty_like(rows.T), []  # columns lie together
    for start in range(0, rows.shape[1], width):
        stop = start + width
        part, root = left[start:stop], upper[start:stop, start:stop]
        grids.append(grid(part.T))
        errors = torch.empty_like(part)
        for j in range(width):
            code = grids[-1].codes(part[j, :, None])
            codes[start + j] = code[:, 0]
            torch.sub(part[j], grids[-1].values(code)[:, 0], out=errors[j])
            errors[j] /= root[j, j]  # GPTQ, Eq. (3)
            part[j + 1 :].addr_(root[j, j + 1 :], errors[j], alpha=-1)  # GPTQ, Eq. (2)
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)  # GPTQ, Eq. (4), lazily
    codes = codes.T.contiguous()
    found = Rounded(codes, tuple(grids), rows.new_zeros(len(rows)))
    return Rounded(codes, found.grids, price(rows - _decoded(found, width), moment))


def _columns(rows: Tensor) -> Tensor:
    """`rows [R, n]` as `[n, R]` in memory of its own, also where there is one row."""
    return rows.T.clone(memory_format=torch.contiguous_format)


def _inverse_root(moment: Tensor) -> Tensor:
    """The upper triangular U of H^-1 = U^T U: the inverse of H's own upper triangular factor, H = V V^T."""
    lower = torch.linalg.cholesky(moment.double().flip(0, 1))
    upper = lower.flip(0, 1)
    identity = torch.eye(len(moment), dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True).to(moment.dtype)


def _descend(rows: Tensor, moment: Tensor, width: int, start: Rounded) -> Rounded:
    """Round every column anew, given all the others, as long as that lowers a row's error."""
    best, columns = start, _columns(rows)  # columns lie together
    steps = moment.diagonal().reciprocal()
    for _ in range(SWEEPS):
        codes, error = _columns(best.codes), columns - _decoded(best, width).T
        for number, grid in enumerate(best.grids):
            first, last = number * width, number * width + width
            pull = moment[first:last] @ error  # of all errors on the columns of this group
            inner = moment[first:last, first:last]
            for j in range(width):
                column, now = columns[first + j], error[first + j]
                # The value at which the error has no slope: w + sum over the others of E H / H_jj.
                value = torch.addcmul(column - now, pull[j], steps[first + j])
                code = grid.codes(value[:, None])
                after = column - grid.values(code)[:, 0]
                pull.addr_(inner[j], after - now)
                error[first + j], codes[first + j] = after, code[:, 0]
        codes, found = codes.T.contiguous(), price(error.T, moment)
        better = found < best.error
        changed = float((codes != best.codes).float().mean())
        kept = torch.where(better[:, None], codes, best.codes)
        best = Rounded(kept, best.grids, torch.where(better, found, best.error))
        if changed < SETTLED:
            break
    return best
