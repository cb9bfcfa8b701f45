"""Rounding to a grid: searched scales, the half-quadratic zero of HQQ, and error feedback by GPTQ.

Matrices are `[out, in]`; a group is a run of elements of one row that have one scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.frontier.packing import Grid

STEPS = 16  # scales that are tried for each group, and as many with the other sign
AT_ONCE = 1 << 21  # elements of which scales are tried side by side


def groups_of(matrix: Tensor, group: int) -> Tensor:
    """`[out, groups, size]`, padded with zeros; a group of 0 is a whole row."""
    size = min(group or matrix.shape[1], matrix.shape[1])
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % size))
    return padded.reshape(len(matrix), -1, size)


def middle_of(levels: int) -> float:
    """The code that stands for zero: between the two of one bit, the middle of three, 2**(b-1) of 2**b."""
    return (levels - 1) / 2 if levels < 4 else levels / 2


def codes_of(groups: Tensor, scale: Tensor, levels: int) -> Tensor:
    """The nearest codes, as real numbers; a scale of 0 gives the middle."""
    middle = middle_of(levels)
    ratio = groups / torch.where(scale == 0, 1, scale)
    if levels == 2:
        return (ratio > 0).to(groups.dtype)
    return (ratio + middle).round_().clamp_(0, levels - 1)


def search_scale(groups: Tensor, levels: int, weight: Tensor | None = None, steps: int = STEPS) -> Tensor:
    """The scale of each group with the least squared error, in bfloat16.

    Scales from a third of the largest element's up to it are tried with both signs (an even grid reaches one step
    further on one side), then the best one's least-squares refinement for its codes.

    Args:
        groups: `[..., size]`.
        levels: of the grid.
        weight: of each element's squared error; broadcasts.
        steps: how many scales are tried.

    Returns:
        `[..., 1]`.
    """
    weight = torch.ones((), dtype=groups.dtype) if weight is None else weight
    top = groups.abs().amax(-1, keepdim=True)
    if levels == 2:
        total = (groups.abs() * weight).sum(-1, keepdim=True)
        share = weight.expand_as(groups).sum(-1, keepdim=True)
        return (2 * total / share.clamp_min(1e-30)).bfloat16().to(groups.dtype)
    middle = middle_of(levels)
    reach = levels - 1 - middle if levels == 3 else middle
    factors = torch.linspace(1 / 3, 1.05, steps) / reach
    factors = factors if levels == 3 else torch.cat([factors, -factors])
    best, least = top, torch.full_like(top, torch.inf)
    for some in factors.split(max(1, AT_ONCE // max(groups.numel(), 1))):
        tried = (some.view(-1, *[1] * groups.dim()) * top).bfloat16().to(groups.dtype)
        error = _error(groups, tried, levels, weight)
        found, place = error.min(0)
        scale = tried.gather(0, place.unsqueeze(0)).squeeze(0)
        best, least = torch.where(found < least, scale, best), torch.minimum(found, least)
    codes = codes_of(groups, best, levels) - middle
    square = (codes.square() * weight).sum(-1, keepdim=True)
    refined = (codes * groups * weight).sum(-1, keepdim=True) / square.clamp_min(1e-30)
    refined = torch.where(square > 0, refined, best).bfloat16().to(groups.dtype)
    return torch.where(_error(groups, refined, levels, weight) < least, refined, best)


def _error(groups: Tensor, scale: Tensor, levels: int, weight: Tensor) -> Tensor:
    """Squared error of each group, for one scale or several."""
    codes = codes_of(groups, scale, levels).sub_(middle_of(levels))
    return (codes.mul_(scale).sub_(groups).square_() * weight).sum(-1, keepdim=True)


def round_to(
    matrix: Tensor, levels: int, group: int, weight: Tensor | None = None, steps: int = STEPS
) -> Grid:
    """Round to the nearest code of each group's best scale.

    Args:
        matrix: `[out, in]`.
        levels: 2, 3 or a power of two up to 256.
        group: elements; 0 for a whole row.
        weight: `[in]`, of squared errors when scales are searched; 1 where not given.
        steps: scales that are tried.
    """
    groups = groups_of(matrix, group)
    by_group = None if weight is None else groups_of(weight.unsqueeze(0), group)
    scale = search_scale(groups, levels, by_group, steps)
    codes = codes_of(groups, scale, levels)
    return _grid(codes, scale, levels, matrix)


def _grid(codes: Tensor, scale: Tensor, levels: int, matrix: Tensor, zero: Tensor | None = None) -> Grid:
    size = codes.shape[2]
    flat = codes.reshape(len(matrix), -1)[:, : matrix.shape[1]].to(torch.uint8).contiguous()
    return Grid(
        flat, scale.squeeze(2), levels, size, tuple(matrix.shape), None if zero is None else zero.squeeze(2)
    )


def min_max(matrix: Tensor, levels: int, group: int | None) -> Grid:
    """Round between the least and the largest element, of each group or, for None, of the whole tensor."""
    groups = matrix.reshape(1, 1, -1) if group is None else groups_of(matrix, group)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / (levels - 1)).clamp_min(1e-30).bfloat16().to(matrix.dtype)
    zero = (-low / scale).bfloat16().to(matrix.dtype)
    codes = (groups / scale + zero).round().clamp(0, levels - 1)
    if group is None:
        flat = codes.reshape(matrix.shape).to(torch.uint8)
        return Grid(flat, scale.reshape(1, 1), levels, 0, tuple(matrix.shape), zero.reshape(1, 1))
    return _grid(codes, scale, levels, matrix, zero)


def half_quadratic(
    matrix: Tensor,
    levels: int,
    group: int,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    rounds: int = 20,
) -> Grid:
    """HQQ (Badri and Shaji, 2023): min-max scales, and the zero that minimises an l_p norm of the error, p < 1.

    Alternates a shrinkage of the error and the zero's closed form, until the mean absolute error no longer falls.

    Args:
        matrix: `[out, in]`.
        levels: a power of two.
        group: elements; 0 for a whole row.
        p: of the norm.
        beta: weight of the quadratic term.
        kappa: by which it grows in each round.
        rounds: at most.
    """
    groups = groups_of(matrix, group)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    inverse = ((levels - 1) / (high - low).clamp_min(1e-12)).clamp_max(2e4)
    zero = -low * inverse
    best, least = zero, torch.inf
    for _ in range(rounds):
        codes = (groups * inverse + zero).round().clamp(0, levels - 1)
        error = groups - (codes - zero) / inverse
        mean = float(error.abs().mean())
        if mean >= least:
            break
        best, least = zero, mean
        size = error.abs()
        shrunk = error.sign() * (size - size.pow(p - 1) / beta).clamp_min(0)
        zero = (codes - (groups - shrunk) * inverse).mean(2, keepdim=True)
        beta *= kappa
    codes = (groups * inverse + best).round().clamp(0, levels - 1)
    return _grid(codes, 1 / inverse, levels, matrix, best)


def feed_back(
    matrix: Tensor, moment: Tensor, levels: int, group: int, damp: float = 0.01, order: bool = False
) -> Grid:
    """GPTQ (Frantar et al., 2022): columns are rounded one by one, and what is left goes into the columns to come.

    Args:
        matrix: `[out, in]`.
        moment: second moments of its inputs, `[in, in]`.
        levels: of the grid.
        group: elements; 0 for a whole row. A group's scale is searched when its first column is reached.
        damp: of the mean diagonal, added to it.
        order: whether columns with the largest moments come first; scales are then of the whole row.
    """
    width = matrix.shape[1]
    moment = moment.double()
    diagonal = moment.diagonal()
    moment = moment + torch.eye(width, dtype=torch.float64) * (damp * diagonal.mean()).clamp_min(1e-12)
    turn = diagonal.argsort(descending=True) if order else torch.arange(width)
    left = matrix[:, turn].clone()
    upper = torch.linalg.cholesky(
        torch.linalg.inv(moment[turn][:, turn]), upper=True
    ).float()  # the conditional inverses of all columns at once
    size = width if order else min(group or width, width)
    codes, scales = torch.zeros_like(left), []
    for start in range(0, width, size):
        stop = min(start + size, width)
        scale = search_scale(left[:, start:stop], levels)
        scales.append(scale)
        errors = torch.zeros(len(left), stop - start)
        block = left[:, start:stop].clone()
        for k in range(stop - start):
            column = block[:, k : k + 1]
            code = codes_of(column, scale, levels)
            codes[:, start + k] = code[:, 0]
            error = (column - (code - middle_of(levels)) * scale) / upper[start + k, start + k]
            block[:, k:] -= error @ upper[start + k : start + k + 1, start + k : stop]
            errors[:, k] = error[:, 0]
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    back = torch.empty_like(codes)
    back[:, turn] = codes
    return Grid(back.to(torch.uint8), torch.cat(scales, 1), levels, size, tuple(matrix.shape))
