"""Describes example inputs in JSON, so that a loaded member can be traced again.

Shapes and dtypes are kept. Values are kept where they are few whole numbers, such as token ids; real numbers
are drawn anew from a fixed seed, and many whole numbers become copies of the first one. Where made-up probe inputs
follow such values, it is kept what these are like: the smallest and the largest, and of real numbers the mean and
the standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.disk.untrusted import shown
from surgery.inputs.probes import spread_of
from surgery.members.member import Inputs, Spread
from surgery.safetensors.header import MOST_AXES

_VALUES, _LIKE = "is", "like"  # what a sketch may say of a tensor besides dtype and shape
_FEW = 64  # whole numbers that are kept one by one
MOST_ELEMENTS = 1 << 27  # of all example inputs of a member together: half a GiB in float32


def sketch(inputs: Inputs, followed: Collection[str] = ()) -> Any:
    """Example inputs as JSON; None where there are none, or where they hold something that JSON cannot say.

    Args:
        inputs: of a member.
        followed: places of tensors of which it is kept what their values are like, where these are not.

    Example:
        >>> sketch(Inputs((torch.randn(2, 3),), {"ids": torch.tensor([[1, 2]])}))
        {'args': [{'float32': [2, 3]}], 'kwargs': {'ids': {'int64': [1, 2], 'is': [1, 2]}}}
    """
    known = _Known(inputs.spreads, frozenset(followed))
    try:
        args = [_sketch(value, str(i), known) for i, value in enumerate(inputs.args)]
        kwargs = {name: _sketch(value, name, known) for name, value in inputs.kwargs.items()}
    except TypeError:
        return None
    return {key: value for key, value in (("args", args), ("kwargs", kwargs)) if value} or None


def draw(sketched: Any) -> Inputs:
    """Example inputs from their sketch, with what is known of values that it does not hold; `sketch(draw(s)) == s`.

    Raises:
        ValueError: where it is no sketch, or too large to be drawn.
    """
    if sketched is None:
        return Inputs(source="none recorded")
    check_sketch(sketched)
    try:
        generator = torch.Generator().manual_seed(0)
        known: dict[str, Spread | None] = {}
        listed = sketched.get("args", ())
        args = tuple(_draw(value, generator, str(i), known) for i, value in enumerate(listed))
        named = sketched.get("kwargs", {})
        kwargs = {name: _draw(value, generator, name, known) for name, value in named.items()}
    except (AttributeError, KeyError, TypeError, RuntimeError, OverflowError, StopIteration) as error:
        raise ValueError(f"{shown(sketched)} is no sketch of example inputs") from error
    return Inputs(args, kwargs, "recorded shapes", known)


def check_sketch(sketched: Any) -> Any:
    """A sketch as it is, where it is one and what it stands for is of a size that can be drawn.

    Raises:
        ValueError: where it is none, or claims more elements than example inputs have.

    Example:
        >>> check_sketch({"args": [{"float32": [60000, 20000]}]})
        Traceback (most recent call last):
        ValueError: example inputs must have at most 134,217,728 elements, but these claim 1,200,000,000
    """
    if sketched is None:
        return None
    known = isinstance(sketched, dict) and sketched and not {*sketched} - {"args", "kwargs"}
    args, kwargs = (sketched.get("args", []), sketched.get("kwargs", {})) if known else (None, None)
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise ValueError(f"example inputs must be a sketch of args and kwargs, but are {shown(sketched)}")
    claimed = sum(_elements(value) for value in (*args, *kwargs.values()))
    if claimed > MOST_ELEMENTS:
        raise ValueError(
            f"example inputs must have at most {MOST_ELEMENTS:,} elements, but these claim {claimed:,}"
        )
    return sketched


def _elements(value: Any) -> int:
    """How many elements the tensors of a sketched value have."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return 0
    if isinstance(value, list):
        return sum(map(_elements, value))
    if isinstance(value, dict) and isinstance(inner := value.get("of"), dict) and len(value) == 1:
        return sum(map(_elements, inner.values()))
    names = [name for name in value if name not in (_VALUES, _LIKE)] if isinstance(value, dict) else []
    dtype = getattr(torch, names[0], None) if len(names) == 1 else None
    shape = value[names[0]] if isinstance(dtype, torch.dtype) else None
    if (
        not isinstance(shape, list)
        or len(shape) > MOST_AXES
        or not all(type(n) is int and 0 <= n <= MOST_ELEMENTS for n in shape)
    ):
        raise ValueError(
            f"a tensor among example inputs must be sketched as {{dtype: shape}}, found {shown(value)}"
        )
    numbers = value.get(_VALUES, 0)
    given = numbers if isinstance(numbers, list) else [numbers]
    _check_like(value, dtype)
    if not all(isinstance(n, int) and abs(n) < 1 << 64 for n in given):
        raise ValueError(
            f"values of a tensor among example inputs must be whole numbers, found {shown(numbers)}"
        )
    if isinstance(numbers, list) and len(numbers) != math.prod(shape):
        raise ValueError(f"a tensor of shape {shown(shape)} among example inputs has {len(numbers)} values")
    return math.prod(shape)


def _check_like(value: Mapping[str, Any], dtype: torch.dtype | None) -> None:
    """Refuse what cannot be said of the values of a tensor."""
    if _LIKE not in value:
        return
    like, real = value[_LIKE], dtype is not None and dtype.is_floating_point
    kinds = (int, float) if real else (int,)
    fine = isinstance(like, list) and len(like) == (4 if real else 2) and all(type(n) in kinds for n in like)
    if (
        not fine
        or not all(abs(n) < 1 << 128 if real else abs(n) < 1 << 62 for n in like)
        or like[0] > like[1]
    ):
        raise ValueError(
            f"values of a tensor among example inputs must be like [smallest, largest{', mean, deviation' * real}], "
            f"found {shown(like)}"
        )


@dataclass(frozen=True)
class _Known:
    """What is known of values that are not kept, and of which tensors that is kept."""

    spreads: Mapping[str, Spread | None]
    followed: frozenset[str]

    def like(self, tensor: Tensor, place: str) -> dict[str, Any]:
        """An entry that says what a tensor's values are like; none where nobody asks, or they are no numbers."""
        if place in self.spreads:  # it was drawn
            spread = self.spreads[place]
        else:
            spread = (
                spread_of(tensor.detach()) if place in self.followed and not tensor.is_complex() else None
            )
        if spread is None:
            return {}
        if not tensor.is_floating_point():
            return {_LIKE: [spread.low, spread.high]}
        found = [spread.low, spread.high, spread.mean, spread.deviation]
        return {_LIKE: found} if all(map(math.isfinite, found)) else {}


def _sketch(value: Any, place: str, known: _Known) -> Any:
    if isinstance(value, Tensor):
        kept: dict[str, Any] = {str(value.dtype).removeprefix("torch."): list(value.shape)}
        if not value.numel():
            return kept
        if not value.is_floating_point() and not value.is_complex():
            numbers = value.detach().cpu().flatten()
            if len(numbers) <= _FEW and place not in known.spreads:
                return kept | {_VALUES: numbers.tolist()}
            kept[_VALUES] = numbers[0].item()
        return kept | known.like(value, place)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_sketch(each, f"{place}.{i}", known) for i, each in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {"of": {name: _sketch(each, f"{place}.{name}", known) for name, each in value.items()}}
    raise TypeError(f"a {type(value).__name__} has no sketch")


def _draw(value: Any, generator: torch.Generator, place: str, known: dict[str, Spread | None]) -> Any:
    if isinstance(value, list):
        return [_draw(each, generator, f"{place}.{i}", known) for i, each in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "of" in value:
        inner = value["of"].items()
        return {name: _draw(each, generator, f"{place}.{name}", known) for name, each in inner}
    name, shape = next(item for item in value.items() if item[0] not in (_VALUES, _LIKE))
    dtype = getattr(torch, name)
    if math.prod(shape) and not isinstance(value.get(_VALUES), list):
        known[place] = Spread(*value[_LIKE]) if _LIKE in value else None
    if dtype.is_floating_point or dtype.is_complex:
        drawn = torch.float32 if dtype.is_floating_point else dtype
        return torch.randn(shape, generator=generator, dtype=drawn).to(dtype)
    numbers = value.get(_VALUES, 0)
    if isinstance(numbers, list):
        return torch.tensor(numbers, dtype=dtype).view(shape)
    return torch.full(shape, numbers, dtype=dtype)
