"""Price: what the alternatives of a contest take, so that evolution gives up what is worth less than it costs.

A hypermodule of n users takes the parameters of `min(n, c)` blocks: with at most c of them it is replaced by the blocks
themselves (see `methods.rows.settling`). What a location saves as it goes from one to another follows from how many
others use these two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.methods.hypermodules.alignment import usage
from surgery.methods.hypermodules.bank import HypermoduleBank
from surgery.methods.hypermodules.contest import Contest
from surgery.methods.hypermodules.merging import merged_saving


def saved_blocks(psi: Tensor, hypermodules: int, context: int, chosen: Tensor, candidates: Tensor) -> Tensor:
    """Blocks that are saved as a location takes each of its alternatives, all others staying where they are.

    Args:
        psi: `[L]`.
        hypermodules: K.
        context: c.
        chosen: `[N]` locations.
        candidates: `[N, A]` hypermodules, the incumbent first.

    Returns:
        `[N, A]`, 0 for the incumbent; below 0 where an alternative takes more.

    Example:
        >>> psi = torch.tensor([0, 1, 1, 2])
        >>> saved_blocks(psi, 3, 1, torch.tensor([0]), torch.tensor([[0, 1]])).tolist()
        [[0.0, 1.0]]
    """
    uses = usage(psi, hypermodules)
    left = (uses[psi[chosen]] <= context).double()  # its last block goes with it
    taken = (uses[candidates] < context).double()  # one more block
    found = left.unsqueeze(1) - taken
    return torch.where(candidates == candidates[:, :1], 0.0, found).to(torch.get_default_dtype())


def blocks_taken(psi: Tensor, hypermodules: int, context: int) -> Tensor:
    """Blocks that each location takes, `[L]`: its share of those of its hypermodule.

    Args:
        psi: `[L]`.
        hypermodules: K.
        context: c.

    Example:
        >>> blocks_taken(torch.tensor([0, 1, 1, 1]), 2, 2).tolist()
        [1.0, 0.6666666666666666, 0.6666666666666666, 0.6666666666666666]
    """
    users = usage(psi, hypermodules)[psi].double()
    return users.clamp(max=context) / users


def expected_saving(bank: HypermoduleBank) -> Tensor | None:
    """The share of a bank's blocks that its contest saves on average, differentiable; None where none is open."""
    contest = bank.contest
    if contest is None:
        return None
    return (contest.soft.softmax(1) * saved_by(bank, contest)).sum() / bank.locations


def saved_by(bank: HypermoduleBank, contest: Contest) -> Tensor:
    """Blocks that are saved as each sampled location takes each of its alternatives `[N, A]`, made once.

    Args:
        bank: as the contest was opened.
        contest: of the bank; those that merging moves decide together count as if all went.
    """
    if contest.saved is None:
        saved = saved_blocks(bank.psi, bank.hypermodules, bank.context, contest.chosen, contest.candidates)
        if contest.group is not None:
            together = contest.group >= 0
            locations, targets = contest.chosen[together], contest.candidates[together, 1]
            merged = merged_saving(bank.psi, bank.hypermodules, bank.context, locations, targets)
            saved[together, 1:] = merged.unsqueeze(1).to(saved)
        contest.saved = saved.to(contest.soft)
    return contest.saved
