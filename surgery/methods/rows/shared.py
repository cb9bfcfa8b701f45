"""Shared rows: sites as sums of rows that they share, as a fit puts them together from rows of any precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.anatomy.plan import BankPlan, Placement
from surgery.anatomy.sites import Site
from surgery.core.dictionary import index_dtype
from surgery.geometry.blocks import BlockGrid
from surgery.settings.names import DEFAULT_METHOD
from surgery.storage.codecs import (
    BFLOAT16,
    Encoded,
    Encoding,
    Precision,
    encode,
    encode_native,
    packed,
)

COARSE = 8  # bits of rows beside whose rounding that of contexts in bfloat16 is nothing


@dataclass(frozen=True)
class SharedRows:
    """Sites that are sums of rows which they share: a bank whose L hypermodules have c basis blocks, one part for each.

    Attributes:
        sites: N of one shape.
        grid: cuts each of them into L blocks.
        contexts: `[N, L, c]`.
        key: of the bank; by default it is named by its blocks.
        stack: the stack of layers that these rows are a tensor of.
        hard: whether every context is one 1 among zeros, so that a block is a row as it is.
        method: whose bank it is.
        coarse: whether contexts are in bfloat16 where all rows that are kept have few bits.
    """

    sites: tuple[Site, ...]
    grid: BlockGrid
    contexts: Tensor
    key: str = ""
    stack: str = ""
    hard: bool = False
    method: str = DEFAULT_METHOD
    coarse: bool = False

    @property
    def count(self) -> int:
        """c, the number of basis blocks, each a unit."""
        return self.contexts.shape[2]

    @property
    def fixed_bytes(self) -> float:
        """Bytes of alignment and contexts, of all rows; those that are left out take less."""
        sites, locations, _ = self.contexts.shape
        index = sites * locations * index_dtype(self.count if self.hard else locations).itemsize
        each = torch.bfloat16.itemsize if self.coarse else self.contexts.element_size()
        return index + (0 if self.hard else self.contexts.numel() * each)

    def assemble(
        self, number: int, parts: Sequence[Encoding | None]
    ) -> tuple[BankPlan, list[Placement], dict[str, Encoded]]:
        """A hypermodule for each location, of the rows that were kept, or rows as they are."""
        grid, dtype = self.grid, self.sites[0].dtype
        kept = [j for j, part in enumerate(parts) if part is not None]
        key = self.key or f"{grid.m}x{grid.n}-{dtype}-{number}"
        context, locations = 1 if self.hard else len(kept), len(self.sites) * grid.locations
        plan = BankPlan(key, (grid.m, grid.n), context, dtype, locations, self.stack, self.method)
        name = "single" if self.hard else "rows"
        found = {
            f"{name}.{new}": each
            for new, each in enumerate(part.encode() for part in parts if part is not None)
        }
        contexts = self.contexts[:, :, kept].flatten(0, 1).contiguous()
        psi = torch.arange(grid.locations).repeat(len(self.sites))
        if self.hard:
            psi = contexts.argmax(1).cpu()
        else:
            coarse = self.coarse and all(part is None or _is_coarse(part.precision) for part in parts)
            found["contexts"] = packed(encode(contexts, BFLOAT16)) if coarse else encode_native(contexts)
        found["psi"] = encode_native(psi.to(index_dtype(len(kept) if self.hard else grid.locations)))
        placed = [Placement(site, key, grid, i * grid.locations) for i, site in enumerate(self.sites)]
        return plan, placed, found


def _is_coarse(precision: Precision) -> bool:
    """Whether a precision is one of few bits."""
    return getattr(precision.settings, "bits", COARSE + 1) <= COARSE
