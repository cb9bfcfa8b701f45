"""Sketches: example inputs in a few words of JSON, so that a member can be traced again after it was loaded.

Shapes and dtypes are kept. Values are kept where they are few whole numbers, such as token ids; real numbers
are drawn anew from a fixed seed, and many whole numbers become copies of the first one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from surgery.member import Inputs

_FEW = 64  # whole numbers that are kept one by one


def sketch(inputs: Inputs) -> Any:
    """Example inputs as JSON; None where there are none, or where they hold something that JSON cannot say.

    Example:
        >>> sketch(Inputs((torch.randn(2, 3),), {"ids": torch.tensor([[1, 2]])}))
        {'args': [{'float32': [2, 3]}], 'kwargs': {'ids': {'int64': [1, 2], 'is': [1, 2]}}}
    """
    try:
        args = [_sketch(value) for value in inputs.args]
        kwargs = {name: _sketch(value) for name, value in inputs.kwargs.items()}
    except TypeError:
        return None
    return {key: value for key, value in (("args", args), ("kwargs", kwargs)) if value} or None


def draw(sketched: Any) -> Inputs:
    """Example inputs from their sketch; `sketch(draw(s)) == s`.

    Raises:
        ValueError: where it is no sketch.
    """
    if sketched is None:
        return Inputs(source="none recorded")
    try:
        generator = torch.Generator().manual_seed(0)
        args = tuple(_draw(value, generator) for value in sketched.get("args", ()))
        kwargs = {name: _draw(value, generator) for name, value in sketched.get("kwargs", {}).items()}
    except (AttributeError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{sketched!r} is no sketch of example inputs") from error
    return Inputs(args, kwargs, "recorded shapes")


def _sketch(value: Any) -> Any:
    if isinstance(value, Tensor):
        kept: dict[str, Any] = {str(value.dtype).removeprefix("torch."): list(value.shape)}
        if not value.is_floating_point() and not value.is_complex() and value.numel():
            numbers = value.detach().cpu().flatten()
            kept["is"] = numbers.tolist() if len(numbers) <= _FEW else numbers[0].item()
        return kept
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_sketch(each) for each in value]
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {"of": {name: _sketch(each) for name, each in value.items()}}
    raise TypeError(f"a {type(value).__name__} has no sketch")


def _draw(value: Any, generator: torch.Generator) -> Any:
    if isinstance(value, list):
        return [_draw(each, generator) for each in value]
    if not isinstance(value, dict):
        return value
    if "of" in value:
        return {name: _draw(each, generator) for name, each in value["of"].items()}
    (name, shape), *rest = value.items()
    dtype = getattr(torch, name)
    if dtype.is_floating_point or dtype.is_complex:
        drawn = torch.float32 if dtype.is_floating_point else dtype
        return torch.randn(shape, generator=generator, dtype=drawn).to(dtype)
    numbers = dict(rest).get("is", 0)
    if isinstance(numbers, list):
        return torch.tensor(numbers, dtype=dtype).view(shape)
    return torch.full(shape, numbers, dtype=dtype)
