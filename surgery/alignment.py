"""Alignment: which hypermodule generates each location, optimised by many parallel (1+lambda)-EAs.

MUiR (Meyerson and Miikkulainen, arXiv 1906.00097), Algorithms 1 and 2, as pure functions on tensors, without
a loop over locations: draw locations, draw challengers for each, and decide once training has said which
alternative carries the most weight. Challengers are either drawn by usage, as in the paper, or, for
pretrained weights, by how much of the block they can explain: a random hypermodule explains next to
nothing of a block that already does something, so it could only prune.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

POOL = 256  # hypermodules among which the best explanation of a block is looked for, unless asked otherwise
_CHUNK = 1 << 24  # numbers in one intermediate result
_DEPENDENT = 1e-5  # a basis block that is so much shorter without what others span adds nothing

Total = Callable[[Tensor], Tensor]
"""Adds up, where processes hold columns of blocks and rows, what each found in its own; None where one holds all."""


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
    place = torch.randint(len(psi), (count, challengers), generator=generator)
    return psi[place.to(psi.device)]


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


# Pretrained weights -----------------------------------------------------------------------------------


def fit_contexts(
    blocks: Tensor, rows: Tensor, hypermodules: Tensor, ridge: float = 1e-6, total: Total | None = None
) -> Tensor:
    """Contexts with which hypermodules come nearest to blocks, by least squares.

    Args:
        blocks: `[N, d]`.
        rows: `[K, c, d]`.
        hypermodules: `[N, A]`, for each block the alternatives to fit.
        ridge: relative to the largest basis block, so that dependent ones do no harm.
        total: see `Total`.

    Returns:
        `[N, A, c]`.
    """
    used, place = torch.unique(hypermodules, return_inverse=True)
    basis = rows[used]
    gram = _sum(basis @ basis.mT, total)  # [U, c, c]
    scale = gram.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(1e-30)  # invertible where all is 0
    gram = gram + torch.diag_embed((ridge * scale)[:, None].expand(gram.shape[:2]))
    inverse = torch.linalg.inv(gram)
    step = max(1, _CHUNK // max(1, place.shape[1] * basis[0].numel()))
    parts = []
    for block, where in zip(blocks.split(step), place.split(step), strict=True):
        products = _sum(torch.einsum("nacd,nd->nac", basis[where], block), total)
        parts.append(torch.einsum("nace,nae->nac", inverse[where], products))
    return torch.cat(parts)


def scale_contexts(
    contexts: Tensor, blocks: Tensor, rows: Tensor, hypermodules: Tensor, total: Total | None = None
) -> Tensor:
    """Contexts in their own directions, so long that each generated block has the norm of its original.

    Args:
        contexts: `[N, A, c]`, as `fit_contexts` returns them.
        blocks: `[N, d]`.
        rows: `[K, c, d]`.
        hypermodules: `[N, A]`.
        total: see `Total`.

    Returns:
        `[N, A, c]`; unchanged where a context generates nothing.

    Example:
        >>> rows, block = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[3.0, 4.0]])
        >>> scale_contexts(torch.tensor([[[3.0]]]), block, rows, torch.tensor([[0]])).item()
        5.0
    """
    step = max(1, _CHUNK // max(1, hypermodules.shape[1] * rows[0].numel()))
    parts = []
    for some in zip(contexts.split(step), blocks.split(step), hypermodules.split(step), strict=True):
        context, block, where = some
        size = _norm(torch.einsum("nac,nacd->nad", context, rows[where]), total)
        ratio = _norm(block, total).unsqueeze(1) / size
        parts.append(context * torch.where(size > 0, ratio, torch.ones_like(ratio)).unsqueeze(2))
    return torch.cat(parts)


def explained(blocks: Tensor, rows: Tensor, total: Total | None = None) -> Tensor:
    """The share of each block's energy that each hypermodule explains with its best context.

    Args:
        blocks: `[N, d]`.
        rows: `[P, c, d]`.
        total: see `Total`.

    Returns:
        `[N, P]`, between 0 and 1; 0 for a block that is 0.
    """
    if total is not None:
        return _explained_in_parts(blocks.float(), rows.float(), total)
    basis = _orthonormal(rows)
    pool, _, c = basis.shape
    flat = basis.permute(1, 0, 2).reshape(blocks.shape[1], pool * c)
    step = max(1, _CHUNK // (pool * c))
    parts = [(b.float() @ flat).square().view(-1, pool, c).sum(2) for b in blocks.split(step)]
    energy = blocks.float().square().sum(1, keepdim=True)
    return torch.where(energy > 0, torch.cat(parts) / energy.clamp_min(1e-38), torch.zeros_like(energy))


def explained_pairs(blocks: Tensor, rows: Tensor, total: Total | None = None) -> Tensor:
    """Like `explained`, each block with one hypermodule of its own: `[N, d]`, `[N, c, d]` -> `[N]`."""
    if total is not None:
        blocks, rows = blocks.float(), rows.float()
        products = total(torch.einsum("ncd,nd->nc", rows, blocks)).double()
        found = torch.einsum("ncr,nc->nr", _whitening(rows, total), products).square().sum(1).float()
        energy = total(blocks.square().sum(1))
        return torch.where(energy > 0, found / energy.clamp_min(1e-38), torch.zeros_like(energy))
    basis = _orthonormal(rows)
    energy = blocks.float().square().sum(1)
    found = torch.einsum("ndc,nd->nc", basis, blocks.float()).square().sum(1)
    return torch.where(energy > 0, found / energy.clamp_min(1e-38), torch.zeros_like(energy))


def _orthonormal(rows: Tensor) -> Tensor:
    """An orthonormal basis of what each hypermodule spans, 0 for basis blocks that add nothing: `[P, d, c]`."""
    rows = rows.float()
    basis, triangle = torch.linalg.qr(rows.mT)
    new = triangle.diagonal(dim1=-2, dim2=-1).abs()
    least = _DEPENDENT * rows.norm(dim=-1).amax(-1, keepdim=True)
    return basis * (new > least).unsqueeze(-2)


def _explained_in_parts(blocks: Tensor, rows: Tensor, total: Total) -> Tensor:
    """`explained` from sums over columns alone: products of blocks with rows, and of rows with one another."""
    pool, c, _ = rows.shape
    whitening = _whitening(rows, total)
    step = max(1, _CHUNK // (pool * c))
    parts = []
    for some in blocks.split(step):
        products = total(some @ rows.flatten(0, 1).T).view(-1, pool, c).double()
        parts.append(torch.einsum("pcr,npc->npr", whitening, products).square().sum(2).float())
    energy = total(blocks.square().sum(1)).unsqueeze(1)
    return torch.where(energy > 0, torch.cat(parts) / energy.clamp_min(1e-38), torch.zeros_like(energy))


def _whitening(rows: Tensor, total: Total) -> Tensor:
    """What makes an orthonormal basis of each hypermodule's rows, 0 for directions that add nothing: `[P, c, c]`."""
    step = max(1, _CHUNK // max(1, rows[0].numel()))
    gram = total(torch.cat([part @ part.mT for part in (some.double() for some in rows.split(step))]))
    size, axes = torch.linalg.eigh(gram)
    able = size > _DEPENDENT**2 * gram.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    return axes * torch.where(able, size.clamp_min(1e-300).rsqrt(), 0.0).unsqueeze(-2)


def _sum(values: Tensor, total: Total | None) -> Tensor:
    return values if total is None else total(values)


def _norm(vectors: Tensor, total: Total | None) -> Tensor:
    """Of the last axis."""
    return vectors.norm(dim=-1) if total is None else total(vectors.square().sum(-1)).sqrt()


def draw_by_explanation(
    blocks: Tensor,
    rows: Tensor,
    psi: Tensor,
    challengers: int,
    generator: torch.Generator,
    first: Tensor | None = None,
    pool: int = POOL,
    power: float = 1.0,
    own: Tensor | None = None,
    total: Total | None = None,
) -> Tensor:
    """Challengers with `P(H_k) ~ usage_k * explained(B_l, H_k)`: widely used, and able to do what the block does.

    Usage alone, as in the paper, proposes mostly what cannot take over the block; explanation alone makes
    many small groups. Together, wrong proposals become rare once an alignment is good, so it stays. Usage is
    that of the *other* locations: a location that is alone always meets others, one in a large group mostly its own.

    Args:
        blocks: `[N, d]` what the locations generate now.
        rows: `[K, c, d]`.
        psi: `[L]`, the alignment of all locations.
        challengers: lambda.
        generator: on the CPU.
        first: `[N, F]` hypermodules that are looked at for one location besides the pool, -1 for none.
        pool: how many locations' hypermodules are looked at for all, drawn uniformly; all where L is no more.
        power: exponent of the share that is explained.
        own: `[N]` the locations whose blocks these are; without it, a location's own use counts too.
        total: see `Total`.

    Returns:
        `[N, lambda]`, with repetition.
    """
    users = torch.arange(len(psi), device=psi.device)
    if len(psi) > pool:
        users = torch.randint(len(psi), (pool,), generator=generator).to(psi.device)
    chosen = psi[users]
    known, place = torch.unique(chosen, return_inverse=True)
    # A block of zeros is explained by nothing and by everything alike.
    weight = explained(blocks, rows[known], total)[:, place].pow(power).clamp_min(1e-12)
    if own is not None:
        weight = weight.masked_fill(users == own.unsqueeze(1), 0.0)
    names = chosen.expand(len(blocks), -1)
    if first is not None and first.shape[1]:
        known = rows[first.clamp_min(0)].flatten(0, 1)  # [N*F, c, d]
        pairs = blocks.repeat_interleave(first.shape[1], 0)
        share = explained_pairs(pairs, known, total).view(first.shape).pow(power).clamp_min(1e-12)
        weight = torch.cat([share.masked_fill(first < 0, 0.0), weight], 1)
        names = torch.cat([first.clamp_min(0), names], 1)
    sums = weight.cumsum(1)
    level = torch.rand(len(blocks), challengers, generator=generator).to(weight) * sums[:, -1:]
    picked = torch.searchsorted(sums, level, right=True).clamp_max(names.shape[1] - 1)
    return names.gather(1, picked)
