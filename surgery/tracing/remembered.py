"""Remembers what calls on the meta device give: a call like an earlier one has a result like the earlier one's.

A result on the meta device follows from the shapes, strides and dtypes of the arguments. PyTorch infers it in Python,
in up to two milliseconds for an operation, and the layers of a model and the members of a family repeat one another.
Remembered are PyTorch's own functions alone, and of their results new tensors, one or several apart, none of them a
view of an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOST = 1 << 14  # calls that are remembered; then all are forgotten
_PLAIN = (
    bool, int, float, complex, str, type(None), type(...), torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _New:
    """A tensor with memory of its own."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class _UnlikeAnyError(Exception):
    """An argument from which alone the result does not follow."""


_results: dict[Any, _New | tuple[_New, ...]] = {}


def call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`func(*args, **kwargs)`, or a new tensor like the one that such a call made before.

    Args:
        func: what is called; it changes none of its arguments.
        args: its arguments; where a tensor is not on the meta device, or is of a class of its own, it is called.
        kwargs: its keyword arguments, likewise.

    Example:
        >>> x = torch.empty(2, 3, device="meta")
        >>> call(torch.add, (x, x), {}).shape, call(torch.add, (x, x), {}).shape
        (torch.Size([2, 3]), torch.Size([2, 3]))
    """
    try:
        key = _key(func, args, kwargs)
    except (_UnlikeAnyError, NotImplementedError):
        return func(*args, **kwargs)
    found = _results.get(key)
    if found is not None:
        return tuple(map(_again, found)) if isinstance(found, tuple) else _again(found)
    result = func(*args, **kwargs)
    several = result if type(result) is tuple else (result,)
    if all(_is_new(each, args, kwargs) for each in several) and _are_apart(several):
        if len(_results) >= MOST:
            _results.clear()
        made = tuple(_New(tuple(each.shape), each.stride(), each.dtype) for each in several)
        _results[key] = made if type(result) is tuple else made[0]
    return result


def _again(made: _New) -> Tensor:
    return torch.empty_strided(made.shape, made.strides, dtype=made.dtype, device="meta")


def _are_apart(tensors: tuple[Tensor, ...]) -> bool:
    return bool(tensors) and len({each.untyped_storage()._cdata for each in tensors}) == len(tensors)


def forget() -> None:
    """Start anew."""
    _results.clear()


def _key(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """All that the result follows from."""
    if torch.is_grad_enabled() or not _of_torch(func):
        raise _UnlikeAnyError
    arguments = _described(args), tuple((name, _described(value)) for name, value in kwargs.items())
    return func, arguments, torch.get_default_dtype()


def _of_torch(func: Callable[..., Any]) -> bool:
    """Whether a function is one of PyTorch's own or a method of its tensors; attributes are read anew each time."""
    owner = getattr(func, "__objclass__", None) or func
    return (getattr(owner, "__module__", None) or "").partition(".")[0] == "torch" and func is not getattr


def _described(value: Any) -> Any:
    kind = type(value)
    if kind is Tensor or kind is nn.Parameter:
        if not value.is_meta:
            raise _UnlikeAnyError
        value.untyped_storage()  # what has none, such as a tensor inside a vmap, has more axes than it says
        return value.shape, value.stride(), value.dtype
    if kind in _PLAIN:
        return kind, value
    if kind in (tuple, list, torch.Size):
        return kind, tuple(map(_described, value))
    if kind is slice:
        return kind, *map(_described, (value.start, value.stop, value.step))
    raise _UnlikeAnyError


def _is_new(result: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a result is one plain tensor on the meta device that no argument shares memory with."""
    if type(result) is not Tensor or not result.is_meta or result.storage_offset():
        return False
    if result.dtype.is_complex:  # its conjugation may be pending
        return False
    memory = result.untyped_storage()._cdata
    tensors = [each for value in (*args, *kwargs.values()) for each in _tensors_in(value)]
    return bool(tensors) and all(each.untyped_storage()._cdata != memory for each in tensors)


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [each for item in value for each in _tensors_in(item)] if isinstance(value, tuple | list) else []
