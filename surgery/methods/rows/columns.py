"""Which columns of a bank's rows and blocks a process holds: all of them, where no processes share them.

What depends on whole blocks is written once, with the sums over columns from here; `surgery.training.distributed` has
processes of which each holds some.
"""

from __future__ import annotations

from torch import Tensor


class Columns:
    """The columns of rows and blocks that a process holds: here all of them.

    Attributes:
        partial: whether other processes hold the rest.

    Example:
        >>> import torch
        >>> Columns().total(torch.tensor(3.0))
        tensor(3.)
    """

    partial = False

    def cut(self, tensor: Tensor) -> Tensor:
        """The columns of `[N, m*n]` that this process holds."""
        return tensor

    def total(self, values: Tensor) -> Tensor:
        """Sums over all columns, from sums over those that this process holds; it may change them in place."""
        return values

    def summed(self, values: Tensor) -> Tensor:
        """`total`, differentiable: gradients go back into the columns that this process holds."""
        return values

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of all elements of `[N, m*n]`, given the columns that this process holds."""
        return tensor.mean()

    def find(self, places: Tensor) -> tuple[Tensor | slice, Tensor]:
        """Which of some columns are held, and where."""
        return slice(None), places
