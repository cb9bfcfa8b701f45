"""Splits: a hypermodule whose users pull it apart becomes two that are equal, one for each half of its users.

Siblings can so begin with all they have in common and grow only where it helps. While a generation goes on, the
gradients of all blocks are added up; a user's pull on its hypermodule is then `z_l outer dL/dB_l`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.methods.hypermodules.alignment import usage
from surgery.methods.hypermodules.bank import HypermoduleBank
from surgery.methods.hypermodules.evolution import replace_rows
from surgery.training.loop.optimizers import Resized


@torch.no_grad()
def split(bank: HypermoduleBank, least: float) -> list[Resized]:
    """Split every shared hypermodule whose users pull apart; no block changes.

    Users are divided by whether they pull with the one that pulls most, or against it.

    Args:
        bank: with hypermodules only, in no contest, and with the pulls of a generation.
        least: a hypermodule is split where the cosine of the pulls of its two halves is below minus this.

    Returns:
        The rows, where hypermodules were split; a new one's are copies of those that its users had.
    """
    if bank.pull is None:
        return []
    psi, modules = bank.psi.clone(), []
    shared = (usage(bank.psi, bank.hypermodules) > 1) & ~bank.kept_hypermodules
    for module in shared.nonzero().flatten().tolist():
        users = (bank.psi == module).nonzero().squeeze(1)
        against = apart(bank.coefficients.detach()[users], bank.pull[users], least)
        if against is not None:
            psi[users[against]] = bank.hypermodules + len(modules)
            modules.append(module)
    if not modules:
        return []
    every = torch.cat([torch.arange(bank.hypermodules), torch.tensor(modules)]).to(psi.device)
    source = (every.unsqueeze(1) * bank.context + torch.arange(bank.context, device=psi.device)).reshape(-1)
    resized = replace_rows(bank, bank.rows.detach()[source], source, len(every))
    bank.psi = psi
    return [resized]


def apart(coefficients: Tensor, gradients: Tensor, least: float) -> Tensor | None:
    """Which users of one hypermodule pull against the others: `[N]`, boolean; None where they do not pull apart.

    Args:
        coefficients: `[N, c]`.
        gradients: `[N, d]` of the users' blocks.
        least: see `split`.

    Example:
        >>> apart(torch.ones(3, 1), torch.tensor([[2.0, 0.1], [1.0, 0.0], [-1.0, 0.0]]), 0.5).tolist()
        [False, False, True]
    """
    size = coefficients.norm(dim=1) * gradients.norm(dim=1)
    first = int(size.argmax())
    along = (coefficients @ coefficients[first]) * (gradients @ gradients[first])
    against = along < 0
    if not bool(against.any()):
        return None
    one, other = (coefficients[part].T @ gradients[part] for part in (~against, against))
    scale = float(one.norm() * other.norm())
    return against if scale > 0 and float((one * other).sum()) < -least * scale else None
