"""Atoms: one hypermodule for all locations, each of which mixes all of its basis blocks.

Matrix atoms, as *Share Your Attention* has them for the attention of a transformer's layers, of blocks instead of whole
matrices, so that members of any architecture can share them.

# MASA, arXiv 2508.04581: W_l = sum_s c_ls D_s
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from surgery.methods.hypermodules.bank import HypermoduleBank


@torch.no_grad()
def principal_atoms(blocks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The atoms that explain most of some blocks, all counted alike, and mixtures that keep their lengths.

    Args:
        blocks: `[L, d]`.
        count: c, at most d.

    Returns:
        Atoms `[c, d]`, orthonormal, and mixtures `[L, c]`.

    Example:
        >>> blocks = torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0], [1.0, 1.0, 0.0]])
        >>> atoms, mixtures = principal_atoms(blocks, 2)
        >>> torch.allclose(mixtures @ atoms, blocks, atol=1e-6)
        True
    """
    size = blocks.norm(dim=1, keepdim=True)
    unit = blocks / torch.where(size > 0, size, torch.ones_like(size))
    atoms = torch.linalg.eigh(unit.T @ unit).eigenvectors[:, -count:].T.contiguous()
    mixtures = blocks @ atoms.T
    found = mixtures.norm(dim=1, keepdim=True)
    return atoms, mixtures * torch.where(found > 0, size / found, torch.ones_like(found))


@torch.no_grad()
def share_atoms(bank: HypermoduleBank, count: int) -> HypermoduleBank:
    """Make all locations of a bank mix the same atoms; returns the bank.

    Args:
        bank: opened, not yet being optimised.
        count: c, at most as many as a block has elements.
    """
    atoms, mixtures = principal_atoms(bank.blocks().detach(), count)
    bank.context, bank.hypermodules, bank.psi = count, 1, torch.zeros_like(bank.psi)
    bank.rows, bank.contexts = nn.Parameter(atoms), nn.Parameter(mixtures)
    bank.origin = None
    return bank
