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
WIDE = 2048  # columns from which there is one sweep: the others take as long and gain 1% (squared error)
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
        >>> feed_back(torch.tensor([[0.4, 0.3]]), Inputs.of(moment), 2, lambda columns: Whole()).codes.int()
        tensor([[0, 1]], dtype=torch.int32)
    """
    plain, moment = plainly(rows, width, grid), inputs.moment
    plain = Rounded(plain.codes, plain.grids, price(rows - decoded(plain, width), moment))
    if inputs.root is None:
        return plain
    columns = _columns(rows)
    found = _forward(columns, inputs.root, width, grid)
    _descend(columns, moment, width, found)
    fed = price((columns - found.values).T, moment)
    better = fed < plain.error
    if not bool(better.any()):
        return plain
    grids = tuple(_Either(better[:, None], *pair) for pair in zip(found.grids, plain.grids, strict=True))
    codes = torch.where(better[:, None], found.codes.T, plain.codes).contiguous()
    return Rounded(codes, grids, torch.where(better, fed, plain.error))


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


def plainly(rows: Tensor, width: int, grid: Callable[[Tensor], Grid]) -> Rounded:
    """`rows [R, n]` without feedback; errors are not priced."""
    grids = tuple(grid(columns) for columns in rows.split(width, 1))
    codes = [each.codes(columns) for each, columns in zip(grids, rows.split(width, 1), strict=True)]
    return Rounded(torch.cat(codes, 1), grids, rows.new_zeros(len(rows)))


def decoded(rounded: Rounded, width: int) -> Tensor:
    """What codes stand for: `[R, n]`."""
    parts = zip(rounded.grids, rounded.codes.split(width, 1), strict=True)
    return torch.cat([grid.values(codes) for grid, codes in parts], 1)


@dataclass(frozen=True)
class _Fed:
    """A matrix that is being rounded, by columns, which lie together.

    Attributes:
        codes: `[n, R]`, as floats.
        values: `[n, R]`, what they decode to.
        grids: of the groups of columns, in their order.
    """

    codes: Tensor
    values: Tensor
    grids: list[Grid]


def _forward(columns: Tensor, upper: Tensor, width: int, grid: Callable[[Tensor], Grid]) -> _Fed:
    """GPTQ: each group's grid is made of what earlier groups left, and each column's error goes to later ones."""
    left, found = columns.clone(), _Fed(torch.empty_like(columns), torch.empty_like(columns), [])
    pivots = upper.diagonal().tolist()
    for start in range(0, len(columns), width):
        stop = start + width
        part, root = left[start:stop], upper[start:stop, start:stop]
        made = grid(part.T)
        found.grids.append(made)
        errors = torch.empty_like(part)
        for j, (column, error) in enumerate(zip(part, errors, strict=True)):
            code = made.codes(column[:, None])
            value = made.values(code)
            found.codes[start + j], found.values[start + j] = code[:, 0], value[:, 0]
            torch.sub(column, value[:, 0], out=error).div_(pivots[start + j])  # GPTQ, Eq. (3)
            part[j + 1 :].addr_(root[j, j + 1 :], error, alpha=-1)  # GPTQ, Eq. (2)
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)  # GPTQ, Eq. (4), lazily
    return found


def _columns(rows: Tensor) -> Tensor:
    """`rows [R, n]` as `[n, R]` in memory of its own, also where there is one row."""
    return rows.T.clone(memory_format=torch.contiguous_format)


def _inverse_root(moment: Tensor) -> Tensor:
    """The upper triangular U of H^-1 = U^T U: the inverse of H's own upper triangular factor, H = V V^T."""
    lower = torch.linalg.cholesky(moment.double().flip(0, 1))
    upper = lower.flip(0, 1)
    identity = torch.eye(len(moment), dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True).to(moment.dtype)


def _descend(columns: Tensor, moment: Tensor, width: int, found: _Fed) -> None:
    """Round every column anew, in place, given all the others: no row's error rises.

    Args:
        columns: to be rounded, `[n, R]`.
        moment: H.
        width: of a group.
        found: as it is rounded; changed.
    """
    steps, error = moment.diagonal().reciprocal(), columns - found.values
    for _ in range(SWEEPS if len(columns) < WIDE else 1):
        changed = error.new_zeros(())
        for number, grid in enumerate(found.grids):
            group = slice(number * width, number * width + width)
            values, codes, inner = found.values[group], found.codes[group], moment[group, group]
            pull, before = moment[group] @ error, codes.clone()  # of all errors on the columns of this group
            for j, (now, step) in enumerate(zip(values, steps[group], strict=True)):
                # Where the error has no slope: this value + sum over all errors E H / H_jj.
                code = grid.codes(torch.addcmul(now, pull[j], step)[:, None])
                after = grid.values(code)[:, 0]
                pull[j + 1 :].addr_(inner[j, j + 1 :], now - after)
                values[j], codes[j] = after, code[:, 0]
            torch.sub(columns[group], values, out=error[group])
            changed += (codes != before).sum()
        if float(changed) < SETTLED * error.numel():
            break
