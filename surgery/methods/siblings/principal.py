"""Principal rows: the blocks of siblings as sums of rows along their principal directions.

The same location of N siblings is one hypermodule: its rows are the principal directions of the N blocks, its
contexts the blocks' coordinates. Rows come in order of energy, so later rows can be stored with less
precision or dropped (transform coding). Blocks are scaled by the root of their sensitivity first, so that an
error of a row counts the same whichever sibling it reaches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.disk.aside import empty_aside, put_aside


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
    scaled = torch.mul(blocks, root[:, None, None], out=empty_aside(tuple(blocks.shape), blocks))
    gram = torch.einsum("ild,jld->lij", scaled, scaled).double()
    directions = torch.linalg.eigh(gram).eigenvectors.flip(-1)  # [L, N, N], most energy first
    rows = put_aside(torch.einsum("lij,ild->jld", directions.to(blocks.dtype), scaled))
    contexts = directions.permute(1, 0, 2).to(blocks.dtype) / root[:, None, None]
    return rows, contexts, directions.permute(1, 0, 2).square().float()
