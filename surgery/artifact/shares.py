"""Shares: who shares what in a stored joint model, counted in bytes and in blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.plan import BankPlan
from surgery.precision import decode
from surgery.storage import Stored

ROWS = "dictionary"
COPIES = "shared copies"


@dataclass(frozen=True)
class Shares:
    """What each member's bytes are, and how many blocks of one member draw on rows that another uses too.

    Attributes:
        members: names.
        kinds: bytes by member and kind: `dictionary`, `shared copies`, or the precision of plain tensors;
            what several use is divided among them.
        blocks: `blocks[a][b]` blocks of member a generated from rows that member b uses too; on the
            diagonal, rows that another block of the same member uses. A plain tensor stored once for several
            counts as one block.
    """

    members: tuple[str, ...]
    kinds: Mapping[str, Mapping[str, float]]
    blocks: tuple[tuple[int, ...], ...]


def count_shares(stored: Stored) -> Shares:
    """Count who shares what.

    Example:
        >>> count_shares(store(joint)).blocks
        ((0, 128), (128, 0))
    """
    names = stored.plan.members
    kinds: dict[str, dict[str, float]] = {name: {} for name in names}
    blocks = torch.zeros(len(names), len(names), dtype=torch.int64)
    _count_plain(stored, kinds, blocks)
    for bank in stored.plan.banks:
        _count_bank(stored, bank, kinds, blocks)
    return Shares(names, kinds, tuple(tuple(map(int, row)) for row in blocks.tolist()))


def _count_plain(stored: Stored, kinds: dict[str, dict[str, float]], blocks: Tensor) -> None:
    users: dict[str, list[str]] = {}
    for key, first in stored.aliases.items():
        users.setdefault(first, [first.split("/", 2)[1]]).append(key.split("/", 2)[1])
    for key, encoded in stored.tensors.items():
        if key.startswith("plain/"):
            sharers = users.get(key, [key.split("/", 2)[1]])
            kind = COPIES if len(sharers) > 1 else str(encoded.precision)
            for name in sharers:
                kinds[name][kind] = kinds[name].get(kind, 0) + encoded.nbytes / len(sharers)
    for sharers in users.values():
        number = [stored.plan.members.index(name) for name in sharers]
        for at, one in enumerate(number):
            for other in set(number[:at] + number[at + 1 :]):
                blocks[one, other] += 1


def _count_bank(stored: Stored, bank: BankPlan, kinds: dict[str, dict[str, float]], blocks: Tensor) -> None:
    prefix = f"bank/{bank.key}/"
    parts = {key.removeprefix(prefix): each for key, each in stored.tensors.items() if key.startswith(prefix)}
    names = stored.plan.members
    psi = decode(parts["psi"]).long()
    owner = torch.full_like(psi, -1)
    for p in stored.plan.placements:
        if p.bank == bank.key:
            owner[p.start : p.stop] = names.index(p.site.member)
    psi, owner = psi[owner >= 0], owner[owner >= 0]
    row_bytes = sum(each.nbytes for part, each in parts.items() if part.startswith(("rows.", "single")))
    rows = int(psi.max()) + 1 if len(psi) else 0
    uses = torch.zeros(len(names), rows, dtype=torch.int64)
    uses.view(-1).index_add_(0, owner * rows + psi, torch.ones_like(psi))
    total = uses.sum(0).clamp_min(1)
    code_bytes = sum(each.nbytes for each in parts.values()) - row_bytes
    for number, name in enumerate(names):
        if count := int(uses[number].sum()):
            mine = (
                float((uses[number] / total).sum()) / max(rows, 1) * row_bytes + count / len(psi) * code_bytes
            )
            kinds[name][ROWS] = kinds[name].get(ROWS, 0) + mine
            also = (uses > 0).long()
            also[number] = uses[number] > 1
            blocks[number] += also @ uses[number]
