"""Writes given weights of a site into the dictionary where it can hold them exactly.

Each bank says which of its blocks can become any others. A row can that one location uses, as it is; one that other
locations use would change them too, and a sum of several basis blocks comes near a given block but does not reach it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.anatomy.plan import Placement, torch_dtype
from surgery.core.dictionary import Dictionary
from surgery.core.generation import to_blocks, to_weight


@dataclass(frozen=True)
class Change:
    """Blocks of one bank that become others.

    Attributes:
        bank: its key.
        locations: `[N]`.
        blocks: `[N, m*n]`.
    """

    bank: str
    locations: Tensor
    blocks: Tensor


@torch.no_grad()
def changes(
    dictionary: Dictionary, given: Sequence[tuple[Placement, Tensor]], names: Mapping[int, str] | None = None
) -> tuple[list[Change], list[str]]:
    """What has to change for sites to have the weights `given`; and for what cannot, the reasons.

    Args:
        dictionary: left as it is.
        given: of each site its placement and its weight, of the site's shape.
        names: what a reason calls a site, by number in `given`; by default the site's name.

    Returns:
        changes, none for weights that are there already, and reasons such as
        `layer.weight (3 of 16 blocks share rows with other places)`.
    """
    found: list[Change] = []
    reasons: list[str] = []
    for number, (p, weight) in enumerate(given):
        bank = dictionary[p.bank]
        weight = weight.detach().to(bank.device, torch_dtype(p.site.dtype))
        name = (names or {}).get(number, p.site.name)
        generated = bank.blocks(p.start, p.stop)
        if torch.equal(_bits(to_weight(generated, p)), _bits(weight)):
            continue
        blocks, now = to_blocks(weight, p), to_blocks(to_weight(generated, p), p)
        other = (_bits(blocks) != _bits(now)).any(1).nonzero().flatten()
        if reason := bank.refuses(other + p.start):
            settled = to_weight(bank.settled_blocks()[p.start : p.stop], p)
            # What was opened and not trained generates a weight up to rounding, and collapses to it exactly.
            if not torch.equal(_bits(settled), _bits(weight)):
                reasons.append(f"{name} ({reason})")
            continue
        found.append(Change(p.bank, other + p.start, blocks[other]))
    return found, reasons


@torch.no_grad()
def write(dictionary: Dictionary, found: Sequence[Change]) -> None:
    """Make changes that `changes` found possible."""
    for change in found:
        dictionary[change.bank].write(change.locations, change.blocks)


def _bits(tensor: Tensor) -> Tensor:
    """A tensor's values as integers: 0.0 is not -0.0, and NaN is itself."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])
