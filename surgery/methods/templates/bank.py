"""Templates in training: the rows of one tensor of a stack's layers, and the mixtures that all its tensors share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from surgery.anatomy.plan import Placement
from surgery.core.bank import Bank, Trained
from surgery.methods.rows.bank import RowsBank
from surgery.settings.names import Mixing


class TemplateBank(RowsBank):
    """One tensor of K templates, each a row as long as the whole tensor; a location is a layer.

    It is one hypermodule whose K basis blocks are the templates, so that it is stored and settled as rows and codes.

    Attributes:
        contexts: parameter `[L, K]`, one object for all banks of a stack.
        mixing: how `coefficients` follow from contexts: `linear` and `one-hot`, as they are; `softmax`.
    """

    form: ClassVar[str] = "rows"

    def __init__(
        self, block: tuple[int, int], rows: Tensor, psi: Tensor, mixtures: nn.Parameter, mixing: Mixing
    ):
        super().__init__(block, rows, psi, mixtures.detach(), 1)
        self.contexts, self.mixing = mixtures, mixing

    @classmethod
    def of(cls, bank: RowsBank) -> TemplateBank:
        """The same bank, ready to be trained; parameters are the same objects."""
        if isinstance(bank, cls):
            return bank
        made = cls(bank.block, bank.rows.detach(), bank.psi, bank.contexts, "linear")
        made.rows, made.origin = bank.rows, bank.origin
        return made.train(bank.training)

    @property
    def coefficients(self) -> Tensor:
        """The mixtures `[L, K]`, differentiable."""
        return self.contexts.softmax(1) if self.mixing == "softmax" else self.contexts

    def trained(self) -> list[Trained]:
        """Templates, which decay, and mixtures, which do not."""
        rows, mixtures = super().trained()
        return [rows, Trained("mixtures", mixtures.parameters, decay=False)]

    def refuses(self, locations: Tensor) -> str:
        """Mixtures of which each is positive reach no given block."""
        return super().refuses(locations) if self.mixing == "linear" else "it is a mixture of templates"

    def location_parameters(self, placements: Sequence[Placement], first: bool = True) -> Tensor:
        """Templates that are used, where they are fewer than the layers, and once the mixtures that are trained."""
        used = int((self.coefficients != 0).any(0).sum())
        whole = min(used, self.locations) * self.width
        if first and self.contexts.requires_grad:
            whole += self.contexts.numel()
        return torch.full((self.locations,), whole / self.locations, dtype=torch.float64)

    def together(self) -> object | None:
        """Banks of one stack, whose rows side by side make a whole stack one product."""
        return None if self.columns.partial else (id(self.contexts), self.rows.dtype)

    @staticmethod
    def generate_together(banks: Sequence[Bank], task: str | None = None) -> Tensor:
        """`coefficients @ [rows of all tensors]`."""
        mine = [bank for bank in banks if isinstance(bank, TemplateBank)]
        return mine[0].coefficients @ torch.cat([bank.rows for bank in mine], 1)
