"""Columns: the part of a bank's rows that one of several processes holds.

A block is a weighted sum of rows, column by column: a process that holds some columns of all rows generates these
columns of all blocks without asking anybody. Rows that come and go do so in every process alike, and no process ever
holds more than its share. What depends on whole blocks, products of rows with one another say, is a sum over columns
too, so processes add up what they found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from surgery.methods.rows.columns import Columns
from surgery.util.collectives import gather


@dataclass(frozen=True)
class SomeColumns(Columns):
    """Consecutive columns of a bank, the same number in every process; the last ones are padded with zeros.

    Attributes:
        whole: m*n, how many there are in all.
        rank: of this process.
        world: how many processes share them.

    Example:
        >>> SomeColumns(whole=3, rank=1, world=2).cut(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[3., 0.]])
    """

    partial: ClassVar[bool] = True
    whole: int
    rank: int
    world: int

    @property
    def held(self) -> int:
        """How many this process holds, padding among them."""
        return -(-self.whole // self.world)

    @property
    def first(self) -> int:
        """The first of them."""
        return self.rank * self.held

    def cut(self, tensor: Tensor) -> Tensor:
        """A process's own columns of `[N, m*n]`: `[N, held]`, in memory of their own."""
        own = tensor[:, self.first : self.first + self.held]
        found = tensor.new_zeros(len(tensor), self.held)
        found[:, : own.shape[1]] = own
        return found

    def summed(self, values: Tensor) -> Tensor:
        """The value of all processes, with the gradient of this one's part."""
        return values + (self.total(values.detach().clone()) - values.detach())

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all columns; padding is zero and does not count."""
        return self.total(tensor.sum()) / (len(tensor) * self.whole)

    def find(self, places: Tensor) -> tuple[Tensor | slice, Tensor]:
        """Which of some columns are held, a mask, and where these are."""
        own = (places >= self.first) & (places < self.first + self.held)
        return own, places[own] - self.first

    def gather(self, own: Tensor) -> Tensor:
        """All columns `[N, m*n]` from what every process holds of them, `[N, held]`; all processes call it."""
        if self.world == 1:
            return own
        return self.join(gather(own.reshape(-1), self.world).view(-1, *own.shape))

    def join(self, parts: Tensor) -> Tensor:
        """`[world, N, held]` to `[N, m*n]`."""
        return parts.transpose(0, 1).flatten(1)[:, : self.whole]

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place of the tensor where it is contiguous; all processes call it."""
        values = values.contiguous()
        torch.distributed.all_reduce(values)
        return values
