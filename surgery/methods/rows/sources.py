"""The blocks of a bank's sites, cut from weights that lie in files when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from surgery.anatomy.plan import Placement, torch_dtype
from surgery.disk.mapped import Place, Reader
from surgery.geometry.blocks import tile
from surgery.util.dtypes import master_dtype

_KEPT = 2  # sites whose blocks are kept: pairs of blocks come from two sites at a time


class SiteBlocks:
    """The blocks of all sites of a bank, none of them in memory.

    Args:
        placements: of the bank's sites, which follow one another.
        places: where the weights of these lie.
        reader: of the files.

    Attributes:
        dtype: in which blocks are given.
    """

    def __init__(self, placements: Sequence[Placement], places: Sequence[Place], reader: Reader):
        self.placements, self.places, self.reader = tuple(placements), tuple(places), reader
        self.dtype = master_dtype(torch_dtype(placements[0].site.dtype))
        self._starts = torch.tensor([p.start for p in placements])
        self._number: Mapping[tuple[str, str], int] = {
            (p.site.member, p.site.name): i for i, p in enumerate(placements)
        }
        self._latest: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return max(p.stop for p in self.placements)

    def __deepcopy__(self, memo: dict) -> SiteBlocks:
        return self  # nothing of it changes

    def weight(self, p: Placement) -> Tensor:
        """The weight of a site, which takes no memory until it is looked at; nobody may write to it.

        Raises:
            LoadError: where its file changed.
        """
        number = self._number[p.site.member, p.site.name]
        return self.reader.read(self.places[number], p.site.shape, torch_dtype(p.site.dtype))

    def lent(self) -> Iterator[tuple[Placement, Tensor]]:
        """The weights of all sites once more, mapped for somebody who may write to them."""
        files = Reader(place.file for place in self.places)
        for p, place in zip(self.placements, self.places, strict=True):
            yield p, files.read(place, p.site.shape, torch_dtype(p.site.dtype))

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Site by site, the number of its first block, and its blocks `[N, m*n]` in the weight's dtype."""
        for p in self.placements:
            yield p.start, self._cut(p)

    def range(self, start: int, stop: int) -> Tensor:
        """Blocks `[stop - start, m*n]` of some locations that follow one another."""
        parts = []
        for number, p in enumerate(self.placements):
            if p.start < stop and start < p.stop:
                parts.append(self._blocks(number)[max(start - p.start, 0) : stop - p.start].to(self.dtype))
        self._latest.clear()
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def take(self, index: Tensor) -> Tensor:
        """Blocks `[N, m*n]` by their numbers `[N]`."""
        sites = torch.searchsorted(self._starts, index, right=True) - 1
        first = self.placements[0].grid
        taken = torch.empty(len(index), first.m * first.n, dtype=self.dtype)
        for number in sites.unique().tolist():
            mine = (sites == number).nonzero().flatten()
            p = self.placements[number]
            taken[mine] = self._blocks(number)[index[mine] - p.start].to(self.dtype)
        return taken

    def forget(self) -> None:
        """Let go of the blocks of the latest sites."""
        self._latest.clear()

    def _blocks(self, number: int) -> Tensor:
        found = self._latest.pop(number, None)
        self._latest[number] = self._cut(self.placements[number]) if found is None else found
        while len(self._latest) > _KEPT:
            del self._latest[next(iter(self._latest))]
        return self._latest[number]

    def _cut(self, p: Placement) -> Tensor:
        return tile(p.site.view.to_matrices(self.weight(p)), p.grid)
