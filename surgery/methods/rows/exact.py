"""Exact start: every distinct block of some tensors as a row, so that a bank generates its originals bit for bit."""

from __future__ import annotations

from torch import Tensor

from surgery.methods.rows.bank import RowsBank
from surgery.methods.rows.duplicates import distinct


def exact_bank(blocks: Tensor, block: tuple[int, int], context: int = 1) -> RowsBank:
    """The lossless start: every distinct block is a single row; identical blocks share one.

    Blocks equal up to a factor share a row too where the factor gives every value back bit for bit.

    Args:
        blocks: `[L, m*n]`, float32 or float64; the bank takes it over where no two are equal.
        block: (m, n).
        context: c that later hypermodules will have.
    """
    return RowsBank(block, *distinct(blocks, context), hypermodules=0)
