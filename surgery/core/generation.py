"""Generates the weights of sites from blocks, and carries gradients back, for many sites at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from surgery.anatomy.plan import Placement, torch_dtype
from surgery.core.bank import Bank
from surgery.core.dictionary import Dictionary
from surgery.geometry.block_map import read_tensor, write_tensor
from surgery.geometry.blocks import tile
from surgery.handles.handle import Handle, Shared
from surgery.util import memory
from surgery.util.alignment import align
from surgery.util.dtypes import master_dtype

FEWEST = 1 << 13  # locations that are generated together; a few take another kernel

Weights = dict[tuple[str, str], Tensor]
"""Generated tensors by member and site name."""


def to_blocks(weight: Tensor, p: Placement) -> Tensor:
    """A site's weight as blocks `[L, m*n]` in the dtype in which rows are kept."""
    return tile(p.site.view.to_matrices(weight), p.grid).to(master_dtype(weight.dtype))


def to_weight(blocks: Tensor, p: Placement) -> Tensor:
    """The exact inverse of `to_blocks`: a contiguous weight in the member's dtype."""
    if _whole(p):
        return align(blocks.view(p.site.shape).to(torch_dtype(p.site.dtype)))  # a block is any part of a bank
    return read_tensor(blocks.contiguous(), p.site.view, p.grid, torch_dtype(p.site.dtype))


class Generated(Handle):
    """A site's weight that its bank generates when it is asked for, settled: as a member is collapsed.

    Args:
        bank: of the site.
        p: of the site in the bank.
        blocks: all of the bank's, where it generates them in one go.
    """

    def __init__(self, bank: Bank, p: Placement, blocks: Shared[Tensor] | None = None):
        self.bank, self.p, self.blocks = bank, p, blocks
        self.shape, self.dtype, self.device = p.site.shape, torch_dtype(p.site.dtype), bank.device

    def look(self) -> Tensor:
        """The weight, which nobody may write to."""
        held = self.bank.held(self.p)
        return self.read() if held is None else held

    @torch.no_grad()
    def read(self) -> Tensor:
        """The weight, no view of a larger storage."""
        if (held := self.bank.held(self.p)) is not None:
            return held.clone()
        start, stop = self.p.start, self.p.stop
        mine = self.blocks.take()[start:stop] if self.blocks else self.bank.settled_blocks(start, stop)
        return memory.compact(to_weight(mine, self.p))


def generated(
    dictionary: Dictionary | Mapping[str, Bank], placements: Sequence[Placement]
) -> dict[tuple[str, str], Generated]:
    """Handles of the weights of some sites, bank by bank."""
    found: dict[tuple[str, str], Generated] = {}
    for key in dict.fromkeys(p.bank for p in placements):
        bank, mine = dictionary[key], [p for p in placements if p.bank == key]
        by_range = type(bank).settled_blocks is not Bank.settled_blocks
        blocks = None if by_range else Shared(bank.settled_blocks, len(mine))
        found |= {(p.site.member, p.site.name): Generated(bank, p, blocks) for p in mine}
    return found


def generate_weights(
    dictionary: Dictionary, placements: Sequence[Placement], task: str | None = None
) -> Weights:
    """The weights of all `placements`; differentiable once.

    Args:
        dictionary: that generates them.
        placements: of the sites that are wanted.
        task: whose weights, of banks that depend on it.
    """
    weights: Weights = {}
    by_bank: dict[str, list[Placement]] = {}
    for p in placements:
        by_bank.setdefault(p.bank, []).append(p)
    for keys in _together(dictionary, by_bank):
        banks = [dictionary[key] for key in keys]
        mine = sorted((p for key in keys for p in by_bank[key]), key=lambda p: p.start)
        if len(keys) > 1:
            weights |= _cut(banks[0].generate_together(banks, task), mine)
        elif not torch.is_grad_enabled() and banks[0].held(mine[0]) is not None:
            weights |= {(p.site.member, p.site.name): _copy(banks[0].held(p)) for p in mine}
        elif not torch.is_grad_enabled() and (tied := _tied_weights(banks[0], mine)) is not None:
            weights |= tied
        else:
            for run in _pieces(_runs(mine), banks[0]):
                weights |= _cut(banks[0].blocks(run[0].start, run[-1].stop, task), run)
    return weights


def _copy(weight: Tensor | None) -> Tensor:
    """A weight that a bank holds, in memory of its own."""
    assert weight is not None  # a bank holds all its sites, or none
    return weight.clone()


def _together(dictionary: Dictionary, by_bank: Mapping[str, Sequence[Placement]]) -> list[list[str]]:
    """Keys of banks that are generated in one go: on a device those that belong together, if all are wanted."""
    groups: dict[object, list[str]] = {}
    for key, mine in by_bank.items():
        bank = dictionary[key]
        group = bank.together() if len(mine) == bank.locations and _joins(bank.device) else None
        groups.setdefault(key if group is None else group, []).append(key)
    return list(groups.values())


def _joins(device: torch.device) -> bool:
    """Whether several small products cost more than putting their factors side by side: the CPU starts nothing."""
    return device.type != "cpu"


def _cut(blocks: Tensor, placements: Sequence[Placement]) -> Weights:
    """Blocks of sites that follow one another as their weights."""
    first = placements[0]
    alike = not first.grid.padded and blocks.dtype == torch_dtype(first.site.dtype)
    if len(placements) == 1 and alike:  # PyTorch's own nodes for one site are faster than one in Python
        return {(first.site.member, first.site.name): to_weight(blocks, first)}
    names = [(p.site.member, p.site.name) for p in placements]
    return dict(zip(names, _Cut.apply(blocks, placements), strict=True))


class _Cut(torch.autograd.Function):
    """One node for all sites: gradients go to their places in one tensor, where splitting, turning and joining them
    again would take a node and a copy each."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, placements: Sequence[Placement]) -> tuple[Tensor, ...]:
        ctx.placements, ctx.made = placements, (blocks.shape, blocks.dtype, blocks.device)
        ctx.set_materialize_grads(False)
        parts = zip(placements, _parts(blocks, placements), strict=True)
        return tuple(to_weight(part, p) for p, part in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None]:
        blocks = _empty(*ctx.made)
        reached = [gradient for gradient in gradients if gradient is not None]
        if len(reached) == len(gradients) and all(map(_whole, ctx.placements)):
            torch.cat([gradient.reshape(-1) for gradient in reached], out=blocks.view(-1))
            return blocks, None
        for p, part, gradient in zip(ctx.placements, _parts(blocks, ctx.placements), gradients, strict=True):
            if gradient is None:
                part.zero_()
            else:
                write_tensor(gradient, p.site.view, p.grid, part)
        return blocks, None


def _empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for all blocks' gradients."""
    if device.type == "cpu" and shape.numel() * dtype.itemsize > memory.FRESH_MEMORY_BYTES:
        return memory.empty_kept(shape[0], shape[1], dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def _whole(p: Placement) -> bool:
    """Whether the one block of a site is its weight as it lies: a template's tensor."""
    return p.grid.locations == 1 and p.site.view.flat


def _parts(blocks: Tensor, placements: Sequence[Placement]) -> list[Tensor]:
    """The part `[L, m*n]` of each placement in contiguous blocks: views."""
    sizes = [p.grid.locations * p.grid.m * p.grid.n for p in placements]
    parts = blocks.reshape(-1).split(sizes)
    return [part.view(p.grid.locations, -1) for p, part in zip(placements, parts, strict=True)]


def _tied_weights(bank: Bank, placements: Sequence[Placement]) -> Weights | None:
    """One tensor in memory for all layers that take one row, where whole tensors are rows: a signature of templates."""
    found = bank.repeats() if all(p.grid.locations == 1 for p in placements) else None
    if found is None:
        return None
    of_location, rows = found
    made: dict[tuple, Tensor] = {}
    weights: Weights = {}
    for p in placements:
        row = int(of_location[p.start])
        form = (row, p.site.shape, p.site.dtype)
        if form not in made:
            made[form] = to_weight(rows[row : row + 1].clone(), p)
        weights[p.site.member, p.site.name] = made[form]
    return weights


def move_dictionary(dictionary: Dictionary, change: Callable[[Tensor], Tensor]) -> None:
    """Apply what `Module.to` and the like do to tensors; rows go to the master dtype of a new dtype."""

    def moved(tensor: Tensor) -> Tensor:
        probe = change(tensor[:0])
        if probe.dtype == tensor.dtype:
            return change(tensor)
        return tensor.to(probe.device, master_dtype(probe.dtype))

    dictionary._apply(moved)


def _pieces(runs: list[list[Placement]], bank: Bank) -> list[list[Placement]]:
    """Runs, where no gradient is wanted in pieces: all blocks at once would be a second copy of all weights."""
    if torch.is_grad_enabled() or not bank.divisible:
        return runs
    least = max(FEWEST, memory.FRESH_MEMORY_BYTES // (bank.width * bank.dtype.itemsize))
    pieces: list[list[Placement]] = []
    for run in runs:
        pieces.append([])
        for p in run:
            if run[-1].stop - p.start >= least and pieces[-1] and p.start - pieces[-1][0].start >= least:
                pieces.append([])
            pieces[-1].append(p)
    return pieces


def _runs(placements: Sequence[Placement]) -> list[list[Placement]]:
    """Group placements whose locations follow one another, so that each group is generated in one go."""
    runs: list[list[Placement]] = []
    for p in sorted(placements, key=lambda p: p.start):
        if runs and runs[-1][-1].stop == p.start:
            runs[-1].append(p)
        else:
            runs.append([p])
    return runs
