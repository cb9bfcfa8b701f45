"""Makes a stored joint model smaller without changing what it decodes to.

`restrict` keeps some members only. `trim` undoes what does not pay once names and headers are counted: an
encoding of a tiny tensor that takes more room than the tensor, or a bank that takes more than the weights it
generates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from surgery.anatomy.plan import BankPlan, Placement, torch_dtype
from surgery.core.dictionary import index_dtype
from surgery.core.generation import to_weight
from surgery.storage.codecs import Encoded, decode, encode_native, take_rows
from surgery.storage.states import build_banks
from surgery.storage.stored import Stored

ENTRY = 64  # bytes of one tensor's entry in a header, beyond its name
PLACEMENT = 16  # bytes of one placement in the manifest, beyond its name
BANK = 256  # bytes of a bank's and its views' entries in the manifest, at least


def restrict(stored: Stored, members: Iterable[str]) -> Stored:
    """The stored form of some members alone; rows and locations that only others use are left out.

    Args:
        stored: of a joint model.
        members: names to keep, in the order that they shall have.
    """
    names = tuple(members)
    tensors, aliases = _restrict_plain(stored, names)
    banks: list[BankPlan] = []
    placements: list[Placement] = []
    for bank in stored.plan.banks:
        mine = [p for name in names for p in stored.plan.of(name) if p.bank == bank.key]
        if mine:
            smaller, moved, parts = _restrict_bank(stored, bank, mine)
            banks.append(smaller)
            placements += moved
            tensors.update(parts)
    place = {(p.site.member, p.site.name): i for i, p in enumerate(stored.plan.placements)}
    placements.sort(key=lambda p: (names.index(p.site.member), place[p.site.member, p.site.name]))
    left_alone = tuple(entry for entry in stored.plan.left_alone if entry.member in names)
    plan = replace(
        stored.plan, members=names, banks=tuple(banks), placements=tuple(placements), left_alone=left_alone
    )
    ties = {name: stored.ties[name] for name in names if name in stored.ties}
    return Stored(plan, tensors, aliases, ties, {n: stored.extra[n] for n in names if n in stored.extra})


def on_cpu(stored: Stored) -> Stored:
    """The same with all tensors on the CPU; those that are there already are not copied."""
    return replace(stored, tensors={key: _to_cpu(each) for key, each in stored.tensors.items()})


def trim(stored: Stored) -> Stored:
    """Store plainly what is smaller so, names and headers counted; every decoded value stays what it was."""
    stored = _drop_costly_banks(stored)
    tensors = {
        key: _if_smaller(key, each) if key.startswith("plain/") else each
        for key, each in stored.tensors.items()
    }
    return replace(stored, tensors=tensors)


def entry_bytes(name: str, encoded: Encoded) -> int:
    """About what a tensor takes in an artifact: its parts, their entries, and its name in the manifest."""
    listed = 0 if encoded.precision.is_native else len(name) + 3
    return encoded.nbytes + listed + sum(len(name) + len(part) + ENTRY for part in encoded.parts)


def _to_cpu(encoded: Encoded) -> Encoded:
    return replace(encoded, parts={name: part.cpu() for name, part in encoded.parts.items()})


def _if_smaller(key: str, encoded: Encoded) -> Encoded:
    if encoded.precision.is_native:
        return encoded
    name = key.split("/", 2)[2]
    plain = encode_native(decode(encoded))
    return plain if entry_bytes(name, plain) <= entry_bytes(name, encoded) else encoded


def _drop_costly_banks(stored: Stored) -> Stored:
    costly = [bank.key for bank in stored.plan.banks if not _pays(stored, bank)]
    if not costly:
        return stored
    banks = build_banks(stored)
    tensors = {
        key: each for key, each in stored.tensors.items() if key.split("/")[1] not in costly or key[0] != "b"
    }
    ties = {member: dict(tied) for member, tied in stored.ties.items()}
    blocks = {key: banks[key].settled_blocks() for key in costly}  # as `collapse` has them, bit for bit
    for p in stored.plan.placements:
        if p.bank in costly:
            weight = to_weight(blocks[p.bank][p.start : p.stop], p)
            tensors[f"plain/{p.site.member}/{p.site.name}"] = encode_native(weight)
            if len(p.site.owners) > 1:
                ties.setdefault(p.site.member, {})[p.site.name] = p.site.owners
    plan = replace(
        stored.plan,
        banks=tuple(b for b in stored.plan.banks if b.key not in costly),
        placements=tuple(p for p in stored.plan.placements if p.bank not in costly),
    )
    return replace(stored, plan=plan, tensors=tensors, ties=ties)


def _pays(stored: Stored, bank: BankPlan) -> bool:
    prefix = f"bank/{bank.key}/"
    placements = [p for p in stored.plan.placements if p.bank == bank.key]
    shared = sum(entry_bytes(key, each) for key, each in stored.tensors.items() if key.startswith(prefix))
    shared += BANK + sum(len(p.site.name) + PLACEMENT for p in placements)
    itemsize = torch_dtype(bank.dtype).itemsize
    plain = sum(torch.Size(p.site.shape).numel() * itemsize + len(p.site.name) + ENTRY for p in placements)
    return shared < plain


def _restrict_plain(stored: Stored, names: tuple[str, ...]) -> tuple[dict[str, Encoded], dict[str, str]]:
    """Plain tensors of some members; one that was stored under another member's key gets a key of its own."""
    kept = {
        key: each for key, each in stored.tensors.items() if key[0] == "p" and key.split("/", 2)[1] in names
    }
    aliases: dict[str, str] = {}
    holder: dict[str, str] = {}  # of tensors whose own key was left out
    for key, first in stored.aliases.items():
        if key.split("/", 2)[1] not in names:
            continue
        if first in kept:
            aliases[key] = first
        elif first in holder:
            aliases[key] = holder[first]
        else:
            holder[first] = key
    kept.update({key: stored.tensors[first] for first, key in holder.items()})
    return kept, aliases


def _restrict_bank(
    stored: Stored, plan: BankPlan, placements: list[Placement]
) -> tuple[BankPlan, list[Placement], dict[str, Encoded]]:
    """One bank with the locations of some placements and the rows that these use."""
    prefix = f"bank/{plan.key}/"
    parts = {key.removeprefix(prefix): each for key, each in stored.tensors.items() if key.startswith(prefix)}
    chosen = torch.cat([torch.arange(p.start, p.stop) for p in placements])
    count = parts["rows.0"].shape[0] if "rows.0" in parts else 0
    psi = decode(parts["psi"]).long()
    used, compact = torch.unique(psi[chosen], return_inverse=True)
    hyper, single = used[used < count], used[used >= count] - count
    shared = psi < count
    number = (
        torch.where(shared, shared.long().cumsum(0), (~shared).long().cumsum(0)) - 1
    )  # among its own kind
    of_hyper, of_single = number[chosen[shared[chosen]]], number[chosen[~shared[chosen]]]
    taken: dict[str, Encoded] = {}
    for part, encoded in parts.items():
        if part.startswith("single."):  # one row: kept under the number that it has among those left
            place = (single == int(part.partition(".")[2])).nonzero()
            taken |= {f"{prefix}single.{int(s)}": encoded for s in place}
        elif part == "psi":
            taken[prefix + part] = encode_native(compact.to(index_dtype(len(used))))
        elif part == "factor":
            taken[prefix + part] = encode_native(decode(encoded)[of_single])
        else:
            rows = {"single": single, "contexts": of_hyper}.get(part, hyper)
            taken[prefix + part] = take_rows(encoded, rows)
    gone = ([] if len(hyper) else ["rows", "contexts"]) + ([] if len(single) else ["single", "factor"])
    taken = {
        key: each for key, each in taken.items() if key.removeprefix(prefix).partition(".")[0] not in gone
    }
    moved, start = [], 0
    for p in placements:
        moved.append(replace(p, start=start))
        start += p.grid.locations
    return replace(plan, locations=start, context=plan.context if len(hyper) else 1), moved, taken
