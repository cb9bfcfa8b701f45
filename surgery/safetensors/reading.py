"""Tensors of a safetensors file as handles, read one by one into memory of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from surgery.disk.untrusted import UnreadableError, open_regular
from surgery.handles.handle import CPU, Handle
from surgery.safetensors.dtypes import file_dtypes
from surgery.safetensors.header import parse_header


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


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor that is not empty."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
