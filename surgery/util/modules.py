"""Modules: the device that they lie on, and the modes that they are in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first parameter; the CPU where it has none.

    Example:
        >>> device_of(nn.ReLU())
        device(type='cpu')
    """
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


@contextmanager
def kept_modes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Whatever is set to training or to evaluation inside is afterwards in the mode that it was in before.

    Args:
        modules: each with its own mode; those below it do not follow.

    Example:
        >>> net = nn.Sequential(nn.Dropout())
        >>> with kept_modes(net.modules()):
        ...     assert not net.eval()[0].training
        >>> net[0].training
        True
    """
    modes = [(module, module.training) for module in modules]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
