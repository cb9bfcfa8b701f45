"""Siblings: sites of related members that resemble one another, stored as shared rows along principal
directions.

The same location of N siblings is one hypermodule: its rows are the principal directions of the N blocks, its
contexts the blocks' coordinates. Rows come in order of energy, so later rows can be stored with less
precision or dropped (transform coding). Blocks are scaled by the root of their sensitivity first, so that an
error of a row counts the same whichever sibling it reaches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SAMPLE = 1 << 16  # weights compared to find siblings
RESEMBLANCE = 0.3  # least cosine of two siblings; unrelated tensors of any real size lie far below


def sibling_groups(tensors: Sequence[Tensor], seed: int) -> list[list[int]]:
    """Numbers of tensors of one shape that resemble one another, by connected components; single ones left
    out.

    Args:
        tensors: all of one shape.
        seed: of the sample of entries that is compared.
    """
    if len(tensors) < 2:
        return []
    numel = tensors[0].numel()
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randperm(numel, generator=generator)[:SAMPLE] if numel > SAMPLE else torch.arange(numel)
    sample = torch.stack([t.reshape(-1)[picked.to(t.device)].float().cpu() for t in tensors])
    sample = torch.nn.functional.normalize(sample, dim=1)
    # Few entries resemble one another by chance: ask for six standard deviations as well.
    alike = (sample @ sample.T).abs() > max(RESEMBLANCE, 6 / len(picked) ** 0.5)
    return [group for group in components(alike) if len(group) > 1]


def components(alike: Tensor) -> list[list[int]]:
    """Numbers that are connected, directly or through others, in a symmetric relation `[N, N]`.

    Example:
        >>> components(torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]]) > 0)
        [[0, 2], [1]]
    """
    label = torch.arange(len(alike))
    while True:
        lowest = torch.where(alike, label.unsqueeze(0), len(alike)).amin(1).minimum(label)
        if torch.equal(lowest, label):
            return [torch.nonzero(label == each).flatten().tolist() for each in label.unique()]
        label = lowest


def principal_rows(blocks: Tensor, sensitivity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and contexts that give sibling blocks back, in order of energy.

    Args:
        blocks: `[N, L, d]`, the L locations of N siblings.
        sensitivity: `[N]`, relative squared output error per squared error.

    Returns:
        `rows [N, L, d]` (row j of every location's hypermodule), `contexts [N, L, N]` with
        `blocks[i, l] = sum_j contexts[i, l, j] * rows[j, l]`, and `share [N, L, N]`: how much of the error
        power of row j reaches sibling i, in units of output error.
    """
    root = sensitivity.clamp_min(torch.finfo(torch.float32).tiny).sqrt().to(blocks.dtype)
    root = root / root.mean()
    scaled = blocks * root[:, None, None]
    gram = torch.einsum("ild,jld->lij", scaled, scaled).double()
    directions = torch.linalg.eigh(gram).eigenvectors.flip(-1)  # [L, N, N], most energy first
    rows = torch.einsum("lij,ild->jld", directions.to(blocks.dtype), scaled)
    contexts = directions.permute(1, 0, 2).to(blocks.dtype) / root[:, None, None]
    return rows, contexts, directions.permute(1, 0, 2).square().float()
