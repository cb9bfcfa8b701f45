"""Recorder on real tensors for modules without weights: each weight is made when it is first used.

A module that was built empty has its parameters on the meta device. Where its forward pass looks at data that
depend on weights, small random ones stand for them, drawn by the parameter's number, and are let go when
nothing refers to them any longer, so that memory stays far below that of all weights together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from surgery.tracing.bounds import Watch
from surgery.tracing.recorder import Recorder, off_meta

DEVIATION = 0.02  # of the weights that stand for others


class LazyRecorder(Recorder):
    """Records on the CPU a module whose parameters and buffers are on the meta device."""

    def __init__(
        self, names: dict[int, str], parameters: Sequence[nn.Parameter], watch: Watch | None = None
    ) -> None:
        super().__init__(names, parameters, watch)
        self.made: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        self.numbers: dict[int, int] = {}

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call with real tensors in place of those without data."""
        if func is getattr and args[1] in ("device", "is_meta") and args[0].is_meta:
            return torch.device("cpu") if args[1] == "device" else False

        def real(item: Any) -> Any:
            if isinstance(item, Tensor) and item.is_meta:
                return self._make(item)
            return off_meta(item)

        args, kwargs = tree_map(real, tuple(args)), tree_map(real, dict(kwargs))
        return func(*args, **kwargs)

    def _make(self, tensor: Tensor) -> Tensor:
        """The stand-in of a tensor without data: the same one for as long as something refers to it."""
        value = self.made.get(id(tensor))
        if value is None:
            number = self.numbers.setdefault(id(tensor), len(self.numbers))
            generator = torch.Generator().manual_seed(number)
            if tensor.is_floating_point():
                value = (DEVIATION * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
            else:
                value = torch.zeros(tensor.shape, dtype=tensor.dtype)
            self.made[id(tensor)] = value
            self.nodes[value] = self._node(tensor)
        return value
