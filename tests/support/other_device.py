"""A device whose tensors lie in ordinary memory and that refuses those of the CPU, as an accelerator does.

It shows on any machine what only an accelerator would: a tensor that was made on the CPU in the middle of what runs
elsewhere. PyTorch's third device type is given to Python for that; every operator is the CPU's.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"
_MIXED = {"aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::_copy_from_and_resize"}
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_live: dict[int, tuple[weakref.ref, int, int]] = {}
_most: list[int] = []  # bytes that were alive at once, while that is asked for


class _Module:
    """What PyTorch asks a device of; it counts none, so nothing else takes it for an accelerator."""

    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 0

    def current_device(self) -> int:
        return 0

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class _Hooks(torch._C._acc.PrivateUse1Hooks):  # pyright: ignore
    def is_available(self) -> bool:
        return False

    def has_primary_context(self, index: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


class Elsewhere(Tensor):
    """A tensor of the device: its values, in a tensor of the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(  # pyright: ignore
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        made.values = values
        storage = values.untyped_storage()
        key = id(made)
        gone = weakref.ref(made, lambda _: _live.pop(key, None))
        _live[key] = gone, storage._cdata, storage.nbytes()
        if _most:
            _most[0] = max(_most[0], _now())
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.data_ptr, Tensor.untyped_storage):
            return func(args[0].values)
        if func == Tensor.data.__set__ and isinstance(args[1], cls):  # pyright: ignore
            args[0].values = args[1].values
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not all(issubclass(cls, each) for each in types):  # another class's affair first
            return NotImplemented
        whole = func.decompose(*args, **(kwargs or {}))  # of what consists of other operators
        return whole if whole is not NotImplemented else _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    flat, form = tree_flatten((args, kwargs))
    name = func._schema.name
    bad = [
        each
        for each in flat
        if isinstance(each, Tensor) and not isinstance(each, Elsewhere) and (each.ndim or name in _INDEXED)
    ]
    if bad and name in _INDEXED:  # indices may be of the CPU
        bad = [] if isinstance(args[0], Elsewhere) else bad
    here = None
    if name in _MIXED:
        bad = []
        here = torch.device(
            kwargs.get("device") or (args[0].device if isinstance(args[0], Tensor) else "cpu")
        )
    if bad:
        raise RuntimeError(
            f"{func} got tensors of the CPU {[tuple(each.shape) for each in bad]} beside others"
        )
    plain = [each.values if isinstance(each, Elsewhere) else each for each in flat]
    plain = [torch.device("cpu") if isinstance(each, torch.device) else each for each in plain]
    inner, more = tree_unflatten(plain, form)
    found = _OWN.get(name, func)(*inner, **more)
    if here is not None and here.type == "cpu":
        return args[0] if name == "aten::copy_" else found
    return _wrapped(func, found, flat, plain)


def _wrapped(func: Any, found: Any, before: list, plain: list) -> Any:
    known = {id(mine): own for own, mine in zip(before, plain, strict=True) if isinstance(own, Elsewhere)}

    def wrap(each: Any) -> Any:
        if not isinstance(each, Tensor):
            return each
        return known[id(each)] if id(each) in known else Elsewhere(each)

    return tree_map(wrap, found)


def _lstm_cell(gates: Tensor, hidden: Tensor, cell: Tensor, *biases: Tensor | None) -> tuple[Tensor, ...]:
    """What accelerators have a kernel for, and the CPU does not."""
    whole = sum((each for each in biases if each is not None), gates + hidden)
    into, forget, new, out = whole.chunk(4, 1)
    cell = forget.sigmoid() * cell + into.sigmoid() * new.tanh()
    return out.sigmoid() * cell.tanh(), cell, whole


_OWN: dict[str, Callable[..., Any]] = {"aten::_thnn_fused_lstm_cell": _lstm_cell}


_library: list[Any] = []


def elsewhere() -> torch.device:
    """The device; it is registered once in a process."""
    if not _library:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Module(), hook=_Hooks())
        library = torch.library.Library("_", "IMPL")
        library.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
        library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        _library.append(library)
    return torch.device(NAME)


def allocated() -> int:
    """Bytes of all tensors of the device that are alive, each piece of memory once."""
    gc.collect()
    return _now()


def peak(run: Callable[[], Any]) -> int:
    """The most bytes that are alive at once more while something runs."""
    before = allocated()
    _most[:] = [before]
    try:
        run()
        return _most[0] - before
    finally:
        _most.clear()


def _now() -> int:
    return sum({storage: size for _, storage, size in [*_live.values()]}.values())
