"""Which columns of a bank's rows and blocks a process holds: all of them, where no processes share them.

What depends on whole blocks is written once, with the sums over columns from here; `surgery.training.distributed` has
processes of which each holds some.
"""

from __future__ import annotations

from torch import Tensor


class Columns:
    """All columns.

    Attributes:
        partial: whether other processes hold the rest.

    Example:
        >>> Columns().total(torch.tensor(3.0))
        tensor(3.)
    """

    partial = False

    def cut(self, tensor: Tensor) -> Tensor:
        """The columns that are held of `[N, m*n]`."""
        return tensor

    def total(self, values: Tensor) -> Tensor:
        """Sums over columns, from those over the columns that are held; it may replace them."""
        return values

    def summed(self, values: Tensor) -> Tensor:
        """The same, differentiable: gradients go back into the columns that are held."""
        return values

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of all elements of `[N, m*n]`, of which the columns that are held are given."""
        return tensor.mean()

    def find(self, places: Tensor) -> tuple[Tensor | slice, Tensor]:
        """Which of some columns are held, and where."""
        return slice(None), places
