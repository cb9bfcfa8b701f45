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
from surgery.core.generation import generated
from surgery.core.registry import find_method
from surgery.core.tensor_method import TensorMethod
from surgery.storage.codecs import Encoded, decode, encode_native
from surgery.storage.keys import PartKey, PlainKey, StorageKey
from surgery.storage.stored import Stored, build_bank

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
            smaller, moved, parts = find_method(bank.method, TensorMethod).restrict(
                bank, mine, stored.parts(bank.key)
            )
            banks.append(smaller)
            placements += moved
            tensors.update({PartKey(bank.key, part): each for part, each in parts.items()})
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
    return trim_plain(drop_costly_banks(stored))


def trim_plain(stored: Stored) -> Stored:
    """`trim` of plain tensors alone."""
    tensors = {
        key: _if_smaller(key, each) if isinstance(key, PlainKey) else each
        for key, each in stored.tensors.items()
    }
    return replace(stored, tensors=tensors)


def entry_bytes(name: str, encoded: Encoded) -> int:
    """About what a tensor takes in an artifact: its parts, their entries, and its name in the manifest."""
    listed = 0 if encoded.precision.is_native else len(name) + 3
    return encoded.nbytes + listed + sum(len(name) + len(part) + ENTRY for part in encoded.parts)


def _to_cpu(encoded: Encoded) -> Encoded:
    return replace(encoded, parts={name: part.cpu() for name, part in encoded.parts.items()})


def _if_smaller(key: PlainKey, encoded: Encoded) -> Encoded:
    if encoded.precision.is_native:
        return encoded
    plain = encode_native(decode(encoded))
    return plain if entry_bytes(key.name, plain) <= entry_bytes(key.name, encoded) else encoded


def drop_costly_banks(stored: Stored) -> Stored:
    """`trim` of banks alone."""
    costly = [bank.key for bank in stored.plan.banks if not _pays(stored, bank)]
    if not costly:
        return stored
    banks = {bank.key: build_bank(bank, stored.tensors) for bank in stored.plan.banks if bank.key in costly}
    tensors = {
        k: each for k, each in stored.tensors.items() if isinstance(k, PlainKey) or k.bank not in costly
    }
    ties = {member: dict(tied) for member, tied in stored.ties.items()}
    plain = [p for p in stored.plan.placements if p.bank in costly]
    weights = generated(banks, plain)  # as `collapse` has them, bit for bit
    for p in stored.plan.placements:
        if p.bank in costly:
            key = p.site.member, p.site.name
            tensors[PlainKey(*key)] = encode_native(weights[key].read())
            if len(p.site.owners) > 1:
                ties.setdefault(p.site.member, {})[p.site.name] = p.site.owners
    plan = replace(
        stored.plan,
        banks=tuple(b for b in stored.plan.banks if b.key not in costly),
        placements=tuple(p for p in stored.plan.placements if p.bank not in costly),
    )
    return replace(stored, plan=plan, tensors=tensors, ties=ties)


def _pays(stored: Stored, bank: BankPlan) -> bool:
    placements = stored.plan.in_bank(bank.key)
    parts = stored.parts(bank.key)
    shared = sum(entry_bytes(str(PartKey(bank.key, part)), each) for part, each in parts.items())
    shared += BANK + sum(len(p.site.name) + PLACEMENT for p in placements)
    itemsize = torch_dtype(bank.dtype).itemsize
    plain = sum(torch.Size(p.site.shape).numel() * itemsize + len(p.site.name) + ENTRY for p in placements)
    return shared < plain


def _restrict_plain(
    stored: Stored, names: tuple[str, ...]
) -> tuple[dict[StorageKey, Encoded], dict[PlainKey, PlainKey]]:
    """Plain tensors of some members; one that was stored under another member's key gets a key of its own."""
    kept: dict[StorageKey, Encoded] = {
        key: each for key, each in stored.tensors.items() if isinstance(key, PlainKey) and key.member in names
    }
    aliases: dict[PlainKey, PlainKey] = {}
    holder: dict[PlainKey, PlainKey] = {}  # of tensors whose own key was left out
    for key, first in stored.aliases.items():
        if key.member not in names:
            continue
        if first in kept:
            aliases[key] = first
        elif first in holder:
            aliases[key] = holder[first]
        else:
            holder[first] = key
    kept.update({key: stored.tensors[first] for first, key in holder.items()})
    return kept, aliases
