"""Decoding: the weights that members have when they run from a stored form.

A search tries one stored form after another, and most of their tensors are the same objects; what several members
draw on is the same for each of them. So what was decoded is kept within a bound of memory, as long as the next form
uses it too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.anatomy.plan import BankPlan
from surgery.core.bank import Bank
from surgery.core.generation import to_weight
from surgery.disk.aside import put_aside
from surgery.storage.codecs import Encoded, decode
from surgery.storage.stored import Stored, build_bank

ROOM = 256 * 2**20  # bytes of what is decoded that are kept at most
FREE = 4  # of an accelerator's free memory what is decoded may take one part of so many


def room_on(device: torch.device) -> int:
    """Bytes of what is decoded that are kept on a device at most."""
    if device.type != "cuda":
        return ROOM
    free, _ = torch.cuda.mem_get_info(device)
    return max(ROOM, free // FREE)


@dataclass
class _Kept:
    """What was made, what of (held: no other object then gets its identity), and in which attempt it was last used."""

    made: Tensor | Bank
    plan: BankPlan | None
    source: tuple[Encoded, ...]
    nbytes: int
    used: int


class Decodings:
    """Decoded tensors and banks, kept from one stored form to the next.

    Args:
        room: bytes of decoded tensors that are kept at most; what comes after is decoded whenever it is needed.

    Example:
        >>> decodings = Decodings()
        >>> with trial.running_with(decodings.weights_of(stored, trial.name)):
        ...     error = trial.error()
        >>> decodings.end_attempt()
    """

    def __init__(self, room: int = ROOM):
        self.room, self.held, self.attempt = room, 0, 0
        self._kept: dict[tuple[int, ...], _Kept] = {}

    def weights_of(self, stored: Stored, member: str) -> dict[str, Tensor]:
        """The weights of one member, by first owner; they are not to be changed, as others may share their memory."""
        weights = {name: self._tensor(encoded) for name, encoded in stored.plain(member).items()}
        placed = stored.plan.of(member)
        used = {p.bank for p in placed}
        for plan in stored.plan.banks:
            if plan.key not in used:
                continue
            bank = self._bank(plan, stored)
            for p in (p for p in placed if p.bank == plan.key):
                weights[p.site.name] = put_aside(to_weight(bank.blocks(p.start, p.stop).detach(), p))
        return weights

    def end_attempt(self) -> None:
        """Let go of what the stored form of this attempt did not use."""
        for key in [key for key, each in self._kept.items() if each.used < self.attempt]:
            self.held -= self._kept.pop(key).nbytes
        self.attempt += 1

    def _tensor(self, encoded: Encoded) -> Tensor:
        if encoded.precision.is_native:  # lies where it lay
            return decode(encoded)
        if (found := self._find(None, (encoded,))) is None:
            found = put_aside(decode(encoded))
            self._keep(found, None, (encoded,), found.nbytes)
        assert isinstance(found, Tensor)
        return found

    def _bank(self, plan: BankPlan, stored: Stored) -> Bank:
        parts = stored.parts(plan.key)
        source = tuple(parts[name] for name in sorted(parts))
        known = {id(each): kept.made for each in source if (kept := self._used((each,))) is not None}
        if (found := self._find(plan, source)) is None:
            made: dict[int, Tensor] = {}

            def decoded(encoded: Encoded) -> Tensor:
                part = known.get(id(encoded))
                made[id(encoded)] = part if isinstance(part, Tensor) else decode(encoded)
                return made[id(encoded)]

            found = build_bank(plan, stored.tensors, decoded)
            held = (*found.parameters(), *found.buffers())
            self._keep(found, plan, source, sum(t.nbytes for t in held))
            # What a bank uses as it is takes no more room, and the next one of other private rows may use it too.
            there = {t.data_ptr() for t in held if t.numel()}
            for each in source if self._used(source) is not None else ():
                if made[id(each)].numel() and made[id(each)].data_ptr() in there:
                    self._keep(made[id(each)], None, (each,), 0)
        assert isinstance(found, Bank)
        return found

    def _find(self, plan: BankPlan | None, source: tuple[Encoded, ...]) -> Tensor | Bank | None:
        kept = self._used(source)
        return None if kept is None or kept.plan != plan else kept.made

    def _used(self, source: tuple[Encoded, ...]) -> _Kept | None:
        """What was made of something and is kept, as this attempt uses it too."""
        if (kept := self._kept.get(tuple(map(id, source)))) is not None:
            kept.used = self.attempt
        return kept

    def _keep(
        self, made: Tensor | Bank, plan: BankPlan | None, source: tuple[Encoded, ...], nbytes: int
    ) -> None:
        key = tuple(map(id, source))
        if key not in self._kept and self.held + nbytes <= self.room:
            self._kept[key] = _Kept(made, plan, source, nbytes, self.attempt)
            self.held += nbytes
