"""Error feedback on both sides: later rows of a matrix, too, make up for the errors of earlier ones.

An error E of a matrix moves outputs by tr(G E H E^T): H is the second moment of the matrix's inputs, G that of the
gradients at its outputs. With G = M D M^T and H = N F N^T, M and N unit upper triangular, this is the sum over entries
of D_i F_j (M^T E N)_ij^2: each entry is rounded where its own term is least, given those of the rows and columns before
it (YAQA: Tseng et al. 2025, arXiv 2505.22988; for G = I it is GPTQ).

Rows are rounded in a few blocks, those with the greatest G_ii first, and M has blocks: the rows of one do not know of
one another, which costs little, as all later ones make up for them. A tile, which is a block of rows by a group of
columns, waits for those above it and to its left alone, so that all tiles of an antidiagonal are rounded at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.storage.codecs.feedback import Grid, Inputs, damped, decoded, plainly

DAMPING = 0.2  # of the mean of G's diagonal, added to it: gradients are drawn a few dozen times
BLOCKS = 16  # of rows: with twice as many the squared error is 2% less

Tile = tuple[int, int]
"""The number of a block of rows, and of a group of columns."""


@dataclass(frozen=True)
class Outputs:
    """What feeding errors back along rows needs of G.

    Attributes:
        moment: G `[o, o]`, damped, of rows in the order in which they are rounded.
        order: `[o]`, of each of them its row.
        back: `[o, o]`, the blocks of M above its diagonal.
        block: rows of a block; of the last one maybe fewer.
    """

    moment: Tensor
    order: Tensor
    back: Tensor
    block: int

    @classmethod
    def of(cls, moment: Tensor) -> Outputs:
        """From `moment [o, o]`, float32, which is damped here."""
        moment, order, upper, block = _factor(moment)
        back = torch.zeros_like(upper)
        for start in range(block, len(upper), block):
            own = slice(start, start + block)
            back[:start, own] = torch.linalg.solve_triangular(
                upper[own, own], upper[:start, own], upper=True, left=False
            )
        return cls(moment, order, back.to(moment.dtype), block)

    def padded(self) -> Tensor:
        """`back` with zeros for the rows that fill up the last block."""
        more = -len(self.back) % self.block
        return torch.nn.functional.pad(self.back, (0, more, 0, more))


def expected_gain(moment: Tensor) -> float:
    """What feedback along rows makes of the error of rounding, as a factor of at most 1, before it is tried.

    Args:
        moment: G `[o, o]`, float32; it is damped here.

    Example:
        >>> round(expected_gain(torch.tensor([[1.0, 0.9], [0.9, 1.0]])), 2)
        0.72
    """
    moment, _, upper, block = _factor(moment)
    own = [upper[s : s + block, s : s + block].square().sum() for s in range(0, len(upper), block)]
    return min(float(torch.stack(own).sum() / moment.diagonal().sum(dtype=upper.dtype)), 1.0)


def _factor(moment: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """G damped and in order, the order, the upper triangular U of G = U U^T, float64, and rows of a block."""
    moment = damped(moment, DAMPING)
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    moment = moment[order][:, order]
    upper = torch.linalg.cholesky(moment.double().flip(0, 1)).flip(0, 1)
    return moment, order, upper, -(-len(moment) // BLOCKS)


def price(error: Tensor, outputs: Outputs, inputs: Inputs) -> Tensor:
    """tr(G E H E^T) of `error [o, n]`, under both damped moments, on its device.

    Example:
        >>> correlated = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
        >>> outputs, inputs = Outputs.of(correlated), Inputs.of(torch.eye(2))
        >>> round(float(price(torch.ones(2, 2), outputs, inputs)), 2)  # 2.2 + 1 + 2.2 times 1.1
        7.48
    """
    error = error[outputs.order]
    return ((outputs.moment @ error @ inputs.moment) * error).sum()


def feed_back_both(
    rows: Tensor, inputs: Inputs, outputs: Outputs, width: int, grid: Callable[[Tensor], Grid]
) -> tuple[Tensor, Tensor]:
    """Round a matrix so that tr(G E H E^T) is small; where nothing is gained, plainly.

    Args:
        rows: `[o, n]`, float32.
        inputs: of H.
        outputs: of G.
        width: number of columns that have a grid of their own; divides n.
        grid: makes the grid of `[k, width]` values: whole numbers times a scale for each row.

    Returns:
        codes `[o, n]`, as floats, and scales `[o, n / width]`.
    """
    codes, values, scales = _forward(rows, inputs, outputs, width, grid)
    plain = plainly(rows, width, grid)
    better = price(rows - values, outputs, inputs) < price(rows - decoded(plain, width), outputs, inputs)
    ones = torch.ones_like(rows[:, :1])
    largest = torch.cat([each.values(ones) for each in plain.grids], 1)
    return torch.where(better, codes, plain.codes), torch.where(better, scales, largest)


def _forward(
    rows: Tensor, inputs: Inputs, outputs: Outputs, width: int, grid: Callable[[Tensor], Grid]
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and values `[o, n]`, and scales `[o, n / width]`."""
    (count, n), block = rows.shape, outputs.block
    wanted = torch.nn.functional.pad(rows[outputs.order].T, (0, -count % block)).contiguous()  # by columns
    left, codes, values = wanted.clone(), torch.empty_like(wanted), torch.empty_like(wanted)
    scales = wanted.new_empty(n // width, wanted.shape[1])
    unit, back = _unit(inputs), outputs.padded()
    inner = torch.stack([unit[s : s + width, s : s + width] for s in range(0, n, width)], 2)
    for wave in _waves(wanted.shape[1] // block, n // width):
        places = [(slice(g * width, (g + 1) * width), slice(b * block, (b + 1) * block)) for b, g in wave]
        part = torch.stack([left[place] for place in places], 1)  # [width, T, block]
        made = grid(part.flatten(1).T)
        groups = [g for _, g in wave]
        code, value = _round_columns(part, made, inner[:, :, groups[-1] : groups[0] + 1].flip(2))
        scale = made.values(torch.ones_like(part[0]).view(-1, 1)).view_as(part[0])
        for number, (own, mine) in enumerate(places):
            codes[own, mine], values[own, mine] = code[:, number], value[:, number]
            scales[groups[number], mine] = scale[number]
            left[own.stop :, mine].addmm_(unit[own, own.stop :].T, part[:, number], alpha=-1)
            left[own, mine.stop :].addmm_(wanted[own, mine] - value[:, number], back[mine, mine.stop :])
    place = torch.argsort(outputs.order)
    found = (each[:, place].T.contiguous() for each in (codes, values, scales))
    return next(found), next(found), next(found)


def _round_columns(part: Tensor, grid: Grid, inner: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and values of tiles, one column after the other, by GPTQ.

    Args:
        part: `[width, T, R]`, what is to be rounded; errors are left in their place.
        grid: of T * R rows.
        inner: `[width, width, T]`, how much of a column's error later ones take back.
    """
    codes, values = torch.empty_like(part), torch.empty_like(part)
    for j, (column, value) in enumerate(zip(part, values, strict=True)):
        code = grid.codes(column.view(-1, 1))
        value.copy_(grid.values(code).view_as(column))
        codes[j] = code.view_as(column)
        column.sub_(value)
        part[j + 1 :].addcmul_(inner[j, j + 1 :].unsqueeze(2), column, value=-1)
    return codes, values


def _waves(blocks: int, groups: int) -> Iterator[Sequence[Tile]]:
    """All tiles, those of an antidiagonal together."""
    for wave in range(blocks + groups - 1):
        yield [(b, wave - b) for b in range(max(0, wave - groups + 1), min(blocks, wave + 1))]


def _unit(inputs: Inputs) -> Tensor:
    """The rows of U, H^-1 = U^T U, each over its diagonal entry: how much of an error later columns take back."""
    if inputs.root is None:
        return torch.eye(len(inputs.moment), dtype=inputs.moment.dtype, device=inputs.moment.device)
    return inputs.root / inputs.root.diagonal()[:, None]
