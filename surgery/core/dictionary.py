"""Dictionary: all banks of a joint model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from surgery.core.bank import Bank


class Dictionary(nn.Module):
    """All banks of a joint model, by key (`"16x16-float32"`)."""

    def __init__(self, banks: dict[str, Bank] | None = None):
        super().__init__()
        self.banks = nn.ModuleDict(banks or {})

    def __getitem__(self, key: str) -> Bank:
        bank = self.banks[key]
        assert isinstance(bank, Bank)
        return bank

    def __iter__(self) -> Iterator[str]:
        return iter(self.banks)

    def keys(self) -> list[str]:
        """The banks' keys."""
        return list(self.banks.keys())


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which rows are kept while they can be trained: float32, float64 for float64 members."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def index_dtype(count: int) -> torch.dtype:
    """The smallest integer type that numbers `count` things."""
    return torch.uint8 if count <= 1 << 8 else torch.uint16 if count <= 1 << 16 else torch.int32
