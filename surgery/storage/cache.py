"""A cache of decoded tensors, bounded by bytes.

Layers of a model are used in turn, for which the usual rule of dropping what was used longest ago is the worst one: a
cache that does not hold all of them would hold none when it is asked. Here a tensor makes room only for one that was
used twice since, so what fits stays, and what belongs to a member that is no longer used is replaced.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class _Entry:
    used: int  # when it was asked for last
    owner: weakref.ref
    tensor: Tensor | None = None
    version: int = 0  # of the tensor, to see who wrote to it


class Cache:
    """Decoded tensors by what they are decoded from, which is dropped together with its tensor.

    Attributes:
        limit: bytes that it holds at most.

    Example:
        >>> class Codes: pass
        >>> cache, codes = Cache(limit=8), Codes()
        >>> cache.take(codes, lambda: torch.zeros(2)) is cache.take(codes, lambda: torch.zeros(2))
        True
        >>> cache.nbytes
        8
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._lock = threading.RLock()  # an owner's end may be noticed while it is held
        self._entries: dict[int, _Entry] = {}
        self._asked = 0

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> list[Tensor]:
        """All that is held."""
        return [each.tensor for each in [*self._entries.values()] if each.tensor is not None]

    def take(self, owner: object, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that nobody may write to.

        Args:
            owner: what it is decoded from, always the same tensor.
            make: decodes it where it is not held.
        """
        key = id(owner)
        with self._lock:
            self._asked += 1
            entry = self._entries.get(key)
            if entry is None:
                entry = _Entry(0, weakref.ref(owner, lambda _: self._entries.pop(key, None)))
                self._entries[key] = entry
            before, entry.used, held = entry.used, self._asked, entry.tensor
        if held is not None and held._version == entry.version:
            return held
        with torch.inference_mode(False), torch.no_grad():  # for gradients of activations too
            made = make()
        with self._lock:
            entry.tensor = None
            if self._has_room(made.nbytes, before):
                entry.tensor, entry.version = made, made._version
        return made

    def _has_room(self, wanted: int, before: int) -> bool:
        """Drop what was not used since `before`, where that is enough."""
        room, dropped = self.limit - self.nbytes, []
        held = [each for each in self._entries.values() if each.tensor is not None]
        for each in sorted(held, key=lambda each: each.used):
            if room >= wanted or each.used >= before:
                break
            assert each.tensor is not None
            room += each.tensor.nbytes
            dropped.append(each)
        if room < wanted:
            return False
        for each in dropped:
            each.tensor = None
        return True
