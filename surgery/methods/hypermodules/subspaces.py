"""Subspaces: a bank of K hypermodules fitted to blocks, each hypermodule a c-dimensional subspace.

Blocks are assigned to the subspace that explains most of their energy, and each subspace moves towards the
leading eigenvectors of its blocks by one step of subspace iteration; the two alternate. Contexts are the
projections, so rows stay orthonormal within a hypermodule. Everything is streamed over chunks of locations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.util import progress

CHUNK_ENTRIES = 1 << 25  # entries of the largest intermediate, `[chunk, K*c]` or `[chunk, c*d]`
ROUNDS = 15


def fit_subspaces(
    blocks: Tensor, hypermodules: int, context: int, seed: int, rounds: int = ROUNDS
) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster blocks into subspaces.

    Args:
        blocks: `[L, d]` floating point.
        hypermodules: K, at most L.
        context: c, at most d.
        seed: of the start.
        rounds: of assignment and update.

    Returns:
        `rows [K*c, d]`, orthonormal within each hypermodule, `psi [L]` and `contexts [L, c]`, such that
        `contexts[l] @ rows[psi[l]*c : (psi[l]+1)*c]` is the projection of block l.

    Example:
        >>> rows, psi, contexts = fit_subspaces(torch.randn(100, 16), 5, 2, seed=0)
        >>> rows.shape, psi.shape, contexts.shape
        (torch.Size([10, 16]), torch.Size([100]), torch.Size([100, 2]))
    """
    count, width = blocks.shape
    generator = torch.Generator().manual_seed(seed)
    first = torch.stack(
        [torch.randperm(count, generator=generator)[:hypermodules] for _ in range(context)], 1
    )
    noise = torch.randn(hypermodules, context, width, generator=generator).to(blocks)
    size = blocks.square().mean().sqrt()
    rows = _orthonormal(
        blocks[first.to(blocks.device)] + noise * (0.01 * size + torch.finfo(blocks.dtype).tiny)
    )
    with progress.task(f"Fitting {hypermodules} hypermodules to {count} blocks", rounds) as task:
        for _ in range(rounds):
            psi, explained = _assign(blocks, rows)
            rows = _orthonormal(_advance(blocks, rows, psi, explained, noise * size))
            task.advance()
    psi, _ = _assign(blocks, rows)
    contexts = torch.cat(
        [
            torch.einsum("ld,lcd->lc", blocks[part], rows[psi[part]])
            for part in _chunks(count, context * width, blocks.device)
        ]
    )
    return rows.flatten(0, 1), psi, contexts


def _assign(blocks: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The subspace that explains most of each block, and how much energy that is. # argmax_k |H_k b_l|^2"""
    k, c, width = rows.shape
    found = []
    for part in _chunks(len(blocks), k * c, blocks.device):
        energy = (blocks[part] @ rows.view(k * c, width).T).square_().view(-1, k, c).sum(2)
        found.append(energy.max(1))
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])


def _advance(blocks: Tensor, rows: Tensor, psi: Tensor, explained: Tensor, noise: Tensor) -> Tensor:
    """One step of subspace iteration, `H_k <- sum_l (H_k b_l) b_l^T`; unused ones take the worst blocks."""
    k, c, width = rows.shape
    moved = torch.zeros_like(rows)
    for part in _chunks(len(blocks), c * width, blocks.device):
        z = torch.einsum("ld,lcd->lc", blocks[part], rows[psi[part]])
        moved.index_add_(0, psi[part], z.unsqueeze(2) * blocks[part].unsqueeze(1))
    unused = torch.nonzero(torch.bincount(psi, minlength=k) == 0).flatten()
    worst = (blocks.square().sum(1) - explained).topk(min(len(unused), len(blocks))).indices
    moved[unused[: len(worst)]] = blocks[worst].unsqueeze(1) + 0.01 * noise[unused[: len(worst)]]
    # A subspace with fewer blocks than c would lose its rank: a trace of noise keeps its other directions.
    return moved + 1e-6 * moved.norm(dim=2, keepdim=True).amax(
        1, keepdim=True
    ) * torch.nn.functional.normalize(noise, dim=2)


def _orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows `[K, c, d]` that span the same subspaces."""
    return torch.linalg.qr(rows.transpose(1, 2)).Q.transpose(1, 2).contiguous()


def _chunks(count: int, width: int, device: torch.device) -> tuple[Tensor, ...]:
    return torch.arange(count, device=device).split(max(1, CHUNK_ENTRIES // max(width, 1)))
