"""Methods whose banks are stored as rows and codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from surgery.anatomy.plan import BankPlan, Placement
from surgery.core.bank import Bank
from surgery.core.tensor_method import TensorMethod
from surgery.methods.rows import parts as stored
from surgery.methods.rows.bank import exact_bank
from surgery.storage.codecs import Encoded


class RowsMethod(TensorMethod):
    """What methods whose banks are rows and codes have in common: everything about stored parts."""

    form: ClassVar[str] = "rows"
    stored_as: ClassVar[str] = "shared rows"

    def make(self, plan: BankPlan, blocks: Tensor, generator: torch.Generator) -> Bank:
        """Every distinct block as a row: nothing is lost."""
        return exact_bank(blocks, plan.block)

    def unpack(self, plan: BankPlan, parts: Mapping[str, Tensor]) -> Bank:
        """A bank of rows and codes."""
        return stored.unpack(plan, parts)

    def wrong_parts(self, plan: BankPlan, parts: Mapping[str, Encoded]) -> list[str]:
        """What cannot be true of stored rows and codes."""
        return stored.wrong_parts(plan, parts)

    def restrict(
        self, plan: BankPlan, placements: Sequence[Placement], parts: Mapping[str, Encoded]
    ) -> tuple[BankPlan, list[Placement], dict[str, Encoded]]:
        """The rows that some placements use."""
        return stored.restrict(plan, placements, parts)

    def alignment(self, plan: BankPlan, parts: Mapping[str, Encoded]) -> tuple[Tensor, int]:
        """What locations draw on."""
        return stored.alignment(parts)

    def location_bytes(self, plan: BankPlan, parts: Mapping[str, Encoded]) -> Tensor:
        """Rows are divided among the locations that draw on them."""
        return stored.location_bytes(parts)
