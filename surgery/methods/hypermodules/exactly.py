"""A bank of exactly K hypermodules for all sites: the start for joint training of a small model."""

from __future__ import annotations

from dataclasses import replace

from surgery.anatomy.plan import BankPlan, Plan, by_size, place
from surgery.core.bank import Bank
from surgery.core.settle import Settled
from surgery.errors import PlanError
from surgery.fitting.scene import Scene, key_of
from surgery.methods.hypermodules.subspaces import fit_subspaces
from surgery.methods.rows.bank import RowsBank
from surgery.methods.rows.settling import retire_rare

BLOCK, CONTEXT = (16, 16), 4
"""Where none is asked for."""


def bank_of_size(scene: Scene, plan: Plan) -> Settled:
    """Fit K hypermodules to the blocks of all sites.

    Raises:
        PlanError: where K or c do not suit the blocks, or the bank would take more bytes than the sites.
    """
    count, block = scene.target.hypermodules or 0, scene.target.block or BLOCK
    (m, n), context = block, scene.target.context or CONTEXT
    plan = _with_blocks(plan, block, context)
    if not plan.placements:
        raise PlanError(
            f"A bank needs sites that fill a block of {m}x{n}, found none; use a smaller `block`."
        )
    if context > m * n:
        raise PlanError(
            f"A context of at most {m * n} fits blocks of {m}x{n}, found {context}; lower `context`."
        )
    banks: dict[str, Bank] = {}
    for bank, share in zip(plan.banks, _divide(count, plan.banks), strict=True):
        blocks = scene.blocks(plan.in_bank(bank.key))
        rows, psi, contexts = fit_subspaces(blocks, share, context, scene.seed)
        banks[bank.key] = retire_rare(RowsBank(block, rows, psi, contexts, share))
    size = sum(part.nbytes for bank in plan.banks for part in banks[bank.key].pack(bank).values())
    whole = sum(scene.originals[key_of(p.site)].nbytes for p in plan.placements)
    if size > whole:
        raise PlanError(
            f"A bank of {count} hypermodules of {context} {m}x{n} blocks with its contexts must take at most the "
            f"sites' {whole:,} bytes, but takes {size:,}; lower `hypermodules` or `context`, or use larger blocks."
        )
    plans = tuple(banks[bank.key].planned(bank) for bank in plan.banks)
    return Settled(replace(plan, banks=plans), banks, {})


def _with_blocks(plan: Plan, block: tuple[int, int], context: int) -> Plan:
    """The same sites in blocks of the shape asked for; sites that cannot fill one are left alone."""
    fitting, small = by_size((p.site for p in plan.placements), block)
    return place(plan.members, ((site, block) for site in fitting), context, [*plan.left_alone, *small])


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
