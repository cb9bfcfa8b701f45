"""Checks parts of a bank that somebody else may have written: can a bank be made of them, and is it the planned one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from surgery.core.bank import Bank
from surgery.storage.codecs import Encoded, decode
from surgery.util.text import one_line

if TYPE_CHECKING:
    from surgery.anatomy.plan import BankPlan
    from surgery.core.tensor_method import TensorMethod

PIECE = 2**22  # elements that are generated at once to see whether blocks have the planned shape


def wrong_parts(
    method: TensorMethod, plan: BankPlan, parts: Mapping[str, Encoded], *, finite: bool = False
) -> list[str]:
    """Reasons why a method's `unpack` cannot read parts, in words.

    The bank must have as many locations as planned and generate a block of the planned shape for each, and all parts
    must be of use to `unpack`.

    Args:
        method: whose bank it is.
        plan: of the bank.
        parts: as they are stored.
        finite: whether values must be, too.
    """
    given = _Taken({name: decode(each) for name, each in parts.items()})
    try:
        bank = method.unpack(plan, given)
        found = {} if bank.locations != plan.locations else _misshapen(bank, plan)
        unused = given.unused
        unused = unused - {*bank.pack(plan, parts)} if unused else unused
    except Exception as error:  # of a method's own, on parts that do not fit
        return [f"bank {plan.key} cannot be made of its parts: {one_line(error)}"]
    if bank.locations != plan.locations:
        return [f"bank {plan.key} must have {plan.locations} locations, found {bank.locations}"]
    bad = [f"bank {plan.key} must generate {wanted}, found {got}" for wanted, got in found.items()]
    bad += [f"bank {plan.key} has {part}, which nothing uses" for part in sorted(unused)]
    if bad or not finite:
        return bad
    return [
        f"bank {plan.key} has NaN or infinite values in {name}"
        for name, values in given.parts.items()
        if not bool(values.isfinite().all())
    ]


class _Taken(Mapping[str, Tensor]):
    """Parts that remember which of them were asked for."""

    def __init__(self, parts: Mapping[str, Tensor]):
        self.parts, self.unused = parts, set(parts)

    def __getitem__(self, name: str) -> Tensor:
        found = self.parts[name]
        self.unused.discard(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


@torch.no_grad()
def _misshapen(bank: Bank, plan: BankPlan) -> dict[str, str]:
    """The first blocks that a bank generates in another shape than planned: which were wanted, and what was found."""
    width = plan.block[0] * plan.block[1]
    step = max(1, PIECE // width)  # never more than a piece of them at once
    for start in range(0, plan.locations, step):
        stop = min(start + step, plan.locations)
        shape = tuple(bank.blocks(start, stop).shape)
        if shape != (stop - start, width):
            return {f"blocks {[stop - start, width]} of locations {start} to {stop}": str([*shape])}
    return {}
