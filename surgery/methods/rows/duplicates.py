"""Duplicates: which of many blocks are equal, as they are or up to a factor, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from surgery.methods.rows.sources import SiteBlocks

_SAME_FINGERPRINT = 4  # different blocks of one fingerprint that `duplicates` tells apart
_PIECE = 1 << 14  # blocks that are looked at in one go
_PROBED = 8  # of the elements that a fingerprint looks at, those that make a key


def distinct(blocks: Tensor, context: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Every distinct block of some as a row, and codes that give all of them back bit for bit.

    Blocks equal up to a factor share a row where the factor gives every value back bit for bit.

    Args:
        blocks: `[L, d]` floating point.
        context: c, how many coefficients a code has; all but the first are 0.

    Returns:
        `rows [S, d]`, which are `blocks` itself where no two are equal; `psi [L]`, the row of each block; and
        `contexts [L, c]`, its factor.
    """
    representative, factor = duplicates(blocks)
    rows, psi = torch.unique(representative, return_inverse=True)
    contexts = blocks.new_zeros(len(blocks), context)
    contexts[:, 0] = factor
    return blocks if len(rows) == len(blocks) else blocks[rows], psi, contexts


def duplicates(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For each block the first one that it equals up to a factor, bit for bit, and that factor.

    Args:
        blocks: `[L, d]` floating point.

    Returns:
        `representative [L]` (own number where nothing equals it) and `factor [L]`, such that
        `factor[l] * blocks[representative[l]] == blocks[l]` exactly.
    """
    if not len(blocks):
        return torch.arange(0, device=blocks.device), torch.ones(0, dtype=blocks.dtype, device=blocks.device)
    return _match(*_fingerprints(blocks), lambda index: blocks[index])


def duplicates_among(blocks: SiteBlocks) -> tuple[Tensor, Tensor] | None:
    """What `duplicates` says of blocks that are cut from weights when they are needed; None where no two are equal.

    A key of 64 bits is kept of each block. Blocks whose fingerprints are equal have one key, and whoever has a key of
    its own equals none: only the others are looked at whole.

    Args:
        blocks: of all sites of a bank.
    """
    keys = np.empty(len(blocks), dtype=np.int64)
    for start, site in blocks.pieces():
        for part in site.split(_PIECE):
            keys[start : start + len(part)] = _keys(part, blocks.dtype).numpy()
            start += len(part)
    some = torch.from_numpy(_repeated(keys).nonzero()[0])
    del keys
    if not len(some):
        return None
    pieces = [_fingerprints(blocks.take(index)) for index in some.split(_PIECE)]
    scale, fingerprint = (torch.cat(each) for each in zip(*pieces, strict=True))
    first, factor = _match(scale, fingerprint, lambda index: blocks.take(some[index]))
    if bool((first == torch.arange(len(first))).all()):
        return None
    representative, factors = torch.arange(len(blocks)), torch.ones(len(blocks), dtype=blocks.dtype)
    representative[some], factors[some] = some[first], factor
    return representative, factors


def _match(scale: Tensor, fingerprint: Tensor, take: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """`duplicates` of blocks with these scales and fingerprints, which are taken by their numbers."""
    count = len(fingerprint)
    representative = torch.arange(count, device=scale.device)
    factor = torch.ones(count, dtype=scale.dtype, device=scale.device)
    bucket = torch.unique(fingerprint, return_inverse=True)[1]
    buckets = int(bucket.max()) + 1
    left = representative.clone()
    # Different blocks may share a coarse fingerprint; those that are not the first one's try the next.
    for _ in range(_SAME_FINGERPRINT):
        first = torch.full((buckets,), count, device=scale.device)
        first.scatter_reduce_(0, bucket[left], left, "amin")
        leader = first[bucket[left]]
        ratio = torch.where(scale[leader] != 0, scale[left] / scale[leader], torch.zeros_like(scale[left]))
        both = ((scale[left] == 0) & (scale[leader] == 0)).squeeze(1)
        ratio = torch.where(both, torch.ones_like(ratio.squeeze(1)), ratio.squeeze(1))
        same = _equal_bits(take, leader, ratio, left)
        representative[left[same]], factor[left[same]] = leader[same], ratio[same]
        left = left[~same]
        if not len(left):
            break
    return representative, factor


def _equal_bits(take: Callable[[Tensor], Tensor], leader: Tensor, ratio: Tensor, blocks_of: Tensor) -> Tensor:
    """Whether `ratio` times the leader's block is that of `blocks_of`, bit for bit: `[N]`."""
    same = torch.empty(len(leader), dtype=torch.bool, device=ratio.device)
    bits = torch.int64 if ratio.dtype == torch.float64 else torch.int32
    for part in torch.arange(len(leader), device=ratio.device).split(_PIECE):
        product = take(leader[part]) * ratio[part].unsqueeze(1)
        found = take(blocks_of[part])
        same[part] = (product.view(bits) == found.view(bits)).all(1)  # bits: 0.0 is not -0.0
    return same


def _repeated(keys: np.ndarray) -> np.ndarray:
    """Which of many keys occur more than once `[N]`, found an eighth at a time to bound memory."""
    found = np.zeros(len(keys), dtype=bool)
    last = keys.view(np.uint8)[::8] & 7  # of either end: which bits these are is all the same
    for low in range(8):
        mine = last == low
        some = np.sort(keys[mine])
        twice = np.unique(some[1:][some[1:] == some[:-1]])
        if len(twice):
            found[mine] = np.isin(keys[mine], twice)
    return found


def _keys(blocks: Tensor, master: torch.dtype) -> Tensor:
    """A key for each block `[N]`, int64; blocks with one fingerprint have one key.

    Args:
        blocks: `[N, d]`, in the dtype of the weights.
        master: dtype in which fingerprints are taken.
    """
    bits = blocks.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[blocks.element_size()])
    # As whole numbers floats of one sign are in the order of their magnitudes; and comparing these is much faster.
    high, low = (
        each.amax(1).clamp_min(0).view(blocks.dtype) for each in (bits, bits ^ torch.iinfo(bits.dtype).min)
    )
    scale = torch.where(high > low, high, -low)
    tie = ((high == low) & (high != 0)).nonzero().flatten()
    if len(tie):  # the first of the largest magnitude counts
        some = blocks[tie]
        scale[tie] = some.gather(1, some.abs().argmax(1, keepdim=True)).squeeze(1)
    probe, factors = _probe(blocks.shape[1])
    few = torch.linspace(0, len(probe) - 1, min(len(probe), _PROBED)).long()
    scale = scale.to(master).unsqueeze(1)
    some = blocks[:, probe[few]].to(master)
    direction = torch.where(scale != 0, some / scale, some)
    return ((direction.float() * 1024).round_().to(torch.int32).long() * factors[few]).sum(1)


def _probe(width: int) -> tuple[Tensor, Tensor]:
    """The elements of a block that a fingerprint looks at, and an odd factor for each, and for their sum."""
    probe = torch.linspace(0, width - 1, min(width, 32)).long()
    factors = torch.randint(1 << 62, (len(probe) + 1,), generator=torch.Generator().manual_seed(0)) * 2 + 1
    return probe, factors


def _fingerprints(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The signed largest value of each block `[L, 1]`, and a coarse fingerprint of its direction `[L]`, int64.

    So coarse that a factor's rounding rarely separates two blocks; piece by piece, as large banks have no room
    for a second copy. Of several numbers a sum remains, multiplied by odd factors so that it wraps around: two that
    differ have the same one by a chance of 2^-60 or so, and blocks are compared in any case.
    """
    probe, factors = (each.to(blocks.device) for each in _probe(blocks.shape[1]))
    scales, fingerprints = [], []
    for part in blocks.split(_PIECE):
        scale = part.gather(1, part.abs().argmax(1, keepdim=True))
        direction = torch.where(scale != 0, part / scale, part)
        coarse = (direction[:, probe].float() * 1024).round_().to(torch.int32)
        total = (direction.sum(1, keepdim=True).float() * 64).round_().to(torch.int32)
        scales.append(scale)
        fingerprints.append((torch.cat([coarse, total], 1).long() * factors).sum(1))
    return torch.cat(scales), torch.cat(fingerprints)
