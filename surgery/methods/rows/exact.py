"""Exact start: every distinct block of some tensors as a row, so that a bank generates its originals bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.methods.rows.bank import RowsBank

_SAME_FINGERPRINT = 4  # different blocks of one fingerprint that `duplicates` tells apart


def exact_bank(blocks: Tensor, block: tuple[int, int], context: int = 1) -> RowsBank:
    """The lossless start: every distinct block is a single row; identical blocks share one.

    Blocks equal up to a factor share a row too where the factor gives every value back bit for bit.

    Args:
        blocks: `[L, m*n]`, float32 or float64; the bank takes it over where no two are equal.
        block: (m, n).
        context: c that later hypermodules will have.
    """
    representative, factor = duplicates(blocks)
    rows, psi = torch.unique(representative, return_inverse=True)
    contexts = blocks.new_zeros(len(blocks), context)
    contexts[:, 0] = factor
    kept = blocks if len(rows) == len(blocks) else blocks[rows]
    return RowsBank(block, kept, psi, contexts, hypermodules=0)


def duplicates(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For each block the first one that it equals up to a factor, bit for bit, and that factor.

    Args:
        blocks: `[L, d]` floating point.

    Returns:
        `representative [L]` (own number where nothing equals it) and `factor [L]`, such that
        `factor[l] * blocks[representative[l]] == blocks[l]` exactly.
    """
    count = len(blocks)
    representative = torch.arange(count, device=blocks.device)
    factor = torch.ones(count, dtype=blocks.dtype, device=blocks.device)
    if not count:
        return representative, factor
    scale, fingerprint = _fingerprints(blocks)
    bucket = torch.unique(fingerprint, return_inverse=True)[1]
    buckets = int(bucket.max()) + 1
    left = representative.clone()
    # Different blocks may share a coarse fingerprint; those that are not the first one's try the next.
    for _ in range(_SAME_FINGERPRINT):
        first = torch.full((buckets,), count, device=blocks.device)
        first.scatter_reduce_(0, bucket[left], left, "amin")
        leader = first[bucket[left]]
        ratio = torch.where(scale[leader] != 0, scale[left] / scale[leader], torch.zeros_like(scale[left]))
        both = ((scale[left] == 0) & (scale[leader] == 0)).squeeze(1)
        ratio = torch.where(both, torch.ones_like(ratio.squeeze(1)), ratio.squeeze(1))
        same = _equal_bits(blocks, leader, ratio, left)
        representative[left[same]], factor[left[same]] = leader[same], ratio[same]
        left = left[~same]
        if not len(left):
            break
    return representative, factor


def _equal_bits(blocks: Tensor, leader: Tensor, ratio: Tensor, blocks_of: Tensor) -> Tensor:
    """Whether `ratio * blocks[leader]` is `blocks[blocks_of]` bit for bit: `[N]`."""
    same = torch.empty(len(leader), dtype=torch.bool, device=blocks.device)
    bits = torch.int64 if blocks.dtype == torch.float64 else torch.int32
    for part in torch.arange(len(leader), device=blocks.device).split(1 << 14):
        product = blocks[leader[part]] * ratio[part].unsqueeze(1)
        found = blocks[blocks_of[part]]
        same[part] = (product.view(bits) == found.view(bits)).all(1)  # bits: 0.0 is not -0.0
    return same


def _fingerprints(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The signed largest value of each block `[L, 1]`, and a coarse fingerprint of its direction `[L]`, int64.

    So coarse that a factor's rounding rarely separates two blocks; piece by piece, as large banks have no room
    for a second copy. Of several numbers a sum remains, multiplied by odd factors so that it wraps around: two that
    differ have the same one by a chance of 2^-60 or so, and blocks are compared in any case.
    """
    probe = torch.linspace(0, blocks.shape[1] - 1, min(blocks.shape[1], 32), device=blocks.device).long()
    factors = torch.randint(1 << 62, (len(probe) + 1,), generator=torch.Generator().manual_seed(0)) * 2 + 1
    factors, scales, fingerprints = factors.to(blocks.device), [], []
    for part in blocks.split(1 << 14):
        scale = part.gather(1, part.abs().argmax(1, keepdim=True))
        direction = torch.where(scale != 0, part / scale, part)
        coarse = (direction[:, probe].float() * 1024).round_().to(torch.int32)
        total = (direction.sum(1, keepdim=True).float() * 64).round_().to(torch.int32)
        scales.append(scale)
        fingerprints.append((torch.cat([coarse, total], 1).long() * factors).sum(1))
    return torch.cat(scales), torch.cat(fingerprints)
