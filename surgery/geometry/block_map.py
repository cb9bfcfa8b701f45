"""Block map: between a site's blocks and its weight in one copy, whatever the view and the tiling.

View and tiling are two permutations, one after the other, and edges that blocks do not fill take a third copy. Every
training step goes this way with every site, so here it is one copy: each number moves from its place in the blocks to
its place in the weight, and a gradient straight to its place among the gradients of all blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from surgery.geometry.blocks import BlockGrid, tile, untile
from surgery.geometry.views import CanonicalView, axes_of


@dataclass(frozen=True)
class BlockMap:
    """How the elements of `[L, m*n]` blocks lie in a weight whose out and in are axes of its own.

    Attributes:
        grid: of the blocks.
        factors: lengths of the axes of the blocks: those of the stack, tile rows, tile columns, m, n.
        order: the same axes as they follow one another in the weight.
        lengths: of the weight's axes, those that the view takes apart counted one by one.
        out: which of these is the matrices' out, None where they have one row.
        into: which of these is the matrices' in, None where they have one column.
        shape: of the weight.
    """

    grid: BlockGrid
    factors: tuple[int, ...]
    order: tuple[int, ...]
    lengths: tuple[int, ...]
    out: int | None
    into: int | None
    shape: tuple[int, ...]

    def read(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """Contiguous `blocks [L, m*n]` as a contiguous weight in `dtype`; a view of them where they lie alike."""
        if not self.grid.padded and blocks.dtype == dtype:
            return blocks.view(self.factors).permute(self.order).reshape(self.shape).contiguous()
        weight = blocks.new_empty(self.shape, dtype=dtype)
        for part, inside in self._pairs(blocks, weight):
            inside.copy_(part)
        return weight

    def write(self, weight: Tensor, blocks: Tensor) -> None:
        """Cut a weight into contiguous `blocks [L, m*n]`, in their dtype; what reaches over an edge becomes zero."""
        for part, inside in self._pairs(blocks, weight):
            part.copy_(inside)
        matrices = blocks.view(self.factors)
        if rest := self.grid.out % self.grid.m:
            matrices[..., -1, :, rest:, :].zero_()
        if rest := self.grid.into % self.grid.n:
            matrices[..., -1, :, rest:].zero_()

    def _pairs(self, blocks: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of blocks and weight on the same elements in the same order: of all full tiles, and of each edge."""
        grid, blocks, weight = self.grid, blocks.view(self.factors), weight.reshape(self.lengths)
        for rows, height in _pieces(grid.out, grid.m):
            for columns, width in _pieces(grid.into, grid.n):
                part = blocks[..., rows, columns, :height, :width].permute(self.order)
                inside = weight
                if self.out is not None:
                    inside = inside.narrow(self.out, rows.start * grid.m, (rows.stop - rows.start) * height)
                if self.into is not None:
                    taken = (columns.stop - columns.start) * width
                    inside = inside.narrow(self.into, columns.start * grid.n, taken)
                yield part, inside.view(part.shape)


@lru_cache(maxsize=1 << 14)
def block_map(view: CanonicalView, grid: BlockGrid) -> BlockMap | None:
    """The map of a weight of this view in this grid; None where out or in are several axes of the weight.

    Example:
        >>> block_map(CanonicalView.of("o i -> 1 o i", (4, 6)), BlockGrid(1, 4, 6, 2, 3)).order
        (0, 2, 1, 3)
    """
    left, (stack, out, into) = (axes_of(side) for side in view.pattern.split("->"))
    if len(out) > 1 or len(into) > 1:
        return None
    sizes, names, first = dict(view.sizes), [name for axis in left for name in axis], len(stack)
    place = {name: [axis] for axis, name in enumerate(stack)}
    place |= {name: [first, first + 2] for name in out} | {name: [first + 1, first + 3] for name in into}
    order = [axis for name in names for axis in place[name]]
    # Of length 1: no axis of the weight has it.
    order += [axis for axis in range(first + 4) if axis not in order]
    return BlockMap(
        grid,
        (*(sizes[name] for name in stack), *grid.tiles, grid.m, grid.n),
        tuple(order),
        tuple(sizes[name] for name in names),
        names.index(out[0]) if out else None,
        names.index(into[0]) if into else None,
        tuple(math.prod(sizes[name] for name in axis) for axis in left),
    )


def read_tensor(blocks: Tensor, view: CanonicalView, grid: BlockGrid, dtype: torch.dtype) -> Tensor:
    """Contiguous `blocks [L, m*n]` as the contiguous tensor that they were cut from, in `dtype`."""
    found = block_map(view, grid)
    if found is not None:
        return found.read(blocks, dtype)
    return view.to_tensor(untile(blocks, grid)).contiguous().to(dtype)


def write_tensor(tensor: Tensor, view: CanonicalView, grid: BlockGrid, blocks: Tensor) -> None:
    """Cut a tensor into contiguous `blocks [L, m*n]`, in their dtype."""
    found = block_map(view, grid)
    if found is not None:
        found.write(tensor, blocks)
    else:
        blocks.copy_(tile(view.to_matrices(tensor), grid))


def _pieces(size: int, step: int) -> list[tuple[slice, int]]:
    """Tiles along an axis and how much of each is filled: the full ones, and the last where it is not."""
    full, rest = divmod(size, step)
    pieces = [(slice(0, full), step)] if full else []
    return [*pieces, (slice(full, full + 1), rest)] if rest else pieces
