"""A bank of siblings: every block is a row that all of them share plus a sum of private rows.

Site i of N siblings is a matrix `[o, n]`; its blocks are its rows, 1 x n, and

    B[i, p] = shared[p] + sum over the rows j of site i: contexts[j, p] * rows[j]

which is the one equation of all sharing with a context of 1 for the shared row. Parts as they are stored:

shared      [o, n]  the matrix that all have in common
rows.<k>    [R, n]  private rows, by precision
contexts.<k> [R, o] what each of them counts in each row of its site
owner       [R]     the site of every private row, those of all k one after the other; absent where there are none
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from surgery.anatomy.plan import BankPlan
from surgery.core.bank import Bank, Parts, Trained
from surgery.core.dictionary import index_dtype

PIECE = 1 << 17  # elements to which all private rows are added in turn: they stay in the cache of one core


class SiblingsBank(Bank):
    """A shared matrix and products of low rank.

    Attributes:
        block: (1, n).
        sites: N.
        shared: parameter `[o, n]`.
        rows: parameter `[R, n]`.
        contexts: parameter `[R, o]`.
        owner: int64 buffer `[R]`.
        chunks: number of private rows in each part.
    """

    form: ClassVar[str] = "siblings"

    def __init__(
        self, sites: int, shared: Tensor, rows: Tensor, contexts: Tensor, owner: Tensor, chunks: Sequence[int]
    ):
        super().__init__()
        o, n = shared.shape
        if rows.shape != (len(owner), n) or contexts.shape != (len(owner), o) or sum(chunks) != len(owner):
            raise ValueError(
                f"shared {tuple(shared.shape)}, rows {tuple(rows.shape)}, contexts {tuple(contexts.shape)} and "
                f"{len(owner)} owners do not fit together"
            )
        if len(owner) and not 0 <= int(owner.min()) <= int(owner.max()) < sites:
            raise ValueError(
                f"owners must be 0 to {sites - 1}, found {int(owner.min())} to {int(owner.max())}"
            )
        self.block, self.sites, self.chunks = (1, n), sites, tuple(chunks)
        self.shared, self.rows, self.contexts = (nn.Parameter(t) for t in (shared, rows, contexts))
        self.register_buffer("owner", owner.long())
        self.owner: Tensor

    @property
    def locations(self) -> int:
        """N * o."""
        return self.sites * len(self.shared)

    def blocks(self, start: int = 0, stop: int | None = None, task: str | None = None) -> Tensor:
        """Rows `[L', n]` of locations `start` to `stop`; differentiable, never under autocast."""
        with torch.autocast(self.device.type, enabled=False):
            pieces = []
            for site, first, last in self._spans(start, self.locations if stop is None else stop):
                own = torch.nonzero(self.owner == site).flatten()
                piece = self.shared[first:last]
                pieces.append(
                    piece + self.contexts[own, first:last].T @ self.rows[own] if len(own) else piece
                )
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else self.shared[:0]

    @torch.no_grad()
    def portable_blocks(self, start: int, stop: int) -> Tensor:
        """Rows whose sums are taken in the order of the private rows, one rounded operation at a time."""
        pieces = []
        for site, first, last in self._spans(start, stop):
            own = torch.nonzero(self.owner == site).flatten()
            span, contexts = self.shared[first:last].clone(), self.contexts[own, first:last, None]
            together = len(span) if span.is_cuda else max(1, PIECE // max(1, span.shape[1]))
            for piece, part in zip(span.split(together), contexts.split(together, 1), strict=True):
                product = torch.empty_like(piece)
                for row, context in zip(self.rows[own], part, strict=True):
                    piece.add_(torch.mul(context, row, out=product))
            pieces.append(span)
        return torch.cat(pieces) if pieces else self.shared.detach()[:0]

    def _spans(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Sites, and which of their rows, that locations `start` to `stop` are."""
        o = len(self.shared)
        return [
            (site, max(start - site * o, 0), min(stop - site * o, o))
            for site in range(start // o, -(-stop // o))
            if max(start - site * o, 0) < min(stop - site * o, o)
        ]

    def trained(self) -> list[Trained]:
        """Shared and private rows, which decay, and contexts, which do not."""
        rows = tuple(p for p in (self.shared, self.rows) if p.requires_grad)
        contexts = tuple(p for p in (self.contexts,) if p.requires_grad)
        return [Trained("rows", rows), Trained("contexts", contexts, decay=False)]

    def pack(self, plan: BankPlan, like: Collection[str] = ()) -> Parts:
        """Parts as above, with as many kinds of private rows as there were."""
        parts: Parts = {"shared": self.shared.detach()}
        start = 0
        for number, count in enumerate(self.chunks):
            parts[f"rows.{number}"] = self.rows.detach()[start : start + count]
            parts[f"contexts.{number}"] = self.contexts.detach()[start : start + count]
            start += count
        return parts | ({"owner": self.owner.to(index_dtype(self.sites))} if start else {})
