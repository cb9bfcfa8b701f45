"""Sums, means and gathers over processes, of several tensors in one call.

Sums are taken in float32, or in float64 where any of the tensors is of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def processes() -> int:
    """How many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


@torch.no_grad()
def in_one_call(tensors: Iterable[Tensor], change: Callable[[Tensor], Tensor]) -> None:
    """Change tensors in place, element by element, all of them by one call.

    Args:
        tensors: floating point, of any shapes.
        change: takes all elements `[N]`, which it may overwrite, and returns as many.

    Example:
        >>> one, two = torch.ones(2), torch.ones(1, 3)
        >>> in_one_call([one, two], lambda flat: flat * 2)
        >>> two
        tensor([[2., 2., 2.]])
    """
    found = list(tensors)
    if not found:
        return
    dtype = torch.float64 if any(each.dtype == torch.float64 for each in found) else torch.float32
    flat = change(torch.cat([each.reshape(-1).to(dtype) for each in found]))
    for each, part in zip(found, flat.split([each.numel() for each in found]), strict=True):
        each.copy_(part.view_as(each))


def add_up(tensors: Iterable[Tensor]) -> None:
    """Give tensors, in place, their sum over the processes; all processes call it."""
    if processes() > 1:
        in_one_call(tensors, _sum)


def average(tensors: Iterable[Tensor], weight: float = 1.0) -> None:
    """Give tensors, in place, their mean over the processes; all processes call it.

    Args:
        tensors: floating point, the same ones in every process.
        weight: of this process; weights have the mean 1.
    """
    if (world := processes()) > 1:
        in_one_call(tensors, lambda flat: _sum(flat * weight).div_(world))


def gather(own: Tensor, world: int) -> Tensor:
    """`[N]` of every process as `[world, N]`; all processes call it."""
    parts = own.new_empty(world * len(own))
    distributed = torch.distributed
    # The second name is deprecated from PyTorch 2.14 on, which brought the first.
    call = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    call(parts, own.contiguous())
    return parts.view(world, -1)


def _sum(flat: Tensor) -> Tensor:
    torch.distributed.all_reduce(flat)
    return flat
