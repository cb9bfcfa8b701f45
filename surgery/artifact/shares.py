"""Counts what members share in a stored joint model, in bytes and in blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from surgery.anatomy.plan import BankPlan
from surgery.core.registry import find_method
from surgery.core.sizes import COPY, count_tensors
from surgery.core.tensor_method import TensorMethod
from surgery.storage.keys import PlainKey
from surgery.storage.stored import Stored

ROWS, MATRIX = "shared rows", "shared matrix"  # as methods say it
COPIES = "shared copies"


@dataclass(frozen=True)
class Shares:
    """What each member's bytes are, and how many blocks of one member draw on rows that another uses too.

    Attributes:
        members: names.
        kinds: bytes by member and kind: as the method of a bank says it, such as `shared rows`; `shared copies`, or the
            precision of plain tensors; what several use is divided among them.
        before: bytes of each member alone.
        blocks: `blocks[a][b]` blocks of member a generated from rows that member b uses too; on the
            diagonal, rows that another block of the same member uses. A plain tensor stored once for several
            counts as one block.
        modules: how many hypermodules, outside stacks, each set of members uses, the members' names joined by `+`.
    """

    members: tuple[str, ...]
    kinds: Mapping[str, Mapping[str, int]]
    before: Mapping[str, int]
    blocks: tuple[tuple[int, ...], ...]
    modules: Mapping[str, int] = field(default_factory=dict)

    @property
    def after(self) -> dict[str, int]:
        """Bytes of each member now."""
        return {name: sum(kinds.values()) for name, kinds in self.kinds.items()}


def count_shares(stored: Stored, before: Mapping[str, int] = MappingProxyType({})) -> Shares:
    """Count who shares what.

    Args:
        stored: a joint model.
        before: bytes of members that took others before modules of them were replaced.

    Example:
        >>> count_shares(store(joint)).blocks
        ((0, 128), (128, 0))
    """
    names = stored.plan.members
    rows = count_tensors(stored)
    generated = {(p.site.member, p.site.name) for p in stored.plan.placements}
    kinds: dict[str, dict[str, int]] = {name: {} for name in names}
    for row in rows:
        kind = row.how.replace(COPY, COPIES).partition(",")[0]
        kind = row.how if (row.member, row.name) in generated else kind
        kinds[row.member][kind] = kinds[row.member].get(kind, 0) + row.nbytes
    alone = {name: sum(row.original for row in rows if row.member == name) for name in names}
    alone |= {name: before[name] for name in names if name in before}
    blocks = torch.zeros(len(names), len(names), dtype=torch.int64)
    _count_copies(stored, blocks)
    modules: dict[str, int] = {}
    for bank in stored.plan.banks:
        _count_bank(stored, bank, blocks, modules)
    return Shares(names, kinds, alone, tuple(tuple(map(int, row)) for row in blocks.tolist()), modules)


def join_names(names: Iterable[str]) -> str:
    """How a set of members is named in logs and pictures: joined by `+`."""
    return "+".join(names)


def _count_copies(stored: Stored, blocks: Tensor) -> None:
    users: dict[PlainKey, list[str]] = {}
    for key, first in stored.aliases.items():
        users.setdefault(first, [first.member]).append(key.member)
    for sharers in users.values():
        number = [stored.plan.members.index(name) for name in sharers]
        for at, one in enumerate(number):
            for other in set(number[:at] + number[at + 1 :]):
                blocks[one, other] += 1


def _count_bank(stored: Stored, bank: BankPlan, blocks: Tensor, modules: dict[str, int]) -> None:
    names = stored.plan.members
    psi, hypermodules = find_method(bank.method, TensorMethod).alignment(bank, stored.parts(bank.key))
    owner = torch.full_like(psi, -1)
    for p in stored.plan.placements:
        if p.bank == bank.key:
            owner[p.start : p.stop] = names.index(p.site.member)
    psi, owner = psi[owner >= 0], owner[owner >= 0]
    rows = int(psi.max()) + 1 if len(psi) else 0
    uses = torch.zeros(len(names), rows, dtype=torch.int64)
    uses.view(-1).index_add_(0, owner * rows + psi, torch.ones_like(psi))
    for number in range(len(names)):
        also = (uses > 0).long()
        also[number] = uses[number] > 1
        blocks[number] += also @ uses[number]
    if not bank.stack:
        for pattern, count in Counter(map(tuple, (uses[:, :hypermodules] > 0).T.tolist())).items():
            subset = join_names(name for name, used in zip(names, pattern, strict=True) if used)
            modules[subset] = modules.get(subset, 0) + count
