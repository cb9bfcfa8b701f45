"""Canonical view <-> equal m x n blocks, exactly invertible; edges that do not fill a block are padded with zeros."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class BlockGrid:
    """The tiling of one canonical view `[S, out, in]` by m x n blocks.

    Locations are numbered stack first, then tile row, then tile column.
    """

    stack: int
    out: int
    into: int
    m: int
    n: int

    @property
    def tiles(self) -> tuple[int, int]:
        """Tile rows and tile columns of one matrix."""
        return -(-self.out // self.m), -(-self.into // self.n)

    @property
    def locations(self) -> int:
        """Number of blocks."""
        rows, columns = self.tiles
        return self.stack * rows * columns

    @property
    def padded(self) -> bool:
        """Whether any block reaches over the edge of its matrix."""
        return self.out % self.m != 0 or self.into % self.n != 0


def tile(matrices: Tensor, grid: BlockGrid) -> Tensor:
    """Cut `[S, out, in]` into `[L, m*n]` blocks."""
    rows, columns = grid.tiles
    if grid.padded:
        matrices = F.pad(matrices, (0, columns * grid.n - grid.into, 0, rows * grid.m - grid.out))
    blocks = matrices.reshape(grid.stack, rows, grid.m, columns, grid.n).transpose(2, 3)
    return blocks.reshape(grid.locations, grid.m * grid.n)


def untile(blocks: Tensor, grid: BlockGrid) -> Tensor:
    """The exact inverse of `tile`: `[L, m*n]` back to `[S, out, in]`; what lies in the padding is dropped."""
    rows, columns = grid.tiles
    matrices = blocks.reshape(grid.stack, rows, columns, grid.m, grid.n).transpose(2, 3)
    matrices = matrices.reshape(grid.stack, rows * grid.m, columns * grid.n)
    return matrices[:, : grid.out, : grid.into] if grid.padded else matrices
