"""Claims: sizes that a manifest states, compared with one another and with what is stored before memory is taken.

What a file holds is bounded by the file. What is generated or decoded is not: a few factors may stand for a matrix of
any size, and a manifest that others wrote may state any. A bank's blocks must fit the tensors that are cut into them,
and all that is made of stored bytes must be in proportion to them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from surgery.anatomy.plan import BankPlan, Placement
from surgery.disk.untrusted import shown_text
from surgery.storage.stored import Stored

MOST_FOR_A_BYTE = 1 << 14  # elements: factors of rank 1 of a matrix of 8,192 x 8,192, in two bits
_ROOM = 1 << 20  # elements that a bank or a tensor may stand for besides


def wrong_claims(stored: Stored) -> list[str]:
    """What cannot be true of the sizes that a manifest states, in words.

    Args:
        stored: with all tensors that are there, none of them decoded yet.
    """
    bad = []
    for bank in stored.plan.banks:
        placed = stored.plan.in_bank(bank.key)
        held = sum(each.nbytes for each in stored.parts(bank.key).values())
        bad += _wrong_blocks(bank, placed) or list(_wrong_size(bank, placed, held))
    for key, each in stored.tensors.items():
        if not each.precision.is_native and (size := math.prod(each.shape)) > most_elements(each.nbytes):
            bad.append(
                f"{shown_text(str(key))} must be of at most {most_elements(each.nbytes):,} elements, by the "
                f"{each.nbytes:,} bytes that hold it, but is of {size:,}"
            )
    return bad


def most_elements(nbytes: int) -> int:
    """How many elements may be generated or decoded from some stored bytes.

    Example:
        >>> most_elements(100)
        2686976
    """
    return MOST_FOR_A_BYTE * nbytes + _ROOM


def _wrong_blocks(bank: BankPlan, placed: list[Placement]) -> list[str]:
    """Sites that do not fill a block of their bank, which no plan places there."""
    (m, n), name = bank.block, shown_text(bank.key)
    if not placed:
        return [f"bank {name} must generate tensors of members, but none of them lies in it"]
    small = next((p for p in placed if p.grid.out < m or p.grid.into < n), None)
    if small is None:
        return []
    site = f"{small.site.member}:{shown_text(small.site.name)}"
    return [
        f"bank {name} must have blocks that its tensors fill, but one of {m:,} x {n:,} is larger than {site} with "
        f"{small.grid.out:,} x {small.grid.into:,}"
    ]


def _wrong_size(bank: BankPlan, placed: list[Placement], held: int) -> Iterator[str]:
    """Elements that are out of proportion to the bytes of a bank."""
    generated = bank.locations * math.prod(bank.block)
    size = max(generated, sum(math.prod(p.site.shape) for p in placed))
    if size > (most := most_elements(held)):
        yield (
            f"bank {shown_text(bank.key)} must generate at most {most:,} elements, by the {held:,} bytes of its parts, "
            f"but its {bank.locations:,} locations and their tensors have {size:,}"
        )
