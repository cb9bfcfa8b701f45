"""Seeds global random generators for a while and restores them.

This package draws from generators of its own. Models do not: their constructors, a user's factory and a user's data
draw from the global generators of PyTorch, NumPy and Python.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def member_seed(seed: int, name: str) -> int:
    """The seed of a member's random weights: of 32 bits, by the seed of a run and the member's name.

    It follows the name and not the position, so that a member gets the same weights whatever other members there are
    and in whatever order, and two members of one architecture get different ones.

    Example:
        >>> member_seed(0, "net"), member_seed(0, "other"), member_seed(1, "net")
        (1945099854, 1286925362, 3996520328)
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global CPU generator at `seed`, and afterwards where it was; `torch.manual_seed` costs more than a step."""
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


@contextmanager
def seeded_others(seed: int) -> Iterator[None]:
    """Python's and NumPy's global generators at `seed`, and afterwards where they were."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class Draws:
    """Whether anything was drawn from the global generators since this was made.

    Args:
        devices: whether those of CUDA devices count too, for which one has to wait.
    """

    def __init__(self, devices: bool = True) -> None:
        self._devices = devices
        self._before = _states(devices)

    @property
    def any(self) -> bool:
        """Whether a generator moved."""
        return self._before != _states(self._devices)


@contextmanager
def all_seeded(seed: int) -> Iterator[Draws]:
    """All global generators that a model may draw from at `seed`, and afterwards where they were.

    Yields:
        what says whether anything was drawn so far.

    Example:
        >>> with all_seeded(1) as draws:
        ...     first = torch.rand(()).item()
        ...     draws.any
        True
        >>> with all_seeded(1) as draws:
        ...     draws.any, torch.rand(()).item() == first
        (False, True)
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices, enabled=bool(devices)), seeded(seed), seeded_others(seed):
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield Draws()


def _states(on_devices: bool) -> tuple[Any, ...]:
    devices = torch.cuda.get_rng_state_all() if on_devices and torch.cuda.is_initialized() else []
    kind, keys, *rest = np.random.get_state(legacy=True)
    tensors = tuple(state.numpy().tobytes() for state in (torch.default_generator.get_state(), *devices))
    return tensors, random.getstate(), kind, np.asarray(keys).tobytes(), tuple(rest)
