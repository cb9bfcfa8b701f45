"""Large tensors in files of their own, of which the system may take the memory and give it back: what a run keeps.

Inside `aside(folder)` whatever is to be kept for long is put into a file without a name, mapped into memory: its pages
can be written to disk when memory is short, where ordinary memory would be exhausted. Values are what they were, so
results are. Outside of it, and for small tensors, nothing is done. A file ends with the tensor that lies in it, and
with the process, however it ends. Room on the disk is taken before anything is written, as a mapped page that finds
none would end the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import os
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from surgery.disk.claims import ASIDE
from surgery.errors import LoadError, OutputError

FEWEST = 1 << 20  # bytes of a tensor that is worth a file
PASSING = 1 << 20  # bytes from which a tensor that is not kept gets pages of its own
ORDINARY = 32 << 20  # likewise outside of large runs, as the C library has it once large tensors have ended

_MMAP_THRESHOLD = -3  # of `mallopt`

_folder: ContextVar[Path | None] = ContextVar("folder of tensors that are put aside", default=None)


@contextmanager
def aside(folder: str | Path | None) -> Iterator[None]:
    """Inside, `put_aside` puts large tensors into files, and memory of those that pass goes back when they end.

    Args:
        folder: on a disk with room for them; None to keep everything in memory. It stays empty.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, aside(folder):
        ...     put_aside(torch.ones(1 << 20)).sum(), list(Path(folder).iterdir())
        (tensor(1048576.), [])
    """
    able = folder is not None and sys.platform == "linux"
    token = _folder.set(Path(folder) if able and folder is not None else None)
    if able:
        _map_from(PASSING)
    try:
        yield
    finally:
        _folder.reset(token)
        if able:
            _map_from(ORDINARY)


def _map_from(nbytes: int) -> None:
    """Let the C library map what is allocated from so many bytes on, which it then unmaps when it is freed.

    What it takes from its heap instead leaves holes between tensors that stay, which aligned tensors of the same size
    do not fit into again: a heap of 1.8 GiB was seen to hold 0.25.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, nbytes)


def is_aside() -> bool:
    """Whether large tensors are put into files."""
    return _folder.get() is not None


def put_aside(tensor: Tensor) -> Tensor:
    """The tensor, or an equal one in a file where it is large: of its values, shape and strides.

    Args:
        tensor: any; what does not lie densely in the CPU's memory is given as it is.

    Raises:
        OutputError: where the disk has no room.
        LoadError: where it lies in a file that was cut off.
    """
    folder = _folder.get()
    if folder is None or type(tensor) is not Tensor or tensor.requires_grad or tensor.device.type != "cpu":
        return tensor
    if tensor.layout != torch.strided or tensor.nbytes < FEWEST or not _is_dense(tensor):
        return tensor
    tensor = tensor.resolve_conj().resolve_neg()
    flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data
    held = torch.empty(0, dtype=tensor.dtype).set_(_room(folder, tensor.nbytes, flat))  # pyright: ignore
    return held.as_strided(tensor.shape, tensor.stride(), 0)


def empty_aside(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised tensor, in a file where one would be put aside.

    Args:
        shape: of it.
        like: of which it has dtype and device.
    """
    folder, nbytes = _folder.get(), math.prod(shape) * like.dtype.itemsize
    if folder is None or nbytes < FEWEST or like.device.type != "cpu":
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    held = torch.empty(0, dtype=like.dtype).set_(_room(folder, nbytes))  # pyright: ignore
    return held.view(shape)


@torch.no_grad()
def stack_aside(count: int, parts: Iterable[Tensor]) -> Tensor:
    """`torch.stack` of tensors that are made one after another, no two of which are there at once.

    Args:
        count: how many there are.
        parts: of one shape and dtype.

    Example:
        >>> stack_aside(2, (torch.full((3,), float(i)) for i in range(2))).tolist()
        [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    """
    made = iter(parts)
    first = next(made)
    found = empty_aside((count, *first.shape), first)
    found[0] = first
    del first
    for number, part in enumerate(made, 1):
        found[number] = part
    return found


def _is_dense(tensor: Tensor) -> bool:
    """Whether elements fill a piece of memory, in whatever order."""
    axes = sorted(((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1))
    expected = 1
    for stride, length in axes:
        if stride != expected:
            return False
        expected *= length
    return True


def _room(folder: Path, nbytes: int, content: memoryview | None = None) -> torch.UntypedStorage:
    """Memory of a new file, which has no name any more; its content is written, which mapped pages take longer for."""
    path = folder / f"{ASIDE}{secrets.token_hex(8)}"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(handle, 0, nbytes)
            made = cast("torch.UntypedStorage", torch.UntypedStorage.from_file(str(path), True, nbytes))
            path.unlink()  # before it is written, which takes long enough to be killed meanwhile
            start = 0
            while content is not None and start < nbytes:
                start += os.pwrite(handle, content[start:], start)
            return made
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno == errno.EFAULT:  # a mapping that has lost its file, where the system reads it
            raise LoadError(
                "A file was cut off while its weights were read from it: put it back whole, and run this again once "
                "nothing writes to it."
            ) from error
        raise OutputError(
            f"A run of models this large keeps tensors in files in {folder}, but {nbytes:,} bytes more cannot be "
            f"had there ({error.strerror}): make room on that disk, or write to another one."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
