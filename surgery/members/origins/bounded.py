"""Bounds on what a configuration may build: parameters, and elements of any one tensor.

A configuration that claims a thousand million layers or a vocabulary that no memory holds is refused when the module
that it builds grows beyond what its weights could fill, before memory is taken.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from surgery.errors import LoadError

MOST_PARAMETERS = 1 << 18  # the largest mixtures of experts have a third of that
MOST_ELEMENTS = 1 << 33  # of one tensor: 32 GiB in float32
SLACK = 16  # a module may split or repeat what its file holds once
_ROOM = 1 << 26  # elements that any module may have besides, in buffers and masks
_MORE = 4096  # parameters that any module may have besides


@contextlib.contextmanager
def bounded(what: str, parameters: int = MOST_PARAMETERS, elements: int = MOST_ELEMENTS) -> Iterator[None]:
    """Inside, no module may register more parameters, and no tensor may be made with more elements.

    Args:
        what: is being built, for the error.
        parameters: registered in all.
        elements: of one tensor.

    Raises:
        LoadError: as soon as there is more.

    Example:
        >>> with bounded("a net", elements=100):
        ...     nn.Linear(10**6, 10**6)
        Traceback (most recent call last):
        surgery.errors.LoadError: a net must have tensors of at most 100 elements, ... one of 1,000,000,000,000: ...
    """
    register, count = nn.Module.register_parameter, 0

    def counted(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        nonlocal count
        count += param is not None
        if count > parameters:
            raise LoadError(
                f"{what} must have at most {parameters:,} parameters, by its weights or by what models have, but its "
                "configuration asks for more: check the numbers of layers, heads and experts in its config.json"
            )
        if param is not None:
            _check_size(what, param.numel(), elements)  # one on the meta device is given memory later
        register(module, name, param)

    nn.Module.register_parameter = counted  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with _Sizes(what, elements):
            yield
    finally:
        nn.Module.register_parameter = register


def by_file(shapes: dict[str, tuple[int, ...]] | list[tuple[int, ...]]) -> dict[str, int]:
    """The bounds of a module whose weights a file holds.

    Example:
        >>> by_file([(10, 10), (10,)])
        {'parameters': 4128, 'elements': 67110624}
    """
    listed = list(shapes.values()) if isinstance(shapes, dict) else shapes
    elements = sum(math.prod(shape) for shape in listed)
    return {
        "parameters": min(MOST_PARAMETERS, SLACK * len(listed) + _MORE),
        "elements": min(MOST_ELEMENTS, SLACK * elements + _ROOM),
    }


class _Sizes(TorchFunctionMode):
    """Looks at the size of each tensor that is made from numbers, before it is made."""

    def __init__(self, what: str, elements: int):
        super().__init__()
        self.what, self.elements = what, elements

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SIZED or func in _RANGES:
            asked = _range(args, kwargs) if func in _RANGES else _sized(args, kwargs)
            if str(kwargs.get("device", "cpu")) != "meta":
                _check_size(self.what, asked, self.elements)
        return func(*args, **kwargs)


def _check_size(what: str, asked: int, elements: int) -> None:
    if asked > elements:
        raise LoadError(
            f"{what} must have tensors of at most {elements:,} elements, by its weights or by what models have, but "
            f"its configuration asks for one of {asked:,}: check the sizes in its config.json"
        )


_SIZED = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye, torch.randint}
_RANGES = {torch.arange, torch.linspace}


def _sized(args: Any, kwargs: Any) -> int:
    """Elements of `torch.zeros(2, 3)`, `torch.zeros((2, 3))` and the like."""
    given = kwargs.get("size", args)
    sides: list[int] = []
    for each in given if isinstance(given, (tuple, list)) else (given,):
        sides += [n for n in (each if isinstance(each, (tuple, list)) else (each,)) if type(n) is int]
    return math.prod(sides)


def _range(args: Any, kwargs: Any) -> int:
    """At least the elements of `torch.arange(stop)`, `arange(start, stop, step)` or `linspace(start, stop, steps)`."""
    numbers = [abs(n) for n in (*args, kwargs.get("end"), kwargs.get("steps")) if isinstance(n, (int, float))]
    step = abs(args[2]) if len(args) > 2 and isinstance(args[2], (int, float)) and args[2] else 1
    largest = max(numbers, default=0)
    return int(largest / step) if math.isfinite(largest) and step >= 1 else 0
