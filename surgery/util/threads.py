"""Independent pieces of work side by side, a thread each, where PyTorch would use several within each operation.

Operations on few values are not worth several threads: what they cost is the call, during which Python waits. Pieces
that have one thread each leave it to others meanwhile, and what they compute does not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import TypeVar

import torch

P = TypeVar("P")
R = TypeVar("R")


def side_by_side(work: Callable[[P], R], pieces: Sequence[P]) -> list[R]:
    """What `work` gives for each piece, in their order; as many at a time as PyTorch has threads.

    Context variables, gradient and inference mode are those of the caller.

    Args:
        work: changes nothing that another piece reads.
        pieces: of one thing; where there is only one, `work` has all threads for it.

    Raises:
        Exception: what `work` raises for the first piece for which it does; pieces that have not begun do not begin.

    Example:
        >>> side_by_side(torch.sum, [torch.ones(2), torch.ones(3)])
        [tensor(2.), tensor(3.)]
    """
    count = min(torch.get_num_threads(), len(pieces))
    if count < 2:
        return [work(piece) for piece in pieces]
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def one(piece: P) -> R:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return work(piece)

    with _single(count) as pool:
        begun = [pool.submit(copy_context().run, one, piece) for piece in pieces]
        try:
            return [each.result() for each in begun]
        finally:
            for each in begun:
                each.cancel()


@contextmanager
def _single(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for which an operation of PyTorch takes one thread; the caller's take as many as before."""
    own = torch.get_num_threads()

    def begin() -> None:
        torch.get_num_threads()  # what a thread begins with, before it is given what it has
        torch.set_num_threads(1)

    try:
        with ThreadPoolExecutor(count, "surgery-pieces", begin) as pool:
            yield pool
    finally:
        torch.set_num_threads(own)  # which is also what threads that begin later have
