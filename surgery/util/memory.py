"""Caches memory of large CPU results, as PyTorch does on GPUs.

The C library returns any allocation above 32 MiB to the operating system as soon as it is freed, so every
step of a training pays for the first touch of fresh pages, which can cost more than the arithmetic that fills
them (most of all in virtual machines that return free memory to their host). Here the few latest regions are
kept, and one is used again once no tensor lives in it any more: no result changes while it is in use.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
import threading
import weakref

import torch
from torch import Tensor

FRESH_MEMORY_BYTES = 32 * 2**20  # glibc's largest allocation that may use memory freed earlier (64-bit)
LARGEST_KEPT = 2**30  # bytes; where blocks are larger, memory is scarcer than the time of its first touch
REGIONS_KEPT = 6  # blocks, their gradient and the rows' gradient, each with a spare

_USED_UP = ("out of memory", "can't allocate memory", "not enough memory")  # what allocators say

_regions: list[
    tuple[mmap.mmap, weakref.ref[memoryview]]
] = []  # latest first; the view lives as its tensors do
_lock = threading.Lock()


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory is used up: that of a device, or the CPU's, which has no kind of its own.

    Example:
        >>> ran_out(MemoryError()), ran_out(RuntimeError("sizes differ"))
        (True, False)
    """
    kinds = torch.OutOfMemoryError, MemoryError
    return isinstance(error, kinds) or any(word in str(error) for word in _USED_UP)


def empty_kept(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor, in a kept region if one of its size is free; above 1 GiB never in one.

    Args:
        rows: number of rows.
        columns: number of columns.
        dtype: of the result.

    Returns:
        `[rows, columns]`, contiguous, sharing memory with no tensor that is still alive.

    Example:
        >>> empty_kept(3, 4, torch.float32).shape
        torch.Size([3, 4])
    """
    count = rows * columns
    size = count * dtype.itemsize
    if not size or size > LARGEST_KEPT or sys.platform == "win32":
        return torch.empty(rows, columns, dtype=dtype)
    with _lock:
        free = [memory for memory, user in _regions if user() is None and size <= len(memory) <= 2 * size]
        memory = free[0] if free else _map(size)
        # The tensor's storage holds it, and all views of the tensor hold the storage.
        view = memoryview(memory)
        others = [region for region in _regions if region[0] is not memory]
        _regions[:] = [(memory, weakref.ref(view)), *others][:REGIONS_KEPT]
        return torch.frombuffer(view, dtype=dtype, count=count).view(rows, columns)


def empty_large(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor that is meant to stay, in huge pages where it is large and on the CPU.

    Filling 47 MB of fresh memory takes about 2 ms in huge pages and 30 ms in ordinary ones.

    Example:
        >>> empty_large((3, 4), torch.float32, torch.device("cpu")).shape
        torch.Size([3, 4])
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if device.type != "cpu" or sys.platform == "win32" or size < FRESH_MEMORY_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(_map(size), dtype=dtype, count=count).view(shape)


def compact(tensor: Tensor) -> Tensor:
    """The tensor itself where its storage holds nothing else, a copy where it is a view of something larger.

    Files of tensors and `deepcopy` take whole storages, so what is handed on should hold no more than itself.

    Args:
        tensor: of any shape and dtype.

    Returns:
        equal values, the storage exactly `numel * itemsize` bytes.

    Example:
        >>> row = torch.zeros(3, 4)[1]
        >>> row.untyped_storage().nbytes(), compact(row).untyped_storage().nbytes()
        (48, 16)
    """
    return tensor if is_compact(tensor) else tensor.clone()


def is_compact(tensor: Tensor) -> bool:
    """Whether a tensor's storage holds nothing else.

    Example:
        >>> is_compact(torch.zeros(3)), is_compact(torch.zeros(3)[1:])
        (True, False)
    """
    return tensor.device.type == "meta" or tensor.untyped_storage().nbytes() == tensor.nbytes


def release_kept() -> None:
    """Give the kept regions back to the operating system: each at once, or when its last tensor ends.

    Example:
        >>> release_kept()
    """
    with _lock:
        _regions.clear()


def give_back() -> None:
    """Return freed memory to the operating system, kept regions included: between stages, where large tensors ended.

    The C library keeps what lies between tensors that are still alive, which the next stage may be unable to use.

    Example:
        >>> give_back()
    """
    release_kept()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)


def _map(size: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without huge pages: only time is lost
            memory.madvise(mmap.MADV_HUGEPAGE)  # fewer first touches, and fewer misses in address translation
    return memory
