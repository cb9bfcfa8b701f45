"""A bank of exactly K hypermodules for all sites: the start for joint training of a small model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from surgery.anatomy.plan import BankPlan, Plan, place, too_small
from surgery.core.generation import to_blocks
from surgery.errors import PlanError
from surgery.methods.hypermodules.subspaces import fit_subspaces
from surgery.methods.rows.bank import RowsBank
from surgery.methods.rows.settling import retire_rare
from surgery.storage.codecs import encode_native
from surgery.storage.stored import Stored, bank_tensors, deduplicate


@dataclass(frozen=True)
class BankRequest:
    """What a bank of fixed size was asked to be."""

    hypermodules: int
    block: tuple[int, int]
    context: int
    seed: int


def fixed_bank(
    plan: Plan,
    originals: Mapping[str, Mapping[str, Tensor]],
    ties: Mapping[str, Mapping[str, tuple[str, ...]]],
    request: BankRequest,
) -> Stored:
    """Fit K hypermodules to the blocks of all sites; everything else stays as it is.

    Raises:
        PlanError: where K or c do not suit the blocks, or the bank would take more bytes than the sites.
    """
    plan = _with_blocks(plan, request)
    m, n = request.block
    if not plan.placements:
        raise PlanError(
            f"A bank needs sites that fill a block of {m}x{n}, found none; use a smaller `block`."
        )
    if request.context > m * n:
        raise PlanError(
            f"A context of at most {m * n} fits blocks of {m}x{n}, found {request.context}; lower `context`."
        )
    banks: dict[str, RowsBank] = {}
    shares = _divide(request.hypermodules, plan.banks)
    for bank_plan, share in zip(plan.banks, shares, strict=True):
        blocks = torch.cat(
            [
                to_blocks(originals[p.site.member][p.site.name], p)
                for p in plan.placements
                if p.bank == bank_plan.key
            ]
        )
        rows, psi, contexts = fit_subspaces(blocks, share, request.context, request.seed)
        banks[bank_plan.key] = retire_rare(RowsBank(request.block, rows, psi, contexts, share))
    tensors = {key: encode_native(t) for b in plan.banks for key, t in bank_tensors(b, banks[b.key]).items()}
    generated = {(p.site.member, p.site.name) for p in plan.placements}
    size = sum(t.nbytes for t in tensors.values())
    whole = sum(originals[m][s].numel() * originals[m][s].element_size() for m, s in generated)
    if size > whole:
        raise PlanError(
            f"A bank of {request.hypermodules} hypermodules of {request.context} {m}x{n} blocks with its "
            f"contexts must take at most the sites' {whole:,} bytes, but takes {size:,}; lower "
            "`hypermodules` or `context`, or use larger blocks."
        )
    tensors |= {
        f"plain/{name}/{key}": encode_native(t)
        for name, state in originals.items()
        for key, t in state.items()
        if (name, key) not in generated
    }
    plans = tuple(replace(b, context=banks[b.key].context) for b in plan.banks)
    return deduplicate(Stored(replace(plan, banks=plans), tensors, ties=ties))


def _with_blocks(plan: Plan, request: BankRequest) -> Plan:
    """The same sites in blocks of the shape asked for; sites that cannot fill one are left alone."""
    m, n = request.block
    sites = [p.site for p in plan.placements]
    fitting = [site for site in sites if site.view.shape[1] >= m and site.view.shape[2] >= n]
    small = [too_small(site, request.block) for site in sites if site not in fitting]
    return place(
        plan.members, ((site, request.block) for site in fitting), request.context, [*plan.left_alone, *small]
    )


def _divide(total: int, banks: tuple[BankPlan, ...]) -> list[int]:
    """K over the banks in proportion to their locations, at least one each."""
    locations = sum(bank.locations for bank in banks)
    if not len(banks) <= total <= locations:
        raise PlanError(
            f"`hypermodules` must be {len(banks)} to {locations} for these sites' {locations} blocks, "
            f"found {total}."
        )
    shares = [max(1, total * bank.locations // locations) for bank in banks]
    while (missing := total - sum(shares)) != 0:  # what rounding left, to or from whom it suits best
        wrong = [
            total * bank.locations / locations - share for bank, share in zip(banks, shares, strict=True)
        ]
        able = [i for i, b in enumerate(banks) if (shares[i] < b.locations if missing > 0 else shares[i] > 1)]
        shares[max(able, key=lambda i: wrong[i] * missing)] += 1 if missing > 0 else -1
    return shares
