"""Opening: single rows become hypermodules that can be trained; what they generate stays what it was."""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.methods.hypermodules.bank import HypermoduleBank
from surgery.methods.rows.bank import RowsBank
from surgery.settings.names import Scale


def fixed_bank(bank: RowsBank) -> HypermoduleBank:
    """Every single row becomes a hypermodule of one basis block, as it is; coefficients are not trained. # c = 0

    Args:
        bank: without hypermodules, as `exact_bank` makes it.
    """
    if bank.hypermodules:
        raise ValueError("only a bank of single rows can be opened")
    rows, contexts = bank.rows.detach().clone(), bank.contexts.detach()[:, :1].clone()
    opened = HypermoduleBank(bank.block, rows, bank.psi.clone(), contexts, len(rows))
    opened.contexts.requires_grad_(False)
    opened.keep_origin(bank.settled_blocks())
    return opened


def open_bank(
    bank: RowsBank,
    context: int,
    generator: torch.Generator,
    sigma: Tensor | None = None,
    scale: Scale = "contexts",
    norm: int = 1,
) -> HypermoduleBank:
    """The pessimistic start for training: each single row becomes a hypermodule of c basis blocks.

    H_k starts as noise of deviation 1/sqrt(c) and contexts are constant with |z| = sigma, sigma the standard
    deviation of the layer's weights, so that hypermodules of all layers are of one size; then
    `H_k += outer(z, B - z.H_k) / |z|^2` makes every block what it was.

    With `scale` rows it is the hypermodules that have the layers' deviations, and |z| = 1. A step of an optimizer such
    as Adam then moves weights as far as it does in plain training; otherwise it moves them |z| times as far, which for
    pretrained layers, of deviation 0.05, is next to nothing. With |z| = 1 a step of Adam moves a block sqrt(c) times as
    far; with `scale` balanced the norm of z that says how far is 1 (see `balance`), and rows are as much larger.

    Args:
        bank: without hypermodules, as `exact_bank` makes it.
        context: c.
        generator: on the CPU; decides the noise.
        sigma: `[L]`, the deviation of the weights that each location belongs to; by default that of the bank.
        scale: what carries the layers' deviations, `contexts` as in the paper, `rows`, or rows that are `balanced`.
        norm: the norm of z that is 1 where rows are balanced; see `norm_of`.
    """
    if bank.hypermodules:
        raise ValueError("only a bank of single rows can be opened")
    rows = bank.rows.detach()
    count, width = rows.shape
    # About 0, as the noise is: one weight, or equal ones, have no deviation about their mean.
    sigma = rows.square().mean().sqrt().expand(bank.locations) if sigma is None else sigma
    sigma = torch.where(sigma > 0, sigma, torch.ones_like(sigma))
    # A row that several locations use up to a factor takes the deviation of the one whose factor is 1.
    lead = torch.empty(count, dtype=rows.dtype, device=rows.device)
    lead[bank.psi] = sigma / bank.contexts.detach()[:, 0].abs().clamp_min(torch.finfo(rows.dtype).tiny)
    plain = bank.contexts.detach()[:, 0] == 1
    lead[bank.psi[plain]] = sigma[plain]
    noise = torch.randn(count, context, width, generator=generator, dtype=rows.dtype).to(rows.device)
    basis = noise / context**0.5
    if scale == "rows":
        basis, lead = basis * lead[:, None, None], torch.ones_like(lead)
    elif scale == "balanced":
        longer = context ** (1 / norm - 0.5)
        basis, lead = noise * (longer * lead)[:, None, None], torch.full_like(lead, 1 / longer)
    z = (lead / context**0.5).unsqueeze(1).expand(count, context)  # Eq. (7), sqrt(c) for c
    for _ in range(2):  # the second pass takes away the first one's rounding
        error = rows - torch.einsum("kc,kcd->kd", z, basis)
        basis = basis + torch.einsum("kc,kd->kcd", z, error) / z.square().sum(1)[:, None, None]
    contexts = z[bank.psi] * bank.contexts.detach()[:, :1]
    opened = HypermoduleBank(
        bank.block, basis.reshape(count * context, width), bank.psi.clone(), contexts, count
    )
    opened.keep_origin(bank.settled_blocks())
    return opened


def open_rest(
    bank: RowsBank,
    generator: torch.Generator,
    sigma: Tensor | None = None,
    scale: Scale = "contexts",
    norm: int = 1,
) -> HypermoduleBank:
    """Open the single rows of a bank that has hypermodules already; these stay as they are.

    Args:
        bank: with hypermodules and single rows, as an artifact holds it.
        generator: on the CPU; decides the noise of new basis blocks.
        sigma: `[L]`, as in `open_bank`.
        scale: as in `open_bank`.
        norm: as in `open_bank`.
    """
    c, count = bank.context, bank.hypermodules
    single = bank.psi >= count
    rows, contexts = bank.rows.detach(), bank.contexts.detach().clone()
    alone = RowsBank(bank.block, rows[count * c :], bank.psi[single] - count, contexts[single, :1], 0)
    opened = open_bank(alone, c, generator, None if sigma is None else sigma[single], scale, norm)
    contexts[single] = opened.contexts.detach()
    psi = bank.psi.clone()
    psi[single] = opened.psi + count
    whole = torch.cat([rows[: count * c], opened.rows.detach()])
    found = HypermoduleBank(bank.block, whole, psi, contexts, count + opened.hypermodules)
    found.keep_origin(bank.settled_blocks())
    return found
