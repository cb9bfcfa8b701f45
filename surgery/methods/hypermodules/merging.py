"""Merging moves: all users of one hypermodule try another one together, and either all of them go or none does.

Single locations drift: of a hypermodule of several users the first one that leaves saves nothing, so no price moves it.
A merging move is proposed where another hypermodule generates what the users need, nearest in the metric of their
gradients' second moments, and is decided by the soft weights of all of them in the same contest as everything else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.methods.hypermodules.alignment import draw_uniformly, usage
from surgery.methods.hypermodules.bank import HypermoduleBank
from surgery.methods.hypermodules.explanation import Total, explained_pairs, fit_contexts, scale_contexts

POOL = 16
"""Hypermodules among which the nearest is looked for."""

_FLOOR = 1e-3  # of the mean second moment, for columns that no gradient reached


@dataclass(frozen=True)
class Mergers:
    """Merging moves that are proposed.

    Attributes:
        locations: `[N]` all users of the hypermodules that would be given up, ascending.
        group: `[N]` which of these each belongs to, from 0 on.
        targets: `[N]` the hypermodule that each would use.
        coefficients: `[N, c]` with which that comes nearest to its block, as long as the block is.
    """

    locations: Tensor
    group: Tensor
    targets: Tensor
    coefficients: Tensor


@torch.no_grad()
def draw_mergers(
    bank: HypermoduleBank,
    most: int,
    generator: torch.Generator,
    moments: Tensor | None = None,
    total: Total | None = None,
) -> Mergers | None:
    """Draw hypermodules that might be given up, and find for each the one that would do best for its users.

    Args:
        bank: with hypermodules only.
        most: how many locations may take part; hypermodules of more users are left alone.
        generator: on the CPU; all processes draw the same.
        moments: `[K*c, d]`, second moments of the rows' gradients; without them all columns count alike.
        total: see `explanation.Total`.

    Returns:
        The moves; None where there is nothing to merge.
    """
    uses = usage(bank.psi, bank.hypermodules)
    order = torch.randperm(bank.hypermodules, generator=generator).to(uses.device)
    order = order[~bank.kept_hypermodules[order]]
    given_up = order[uses[order].cumsum(0) <= most]
    left = torch.ones(bank.hypermodules, dtype=torch.bool, device=uses.device)
    left[given_up] = False
    others = bank.psi[left[bank.psi]]
    if not len(given_up) or not len(others):
        return None
    pool = torch.unique(draw_uniformly(others, POOL, 1, generator))
    number = torch.full_like(uses, -1)
    number[given_up] = torch.arange(len(given_up), device=uses.device)
    locations = (number[bank.psi] >= 0).nonzero().squeeze(1)
    group = number[bank.psi[locations]]
    weight = _weights(bank, moments)
    weight = None if weight is None else weight[bank.psi[locations]]
    blocks = bank.blocks()[locations]
    seen = blocks if weight is None else blocks * weight
    energy = seen.square().sum(1) if total is None else total(seen.square().sum(1))
    missed = [
        (1 - explained_pairs(seen, _seen(bank, pool[n].expand(len(locations)), weight), total)) * energy
        for n in range(len(pool))
    ]
    costs = torch.zeros(len(given_up), len(pool), device=uses.device, dtype=energy.dtype)
    targets = pool[costs.index_add(0, group, torch.stack(missed, 1)).argmin(1)][group]
    each = torch.arange(len(locations), device=uses.device).unsqueeze(1)
    fitted = fit_contexts(seen, _seen(bank, targets, weight), each, total=total)
    scaled = scale_contexts(fitted, blocks, _seen(bank, targets, None), each, total)
    return Mergers(locations, group, targets, scaled.squeeze(1))


def merged_saving(psi: Tensor, hypermodules: int, context: int, locations: Tensor, targets: Tensor) -> Tensor:
    """Blocks that merging saves, divided among the users who would go: for each of these `[N]`.

    Args:
        psi: `[L]`.
        hypermodules: K.
        context: c; a hypermodule of n users takes `min(n, c)` blocks.
        locations: `[N]` all users of some hypermodules.
        targets: `[N]` where they would go.

    Example:
        >>> merged_saving(torch.tensor([0, 0, 1]), 2, 1, torch.tensor([0, 1]), torch.tensor([1, 1])).tolist()
        [0.5, 0.5]
    """
    uses = usage(psi, hypermodules)
    here, there = uses[psi[locations]], uses[targets]
    saved = here.clamp_max(context) + there.clamp_max(context) - (here + there).clamp_max(context)
    return saved.to(torch.get_default_dtype()) / here


def _weights(bank: HypermoduleBank, moments: Tensor | None) -> Tensor | None:
    """Roots of how much each column of the blocks of each hypermodule matters: `[K, d]`."""
    if moments is None:
        return None
    found = moments.view(bank.hypermodules, bank.context, -1).mean(1)
    floor = _FLOOR * bank.columns.mean(found)
    return (found + floor.clamp_min(torch.finfo(found.dtype).tiny)).sqrt()


def _seen(bank: HypermoduleBank, hypermodules: Tensor, weight: Tensor | None) -> Tensor:
    """Basis blocks of some hypermodules `[N]` in a metric `[N, d]`: `[N, c, d]`."""
    basis = bank.basis[hypermodules]
    return basis if weight is None else basis * weight.unsqueeze(1)
