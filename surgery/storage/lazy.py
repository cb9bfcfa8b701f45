"""Handles: tensors that are read, decoded, generated or made when they are asked for.

A handle says shape, dtype and device without the tensor being there. `read` gives the tensor, which the handle does not
keep: it is gone as soon as whoever asked lets go of it, so a stage that goes through a model tensor by tensor holds one
of them at a time. What is resident is one kind of handle, `Resident`; a tensor in a file is another, `InFile`; whatever
a function makes is `Made`. Handles of a stored form (`surgery.storage.codecs.Decoded`) and of a bank
(`surgery.core.generation.Generated`) lie beside what they read.

Files are written from handles and content hashes taken of them, so this module lies below both.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from surgery.disk.tensorheader import parse_header
from surgery.disk.untrusted import UnreadableError, open_regular

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


@dataclass(frozen=True)
class InFile(Handle):
    """A tensor, or some of its rows, of a safetensors file.

    The bytes are read into memory of the tensor's own. Nothing stays mapped, so that pages of the file do not count as
    this process's memory, and the file may be replaced.

    Attributes:
        path: of the file.
        begin: where the tensor's bytes begin in it.
    """

    path: Path
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device = CPU

    def read(self) -> Tensor:
        """The tensor, read from the file.

        Raises:
            UnreadableError: where the file is gone, or too short by now.
        """
        tensor = torch.empty(self.shape, dtype=self.dtype)
        if tensor.numel():
            with open_regular(self.path) as file:
                file.seek(self.begin)
                if (found := file.readinto(_memory(tensor))) != self.nbytes:  # pyright: ignore[reportAttributeAccessIssue]
                    raise UnreadableError(
                        f"must have {self.nbytes:,} bytes from byte {self.begin:,} on, but has {found:,}"
                    )
        return tensor

    def rows(self, start: int, stop: int) -> InFile:
        """Some rows of the tensor, which are read alone.

        Args:
            start: first index of the first axis.
            stop: one past the last index.
        """
        each = math.prod(self.shape[1:]) * self.dtype.itemsize
        return InFile(self.path, self.begin + start * each, (stop - start, *self.shape[1:]), self.dtype)


def tensors_in_file(path: Path) -> dict[str, InFile]:
    """All tensors of a safetensors file, by name, of dtypes that PyTorch has.

    Raises:
        UnreadableError: where it is no safetensors file, or holds a tensor of another dtype.

    Example:
        >>> sum(handle.nbytes for handle in tensors_in_file(Path("model.safetensors")).values())
        90864192
    """
    header, dtypes = parse_header(path), file_dtypes()
    if bad := [f"{name} ({kind})" for name, (kind, _) in header.tensors.items() if kind not in dtypes]:
        raise UnreadableError(f"must hold tensors of dtypes that PyTorch has, but holds {', '.join(bad[:5])}")
    return {
        name: InFile(path, header.begins[name], shape, dtypes[kind])
        for name, (kind, shape) in header.tensors.items()
    }


def file_dtypes() -> dict[str, torch.dtype]:
    """PyTorch's dtypes by the names that safetensors files have for them."""
    from safetensors.torch import _TYPES

    return {**_TYPES, "F8_E8M0": torch.float8_e8m0fnu}


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


class LazyState(Mapping[str, Any]):
    """A state dict of handles that reads like one of tensors: `state[name]` reads, and keeps nothing.

    What is no handle, such as extra state, is given as it is. Names that are tied have one handle, but a tensor each
    time that it is read.

    Example:
        >>> state = LazyState({"a": Made((2,), torch.int64, CPU, lambda: torch.arange(2)), "step": 3})
        >>> state["a"], state["step"], state.handles["a"].nbytes
        (tensor([0, 1]), 3, 16)
    """

    def __init__(self, entries: Mapping[str, Any]):
        self.entries = dict(entries)

    @property
    def handles(self) -> dict[str, Handle]:
        """The handles by name."""
        return {name: each for name, each in self.entries.items() if isinstance(each, Handle)}

    def __getitem__(self, name: str) -> Any:
        return read(self.entries[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read
        return name in self.entries

    def look(self, name: str) -> Any:
        """An entry as `state[name]` gives it, for somebody who does not write to it."""
        entry = self.entries[name]
        return entry.look() if isinstance(entry, Handle) else entry

    def resident(self, *, writable: bool = True) -> dict[str, Any]:
        """All of it read: an ordinary dict, in which tied names have one tensor.

        Args:
            writable: whether somebody may write to the tensors; those that are mapped are copied then.
        """
        made: dict[int, Any] = {}
        for name, each in self.entries.items():
            if id(each) not in made:
                made[id(each)] = read(each) if writable else self.look(name)
        return {name: made[id(each)] for name, each in self.entries.items()}


def handles_of(state: Mapping[str, Any]) -> dict[str, Handle]:
    """Handles of a state dict's tensors, of handles or resident; extra state is left out."""
    if isinstance(state, LazyState):
        return state.handles
    return {name: Resident(tensor) for name, tensor in state.items() if isinstance(tensor, Tensor)}


def read(entry: Any) -> Any:
    """The tensor of a handle; anything else as it is."""
    return entry.read() if isinstance(entry, Handle) else entry


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor that is not empty."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
