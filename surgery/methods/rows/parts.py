"""Stored parts of rows and codes: what belongs together, how much each location takes, and what is wrong with them.

rows.<j>  [K, m*n]  basis block j of every hypermodule; each j may have its own precision
single    [S, m*n]  single rows; or, where each may have its own precision, single.<s> [1, m*n]
psi       [L]       alignment, in the smallest integer type that holds it
contexts  [L', c]   of the locations on hypermodules
factor    [L'']     of the locations on single rows; absent where all are 1
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from surgery.anatomy.plan import BankPlan, Placement, follow_up, locations_of, torch_dtype
from surgery.core.dictionary import index_dtype
from surgery.methods.rows.bank import RowsBank
from surgery.storage.codecs import Encoded, decode, encode_native, take_rows
from surgery.util.dtypes import master_dtype

INDICES = (torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64)
"""What an alignment is stored in."""


def unpack(plan: BankPlan, parts: Mapping[str, Tensor]) -> RowsBank:
    """The inverse of `RowsBank.pack`, of decoded parts.

    Raises:
        KeyError: where a part is missing.
    """
    master = master_dtype(torch_dtype(plan.dtype))
    bases = [parts[f"rows.{j}"].to(master) for j in range(sum(part.startswith("rows.") for part in parts))]
    singles = [parts[part].to(master) for part in parts_of_singles(parts)]
    rows = ([torch.stack(bases, 1).flatten(0, 1)] if bases else []) + singles
    # A fit on a device measures with rows that lie there; small tensors may lie on the CPU.
    device = rows[0].device
    psi = parts["psi"].long().to(device)
    k, c = (len(bases[0]), len(bases)) if bases else (0, 1)
    shared = psi < k
    contexts = torch.zeros(len(psi), c, dtype=master, device=device)
    if k:
        contexts[shared] = parts["contexts"].to(device, master)
    if singles:
        contexts[~shared, 0] = parts["factor"].to(device, master) if "factor" in parts else 1
    return RowsBank(plan.block, torch.cat(rows), psi, contexts, k)


def parts_of_singles(parts: Collection[str]) -> list[str]:
    """The names of the parts of a bank that hold its single rows, in their order.

    Example:
        >>> parts_of_singles(["single.1", "psi", "single.0"])
        ['single.0', 'single.1']
    """
    if "single" in parts:
        return ["single"]
    return [f"single.{s}" for s in range(sum(part.startswith("single.") for part in parts))]


def count_hypermodules(parts: Mapping[str, Encoded]) -> int:
    """K of a stored bank."""
    return parts["rows.0"].shape[0] if "rows.0" in parts else 0


def location_bytes(parts: Mapping[str, Encoded]) -> Tensor:
    """Bytes that each location takes of stored parts `[L]`, float64: its part of the rows and its own codes."""
    psi = decode(parts["psi"]).long().cpu()
    rows, hypermodules = [part for part in parts if part.startswith("rows.")], count_hypermodules(parts)
    size = [sum(parts[part].nbytes for part in rows) / max(hypermodules, 1)] * hypermodules
    for part in parts_of_singles(parts):
        count = parts[part].shape[0]
        size += [parts[part].nbytes / max(count, 1)] * count
    uses = torch.bincount(psi, minlength=len(size)).clamp_min(1)
    found = (torch.tensor(size, dtype=torch.float64) / uses)[psi]
    found += parts["psi"].nbytes / max(len(psi), 1)
    shared = psi < hypermodules
    for part, mine in (("contexts", shared), ("factor", ~shared)):
        if part in parts and bool(mine.any()):
            found += mine * (parts[part].nbytes / int(mine.sum()))
    return found


def wrong_parts(bank: BankPlan, parts: Mapping[str, Encoded]) -> list[str]:
    """What cannot be true of the parts of a bank that somebody else may have written."""
    width, c = bank.block[0] * bank.block[1], bank.context
    rows = [part for part in parts if part.startswith("rows.")]
    count = parts[rows[0]].shape[0] if rows and parts[rows[0]].shape else 0
    if "psi" not in parts or parts["psi"].shape != (bank.locations,) or parts["psi"].dtype not in INDICES:
        return [
            f"bank {bank.key} must have an alignment of {bank.locations:,} whole numbers, but has "
            f"{parts['psi'].shape if 'psi' in parts else 'none'}"
        ]
    psi = decode(parts["psi"]).long()
    single = parts_of_singles(parts)
    apart = single != ["single"]  # each row by itself
    singles = len(single) if apart else parts["single"].shape[0] if parts["single"].shape else 0
    shared = int((psi < count).sum())
    need: dict[str, tuple[int, ...]] = {f"rows.{j}": (count, width) for j in range(c if rows else 0)}
    need |= {"contexts": (shared, c)} if rows else {}
    need |= {part: (1 if apart else singles, width) for part in single} if singles else {}
    need |= {"factor": (bank.locations - shared,)} if "factor" in parts else {}
    bad = [
        f"bank {bank.key} must have {part} of {shape}, but has "
        f"{parts[part].shape if part in parts else 'none'}"
        for part, shape in need.items()
        if part not in parts or parts[part].shape != shape
    ]
    bad += [f"bank {bank.key} has {part}, which nothing uses" for part in sorted({*parts} - {*need, "psi"})]
    if len(psi) and (int(psi.min()) < 0 or int(psi.max()) >= count + singles):
        bad.append(
            f"bank {bank.key} must have alignments of 0 to {count + singles - 1}, but has "
            f"{int(psi.min())} to {int(psi.max())}"
        )
    for part in need:
        held = parts[part].parts.get("") if part in parts else None
        if held is not None and not bool(torch.isfinite(held).all()):
            bad.append(f"bank {bank.key} has NaN or infinite values in {part}")
    return bad


def alignment(parts: Mapping[str, Encoded]) -> tuple[Tensor, int]:
    """What each location draws on `[L]`, hypermodules first, and how many hypermodules there are."""
    return decode(parts["psi"]).long(), count_hypermodules(parts)


def restrict(
    plan: BankPlan, placements: Sequence[Placement], parts: Mapping[str, Encoded]
) -> tuple[BankPlan, list[Placement], dict[str, Encoded]]:
    """One bank with the locations of some placements and the rows that these use."""
    chosen = locations_of(placements)
    psi, count = alignment(parts)
    used, compact = torch.unique(psi[chosen], return_inverse=True)
    hyper, single = used[used < count], used[used >= count] - count
    shared = psi < count
    # Among its own kind.
    number = torch.where(shared, shared.long().cumsum(0), (~shared).long().cumsum(0)) - 1
    of_hyper, of_single = number[chosen[shared[chosen]]], number[chosen[~shared[chosen]]]
    taken: dict[str, Encoded] = {}
    for part, encoded in parts.items():
        if part.startswith("single."):  # one row: kept under the number that it has among those left
            place = (single == int(part.partition(".")[2])).nonzero()
            taken |= {f"single.{int(s)}": encoded for s in place}
        elif part == "psi":
            taken[part] = encode_native(compact.to(index_dtype(len(used))))
        elif part == "factor":
            taken[part] = encode_native(decode(encoded)[of_single])
        else:
            taken[part] = take_rows(encoded, {"single": single, "contexts": of_hyper}.get(part, hyper))
    gone = ([] if len(hyper) else ["rows", "contexts"]) + ([] if len(single) else ["single", "factor"])
    taken = {part: each for part, each in taken.items() if part.partition(".")[0] not in gone}
    context = plan.context if len(hyper) else 1
    return replace(plan, locations=len(chosen), context=context), follow_up(placements), taken
