"""Sensitivity: how much losses depend on each location, from the second moments that the optimizer keeps anyway.

Adam keeps a running mean of the squares of each gradient. With the gradient of a context that is `<dL/dB, R_j>`, so
`sqrt(sum_j z_j^2 E[(dL/dz_j)^2])` says how far the loss of a batch moves as a block grows by its own size: the
deviation of what a location contributes. A location of a small task has a small one, of signal or of noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgery.methods.hypermodules.bank import HypermoduleBank
from surgery.training.loop.optimizers import plain

LEAST = 1e-3
"""Sensitivity relative to the bank's mean below which locations are taken to be alike."""


@torch.no_grad()
def relative_sensitivity(optimizer: Any, bank: HypermoduleBank) -> Tensor | None:
    """How much losses depend on each location, relative to the mean of its bank: `[L]`.

    Args:
        optimizer: of the run, that keeps second moments as Adam does.
        bank: whose contexts it steps.

    Returns:
        At least `LEAST`; None where no gradient was seen yet.
    """
    kept = plain(optimizer).state.get(bank.contexts, {}).get("exp_avg_sq")
    if kept is None:
        return None
    found = (bank.contexts.square() * kept).sum(1).sqrt()
    mean = found.mean()
    return (found / mean).clamp_min(LEAST) if mean > 0 else None


@torch.no_grad()
def normalise(optimizer: Any, bank: HypermoduleBank) -> None:
    """Divide the gradient of each location's soft weights by its relative sensitivity.

    A contest's gradient is `<dL/dB, B_i - B>`, so it has the size of a task's variance, and one epsilon for all of them
    leaves the smallest tasks where they are. Afterwards contests of all tasks are as fast as the bank's mean.

    Args:
        optimizer: as of `relative_sensitivity`.
        bank: in a contest whose gradient was computed, or in none.
    """
    contest = bank.contest
    if contest is None or contest.soft.grad is None:
        return
    if (size := relative_sensitivity(optimizer, bank)) is not None:
        contest.soft.grad.div_(size[contest.chosen].unsqueeze(1).to(contest.soft))
