"""Generation: weights of sites to blocks and back, and all weights of some sites at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from surgery.blocks import tile, untile
from surgery.dictionary import Bank, Dictionary, master_dtype
from surgery.plan import Placement, torch_dtype

Weights = dict[tuple[str, str], Tensor]
"""Generated tensors by member and site name."""


def to_blocks(weight: Tensor, p: Placement) -> Tensor:
    """A site's weight as blocks `[L, m*n]` in the dtype in which rows are kept."""
    return tile(p.site.view.to_matrices(weight), p.grid).to(master_dtype(weight.dtype))


def to_weight(blocks: Tensor, p: Placement) -> Tensor:
    """The exact inverse of `to_blocks`: a contiguous weight in the member's dtype; differentiable."""
    if len(blocks) == 1 and p.site.view.flat:  # a template's tensor
        return blocks.view(p.site.shape).to(torch_dtype(p.site.dtype))
    return p.site.view.to_tensor(untile(blocks, p.grid)).contiguous().to(torch_dtype(p.site.dtype))


def generate_weights(dictionary: Dictionary, placements: Sequence[Placement]) -> Weights:
    """The weights of all `placements`; differentiable."""
    weights: Weights = {}
    for key in dict.fromkeys(p.bank for p in placements):
        mine = [p for p in placements if p.bank == key]
        if not torch.is_grad_enabled() and _has_tied_layers(dictionary[key], mine):
            weights |= _tied_weights(dictionary[key], mine)
            continue
        for run in _runs(mine):
            blocks = dictionary[key].blocks(run[0].start, run[-1].stop)
            # One split: slicing once per site would make each slice's backward fill a full-size gradient.
            for p, part in zip(run, blocks.split([p.grid.locations for p in run]), strict=True):
                weights[p.site.member, p.site.name] = to_weight(part, p)
    return weights


def _has_tied_layers(bank: Bank, placements: Sequence[Placement]) -> bool:
    """Whether whole tensors are rows as they are, of which several take one: a signature of templates."""
    whole = not bank.hypermodules and bank.singles < bank.locations and bank.diagonals is None
    return whole and all(p.grid.locations == 1 for p in placements) and bool((bank.contexts[:, 0] == 1).all())


def _tied_weights(bank: Bank, placements: Sequence[Placement]) -> Weights:
    """One tensor in memory for all layers that take one row."""
    made: dict[tuple, Tensor] = {}
    for p in placements:
        row = int(bank.psi[p.start])
        form = (row, p.site.shape, p.site.dtype)
        if form not in made:
            made[form] = to_weight(bank.rows.detach()[row : row + 1].clone(), p)
    return {
        (p.site.member, p.site.name): made[int(bank.psi[p.start]), p.site.shape, p.site.dtype]
        for p in placements
    }


def move_dictionary(dictionary: Dictionary, change: Callable[[Tensor], Tensor]) -> None:
    """Apply what `Module.to` and the like do to tensors; rows go to the master dtype of a new dtype."""

    def moved(tensor: Tensor) -> Tensor:
        probe = change(tensor[:0])
        if probe.dtype == tensor.dtype:
            return change(tensor)
        return tensor.to(probe.device, master_dtype(probe.dtype))

    dictionary._apply(moved)


def _runs(placements: Sequence[Placement]) -> list[list[Placement]]:
    """Group placements whose locations follow one another, so that each group is generated in one go."""
    runs: list[list[Placement]] = []
    for p in sorted(placements, key=lambda p: p.start):
        if runs and runs[-1][-1].stop == p.start:
            runs[-1].append(p)
        else:
            runs.append([p])
    return runs
