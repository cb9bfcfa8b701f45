"""Settling rows: which sites are worth generating from rows and codes, and which are plain.

A hypermodule that generates at most c distinct blocks is replaced by these; a site whose share
of its bank's bytes (rows divided among their users, contexts, index) is no less than its own plain bytes
becomes a plain tensor. What is written is therefore never larger than the members.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from surgery.anatomy.plan import Placement, follow_up, locations_of
from surgery.core.dictionary import index_dtype
from surgery.methods.rows.duplicates import distinct, duplicates

if TYPE_CHECKING:
    from surgery.methods.rows.bank import RowsBank


@torch.no_grad()
def settle_rows(
    bank: RowsBank, placements: Sequence[Placement], itemsize: int
) -> tuple[RowsBank, list[Placement]]:
    """Reduce a bank to the placements that it stores in fewer bytes; returns it and these, moved.

    Args:
        bank: any.
        placements: of all its sites.
        itemsize: bytes of an element of the members.
    """
    settled = retire_rare(bank)
    kept = _worth_generating(settled, list(placements), itemsize)
    return _select(settled, kept) if kept else (settled, [])


def count_parameters(bank: RowsBank, placements: Sequence[Placement]) -> Tensor:
    """Parameters that each location takes after collapse `[L]`, float64.

    A hypermodule that at most c locations use counts as the blocks that it generates, without what pads them:
    `(L - Lo)*c + K*c*m*n + Lo*m*n`. Coefficients that stay 1 do not count, what else is a location's own does.
    """
    psi, c, width = bank.psi.cpu(), bank.context, bank.width
    uses = bank.uses.cpu()
    limit = torch.ones_like(uses)
    limit[: bank.hypermodules] = c
    own = bank.own_elements
    many = (uses > limit) & (torch.arange(len(uses)) < bank.hypermodules)
    part = torch.minimum(uses, limit).double() * width / uses.clamp_min(1) + own * many
    filled = torch.ones(bank.locations, dtype=torch.float64)
    for p in placements:
        filled[p.start : p.stop] = math.prod(p.site.shape) / (p.grid.locations * width)
    return torch.where(many[psi], part[psi], part[psi] * filled)


def retire_rare(bank: RowsBank) -> RowsBank:
    """Replace hypermodules that generate at most c distinct blocks by single rows, one for each of these.

    Those that fewer than c locations use are among them, and all that were opened and not trained.
    """
    psi, c, count = bank.psi, bank.context, bank.hypermodules
    if not bank.packable:  # locations have more of their own: as a rule no two blocks are equal
        return bank.plain(*distinct(bank.settled_blocks()), hypermodules=0)
    if not count:
        return bank
    settled = bank.settled_blocks()
    # Blocks equal up to a factor are one.
    pairs = torch.unique(torch.stack([psi, duplicates(settled)[0]]), dim=1)
    kept = torch.bincount(pairs[0][pairs[0] < count], minlength=count) > c
    if bool(kept.all()):
        return bank
    number = torch.cumsum(kept, 0) - 1
    shared = (psi < count) & kept[psi.clamp_max(count - 1)]
    blocks = settled[~shared]
    representative, factor = duplicates(blocks)
    single_rows, single = torch.unique(representative, return_inverse=True)
    rows = torch.cat([bank.basis[kept].flatten(0, 1), blocks[single_rows]])
    contexts = bank.coefficients.detach().clone()
    contexts[~shared] = 0
    contexts[~shared, 0] = factor
    new_psi = torch.empty_like(psi)
    new_psi[shared] = number[psi[shared]]
    new_psi[~shared] = single + int(kept.sum())
    return bank.plain(rows, new_psi, contexts, int(kept.sum()))


def _worth_generating(bank: RowsBank, placements: list[Placement], itemsize: int) -> list[Placement]:
    """Drop sites that cost more in the bank than plain, again and again until every one left pays.

    Single rows take the members' `itemsize`; rows that are summed, contexts and factors keep the master
    dtype.
    """
    kept, previous = list(placements), -1
    count, master = bank.hypermodules, bank.dtype.itemsize
    width, shared = bank.width, bank.psi < count
    factors = bool((bank.contexts[~shared, 0] != 1).any())
    rows = torch.where(shared, float(bank.context * width * master), float(width * itemsize))
    codes = torch.where(shared, float(bank.context * master), float(master * factors))
    while kept and len(kept) != previous:
        previous = len(kept)
        used = torch.cat([bank.psi[p.start : p.stop] for p in kept])
        uses = torch.bincount(used, minlength=count + bank.singles).clamp_min(1)
        index_bytes = index_dtype(int((uses[used].double() ** -1).sum().round())).itemsize
        cost = rows.double() / uses[bank.psi] + codes + index_bytes
        kept = [p for p in kept if float(cost[p.start : p.stop].sum()) < _numel(p) * itemsize]
    return kept


def _select(bank: RowsBank, placements: list[Placement]) -> tuple[RowsBank, list[Placement]]:
    """The bank of these placements alone, rows that they do not use removed, with the placements moved."""
    chosen = locations_of(placements).to(bank.psi.device)
    psi, c = bank.psi[chosen], bank.context
    used, compact = torch.unique(psi, return_inverse=True)
    hyper, single = used[used < bank.hypermodules], used[used >= bank.hypermodules]
    rows = bank.row_values(single - bank.hypermodules)
    if len(hyper):
        basis = (hyper.unsqueeze(1) * c + torch.arange(c, device=psi.device)).reshape(-1)
        rows = torch.cat([bank.rows.detach()[basis], rows])
    contexts = bank.coefficients.detach()[chosen]
    if not len(hyper):  # single rows need one column only
        contexts = contexts[:, :1]
    return bank.plain(rows, compact, contexts.clone(), len(hyper)), follow_up(placements)


def _numel(p: Placement) -> int:
    return p.grid.stack * p.grid.out * p.grid.into
