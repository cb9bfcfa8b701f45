"""Shards: tensors of which each process holds a part, put together on the CPU and taken apart again.

Two kinds of parts: columns of a bank's rows (`training.distributed.columns`), and chunks along the first axis, as
PyTorch's `fully_shard` cuts parameters. Tensors go over the device in pieces, so that none is ever whole there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from surgery.training.distributed.columns import SomeColumns
from surgery.util.collectives import gather

_PIECE = 1 << 22  # numbers of each process that go over the device at once


class Part(Protocol):
    """How a tensor is cut."""

    def own(self, whole: Tensor) -> Tensor:
        """What this process holds of it, in memory of its own."""
        ...

    def whole(self, own: Tensor, device: torch.device, everywhere: bool = False) -> Tensor:
        """The tensor put together again; all processes call it.

        Args:
            own: what this process holds.
            device: over which parts are exchanged.
            everywhere: whether all processes get it, rather than the main one alone.

        Returns:
            the tensor on the CPU, where this process gets it; elsewhere an empty one.
        """
        ...


@dataclass(frozen=True)
class ColumnPart:
    """Columns of rows `[R, m*n]`."""

    columns: SomeColumns

    def own(self, whole: Tensor) -> Tensor:
        """The columns that this process holds, `[R, m*n]` to `[R, held]`."""
        return self.columns.cut(whole)

    def whole(self, own: Tensor, device: torch.device, everywhere: bool = False) -> Tensor:
        """All columns, `[R, held]` to `[R, m*n]`."""
        parts = collect(own.reshape(-1), self.columns.rank, self.columns.world, device, everywhere)
        return parts if parts.ndim == 1 else self.columns.join(parts.view(-1, *own.shape)).contiguous()


@dataclass(frozen=True)
class ChunkPart:
    """Chunks along the first axis of a tensor of this shape; the last ones are shorter, or empty."""

    shape: torch.Size
    rank: int
    world: int

    @property
    def rows(self) -> int:
        """Of the longest chunk."""
        return -(-self.shape[0] // self.world)

    def own(self, whole: Tensor) -> Tensor:
        """This process's chunk."""
        return whole[self.rank * self.rows : (self.rank + 1) * self.rows].contiguous().clone()

    def whole(self, own: Tensor, device: torch.device, everywhere: bool = False) -> Tensor:
        """All chunks."""
        size = self.rows * self.shape[1:].numel()
        flat = own.reshape(-1)
        parts = collect(F.pad(flat, (0, size - len(flat))), self.rank, self.world, device, everywhere)
        return parts if parts.ndim == 1 else parts.view(-1)[: self.shape.numel()].view(self.shape)


def collect(own: Tensor, rank: int, world: int, device: torch.device, everywhere: bool) -> Tensor:
    """`[N]` of every process as `[world, N]` on the CPU, piece by piece; where it is not wanted, nothing `[0]`."""
    wanted = everywhere or rank == 0
    found = torch.empty((world, len(own)) if wanted else (0,), dtype=own.dtype)
    for start in range(0, len(own), _PIECE):
        piece = own[start : start + _PIECE].to(device)
        parts = gather(piece, world)
        if wanted:
            found[:, start : start + len(piece)] = parts.cpu()
    return found


def reshard(module: nn.Module) -> None:
    """Leave every process with its own part alone: without a backward pass FSDP keeps a root's weights gathered, and
    what is gathered does not follow the dictionary.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
