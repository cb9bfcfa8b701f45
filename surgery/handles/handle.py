"""Handles: tensors that are read, decoded, generated or made when they are asked for.

A handle says shape, dtype and device without the tensor being there. `read` gives the tensor, which the handle does not
keep: it is gone as soon as whoever asked lets go of it, so a stage that goes through a model tensor by tensor holds one
of them at a time. What is resident is one kind of handle, `Resident`; whatever a function makes is `Made`. Handles of a
file (`surgery.safetensors.reading.InFile`), of a stored form (`surgery.storage.codecs.Decoded`) and of a bank
(`surgery.core.generation.Generated`) lie beside what they read.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

CPU = torch.device("cpu")
Value = TypeVar("Value")


class Handle(ABC):
    """A tensor that is there when it is asked for.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        device: on which it will be.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def read(self) -> Tensor:
        """The tensor; a handle that makes it keeps no reference to it."""

    def look(self) -> Tensor:
        """The tensor, for somebody who does not write to it: one that is mapped is not copied."""
        return self.read()

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes when it is there."""
        return math.prod(self.shape) * self.dtype.itemsize


class Resident(Handle):
    """A tensor that is in memory anyhow.

    Example:
        >>> Resident(torch.zeros(2, 3)).nbytes
        24
    """

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach()
        self.shape, self.dtype, self.device = tuple(tensor.shape), tensor.dtype, tensor.device

    def read(self) -> Tensor:
        """The tensor itself."""
        return self.tensor


@dataclass(frozen=True)
class Made(Handle):
    """A tensor that a function makes, the same one each time.

    Example:
        >>> Made((2,), torch.int64, CPU, lambda: torch.arange(2)).read()
        tensor([0, 1])
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    make: Callable[[], Tensor]

    def read(self) -> Tensor:
        """What the function returns."""
        return self.make()


class Shared(Generic[Value]):
    """What several handles are made of: made when the first of them is read, dropped when each has been.

    Handles that are read again make it again.

    Args:
        make: makes it.
        users: number of handles, of which each takes it once when it is read.

    Example:
        >>> shared = Shared(lambda: print("made") or "value", users=2)
        >>> shared.take(), shared.take(), shared.held
        made
        ('value', 'value', False)
    """

    def __init__(self, make: Callable[[], Value], users: int):
        self.make, self.users = make, users
        self._value: Value | None = None
        self._left = 0

    @property
    def held(self) -> bool:
        """Whether it is in memory."""
        return self._left > 0

    def take(self) -> Value:
        """It, for one handle that is read."""
        if not self._left:
            self._value, self._left = self.make(), self.users
        value = cast("Value", self._value)
        self._left -= 1
        if not self._left:
            self._value = None
        return value


def read(entry: Any) -> Any:
    """The tensor of a handle; anything else as it is."""
    return entry.read() if isinstance(entry, Handle) else entry
