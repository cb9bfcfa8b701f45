"""Inflating ahead: threads undo Huffman coding while a load builds architectures and decodes earlier tensors.

Inflating takes a third of the time of a load and needs no Python; decoding what it gives stays on the thread that
asks, since each of its operations uses all cores by itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from surgery.storage.codecs import Encoded, Huffman, decode

Decode = Callable[[Encoded], Tensor]
"""How a stored form becomes its tensor: `surgery.storage.codecs.decode`, or one that has begun already."""

WINDOW = 64 << 20  # bytes that may be inflated and not asked for yet, and one tensor more
_WORTH = 1 << 20  # bytes of streams, below which threads take longer than they save
_THREADS = 4


class Ahead:
    """Decodes stored tensors, those that are Huffman-coded inflated in the order in which they will be asked for.

    Tensors that are asked for in another order, or twice, or that it does not know, are decoded all the same. It is a
    context, with which its threads end.

    Args:
        encoded: stored tensors in the order in which they will be asked for.
        threads: that inflate; by default one less than PyTorch has, at most 4.

    Example:
        >>> from surgery.storage.codecs import Precision, encode, packed
        >>> one = packed(encode(torch.randn(64, 256), Precision.parse("int4/64")))
        >>> with Ahead([one]) as ahead:
        ...     torch.equal(ahead.decode(one), decode(one))
        True
    """

    def __init__(self, encoded: Iterable[Encoded], threads: int | None = None):
        coded = {id(each): each for each in encoded if each.precision.name == Huffman.name}
        if threads is None:
            pays = sum(each.nbytes for each in coded.values()) >= _WORTH
            threads = min(torch.get_num_threads() - 1, _THREADS) if pays else 0
        self._pool = ThreadPoolExecutor(threads, "surgery-inflate") if threads > 0 else None
        self._waiting = deque(coded.values() if self._pool else ())
        self._begun: dict[int, tuple[Encoded, Future[Any]]] = {}
        self._held = 0
        self._begin()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *error: object) -> None:
        self._waiting.clear()
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        self._begun.clear()

    def decode(self, encoded: Encoded) -> Tensor:
        """The tensor that `encoded` stands for, as `surgery.storage.codecs.decode` gives it, errors included."""
        begun = self._begun.pop(id(encoded), None)
        if begun is None:
            return decode(encoded)
        streams = begun[1].result()
        self._held -= Huffman.inflated_bytes(encoded)
        self._begin()
        return Huffman.decode_inflated(encoded, streams)

    def _begin(self) -> None:
        while self._pool and self._waiting and self._held < WINDOW:
            each = self._waiting.popleft()
            self._begun[id(each)] = each, self._pool.submit(Huffman.inflate, each)
            self._held += Huffman.inflated_bytes(each)
