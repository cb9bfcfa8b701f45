"""Explanation: how much of a block each hypermodule can generate, with which context, and challengers drawn by that.

For pretrained weights: a random hypermodule explains next to nothing of a block that already does something, so drawn
by usage alone, as in the paper, challengers could only prune.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from surgery.util.dtypes import wide

POOL = 256  # hypermodules among which the best explanation of a block is looked for, unless asked otherwise
_CHUNK = 1 << 24  # elements in one intermediate result
_DEPENDENT = 1e-5  # a basis block that is so much shorter without what others span adds nothing

Total = Callable[[Tensor], Tensor]
"""Adds up, where processes hold columns of blocks and rows, what each found in its own; None where one holds all."""


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
        return _explained_in_parts(wide(blocks), wide(rows), total)
    basis = _orthonormal(rows)
    pool, _, c = basis.shape
    flat = basis.permute(1, 0, 2).reshape(blocks.shape[1], pool * c)
    step = max(1, _CHUNK // (pool * c))
    parts = [(wide(b) @ flat).square().view(-1, pool, c).sum(2) for b in blocks.split(step)]
    energy = wide(blocks).square().sum(1, keepdim=True)
    return torch.where(energy > 0, torch.cat(parts) / energy.clamp_min(1e-38), torch.zeros_like(energy))


def explained_pairs(blocks: Tensor, rows: Tensor, total: Total | None = None) -> Tensor:
    """Like `explained`, each block with one hypermodule of its own: `[N, d]`, `[N, c, d]` -> `[N]`."""
    if total is not None:
        blocks, rows = wide(blocks), wide(rows)
        products = total(torch.einsum("ncd,nd->nc", rows, blocks)).double()
        found = torch.einsum("ncr,nc->nr", _whitening(rows, total), products).square().sum(1).to(rows.dtype)
        energy = total(blocks.square().sum(1))
        return torch.where(energy > 0, found / energy.clamp_min(1e-38), torch.zeros_like(energy))
    basis = _orthonormal(rows)
    energy = wide(blocks).square().sum(1)
    found = torch.einsum("ndc,nd->nc", basis, wide(blocks)).square().sum(1)
    return torch.where(energy > 0, found / energy.clamp_min(1e-38), torch.zeros_like(energy))


def _orthonormal(rows: Tensor) -> Tensor:
    """An orthonormal basis of what each hypermodule spans, 0 for basis blocks that add nothing: `[P, d, c]`."""
    rows = wide(rows)
    if rows.device.type != "cpu":  # CUDA's factorisation takes one matrix after another
        return _gram_schmidt(rows)
    basis, triangle = torch.linalg.qr(rows.mT)
    new = triangle.diagonal(dim1=-2, dim2=-1).abs()
    least = _DEPENDENT * rows.norm(dim=-1).amax(-1, keepdim=True)
    return basis * (new > least).unsqueeze(-2)


def _gram_schmidt(rows: Tensor) -> Tensor:
    """`_orthonormal` for all hypermodules at once.

    Each direction is freed of those before it twice, since rounding leaves a part of them the first time.
    """
    least = _DEPENDENT * rows.norm(dim=-1).amax(-1, keepdim=True)
    basis = torch.zeros_like(rows)
    for j in range(rows.shape[1]):
        rest, known = rows[:, j], basis[:, :j]
        for _ in range(2 if j else 0):
            rest = rest - (known.mT @ (known @ rest.unsqueeze(-1))).squeeze(-1)
        size = rest.norm(dim=-1, keepdim=True)
        basis[:, j] = torch.where(size > least, rest / size.clamp_min(1e-38), 0.0)
    return basis.mT


def _explained_in_parts(blocks: Tensor, rows: Tensor, total: Total) -> Tensor:
    """`explained` from sums over columns alone: products of blocks with rows, and of rows with one another."""
    pool, c, _ = rows.shape
    whitening = _whitening(rows, total)
    step = max(1, _CHUNK // (pool * c))
    parts = []
    for some in blocks.split(step):
        products = total(some @ rows.flatten(0, 1).T).view(-1, pool, c).double()
        parts.append(torch.einsum("pcr,npc->npr", whitening, products).square().sum(2).to(rows.dtype))
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
    """The norm along the last axis."""
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
    least: float = 0.0,
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
        least: a hypermodule that explains less than this share is drawn only where none explains as much.
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
    weight = _chances(explained(blocks, rows[known], total)[:, place], power, least)
    if own is not None:
        weight = weight.masked_fill(users == own.unsqueeze(1), 0.0)
    names = chosen.expand(len(blocks), -1)
    if first is not None and first.shape[1]:
        known = rows[first.clamp_min(0)].flatten(0, 1)  # [N*F, c, d]
        pairs = blocks.repeat_interleave(first.shape[1], 0)
        chances = _chances(explained_pairs(pairs, known, total).view(first.shape), power, least)
        weight = torch.cat([chances.masked_fill(first < 0, 0.0), weight], 1)
        names = torch.cat([first.clamp_min(0), names], 1)
    sums = weight.cumsum(1)
    level = torch.rand(len(blocks), challengers, generator=generator).to(weight) * sums[:, -1:]
    picked = torch.searchsorted(sums, level, right=True).clamp_max(names.shape[1] - 1)
    return names.gather(1, picked)


def _chances(share: Tensor, power: float, least: float) -> Tensor:
    """Relative chances of hypermodules that explain these shares; never 0, for something must be drawn."""
    return torch.where(share < least, 0.0, share.pow(power)).clamp_min(1e-12)
