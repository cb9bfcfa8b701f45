"""The context in which an argument's example value is made, and lookups in nested configurations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MOST = 1 << 27  # elements in one example input


class TooLargeError(ValueError):
    """A value that no example input needs to have."""


@dataclass(frozen=True)
class Sample:
    """What an argument's value depends on.

    Attributes:
        config: the model's transformers configuration.
        generator: seeded; every random value comes from it.
        dtype: of floating-point values.
        batch: examples.
        length: tokens of text.
        accepts: the names of forward's arguments; one argument tells how another one is laid out.
    """

    config: Any
    generator: torch.Generator
    dtype: torch.dtype
    batch: int = 2
    length: int = 16
    accepts: frozenset[str] = frozenset()

    def normal(self, *shape: int) -> Tensor:
        """Small normal values.

        Raises:
            TooLargeError: where a misread shape asks for gigabytes.
        """
        if math.prod(shape) > _MOST:
            raise TooLargeError(f"an example input of shape {list(shape)}")
        return (0.1 * torch.randn(shape, generator=self.generator)).to(self.dtype)


def configs(config: Any, prefer: str = "") -> Iterator[Any]:
    """A configuration and the ones nested in it, those whose name holds a word of `prefer` first."""
    nested = [(key, value) for key, value in vars(config).items() if hasattr(value, "to_dict")]
    words = prefer.split()
    first = [value for key, value in nested if any(word in key for word in words)]
    for value in first:
        yield from configs(value, prefer)
    yield config
    for _, value in nested:
        if not any(value is other for other in first):
            yield from configs(value, prefer)


def find(config: Any, names: str, default: Any, prefer: str = "") -> Any:
    """The first of the attributes `names` that a configuration or one nested in it has."""
    for part in configs(config, prefer):
        for name in names.split():
            value = getattr(part, name, None)
            if value is not None and not callable(value):
                return value
    return default


def number(config: Any, names: str, default: int, prefer: str = "") -> int:
    """Like `find`, a whole number; of a list its first."""
    value = find(config, names, default, prefer)
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return int(value) if isinstance(value, (int, float)) else default
