"""Recorder with stubs: on the meta device, for forward passes that look at data.

Every tensor is on the meta device, and whatever does not depend on parameters has a real *shadow* beside it:
inputs, buffers, and all that is computed from them, such as masks, grids and positions. A forward that looks
at data is shown the shadow, so it takes the branch that it would take. Where there is none, because the data
depend on weights, an answer is assumed and noted: the graph is then one of several that the module can make.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from surgery.tracing.bounds import OutOfBoundsError, Watch
from surgery.tracing.copying import on_meta
from surgery.tracing.recorder import Recorder, off_meta, writes_to

LARGEST = 1 << 22  # elements in a shadow; beyond, computing it would cost what meta tensors save
# Results that do not depend on the data of the tensor that they are made like.
_SHAPE_ALONE = frozenset(
    [
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
        "new_tensor",
    ]
)


class StubbedRecorder(Recorder):
    """Records on the meta device, with shadows and assumptions.

    Args:
        names: as of `Recorder`.
        parameters: as of `Recorder`.
        shadows: real values of meta tensors.
        verdict: what an unknown truth value is taken for.
        watch: bounds.
    """

    def __init__(
        self,
        names: dict[int, str],
        parameters: Sequence[nn.Parameter],
        shadows: Mapping[Tensor, Tensor],
        verdict: bool = False,
        watch: Watch | None = None,
    ) -> None:
        super().__init__(names, parameters, watch)
        self.shadows: Any = WeakTensorKeyDictionary()
        for tensor, value in shadows.items():
            self.shadows[tensor] = value
        self.verdict = verdict
        self.assumed: dict[str, str] = {}  # what was assumed, and in which module first
        self.helped = False  # whether any answer is not the one of a `Recorder`

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call on meta tensors, and once more on their shadows where all have one."""
        name = str(args[1]) if func is getattr else getattr(func, "__name__", "")
        shadow, known = self._on_shadows(func, name, args, kwargs)
        if name in _LOOKS:
            self.helped = True
            if known:
                return shadow
            self.assumed.setdefault(name.strip("_"), self.modules[-1])
            return _LOOKS[name](self, args, kwargs)
        if known and name in _SIZED and isinstance(shadow, Tensor | tuple):
            self.helped = True
            output = tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, shadow)
        else:
            output = self._on_meta(func, name, args, kwargs)
        self._pair(output, shadow if known else None, writes_to(name, args, kwargs))
        return output

    def _on_meta(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if any(leaf.is_meta for leaf in leaves) and not all(leaf.is_meta for leaf in leaves):
            self.helped = True
            args, kwargs = tree_map(on_meta, (args, kwargs))  # what a module made without saying where
        try:
            return super().run(func, args, kwargs)
        except OutOfBoundsError:
            raise
        except Exception:
            if name not in _SIZED:
                raise
            self.helped = True
            self.assumed.setdefault(name.strip("_"), self.modules[-1])
            return _SIZED[name](self, args, kwargs)

    def _on_shadows(self, func: Any, name: str, args: Any, kwargs: Any) -> tuple[Any, bool]:
        """The result for real values, and whether there is one."""
        leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if not leaves and "meta" not in str(kwargs.get("device", "")) and func is not torch.tensor:
            return None, False
        values: dict[int, Tensor] = {}
        for leaf in leaves:
            value = self.shadows.get(leaf)
            if value is None and not leaf.is_meta and leaf.numel() <= LARGEST:
                value = leaf
            if value is None and name in _SHAPE_ALONE and leaf.numel() <= LARGEST:
                value = torch.empty(leaf.shape, dtype=leaf.dtype)
            if value is None or value.numel() > LARGEST:
                self._forget(writes_to(name, args, kwargs))
                return None, False
            values[id(leaf)] = value

        def real(item: Any) -> Any:
            if isinstance(item, Tensor):
                return values[id(item)]
            return off_meta(item)

        if _numbers(args, kwargs) > LARGEST:
            return None, False
        try:
            return func(*tree_map(real, tuple(args)), **tree_map(real, dict(kwargs))), True
        except Exception:  # the call on meta tensors decides whether this is an error
            self._forget(writes_to(name, args, kwargs))
            return None, False

    def _pair(self, output: Any, shadow: Any, written: Tensor | None) -> None:
        """Remember the shadows of new tensors; one that was written to in place has its own already."""
        if shadow is None or written is not None:
            return
        outputs, shadows = tree_flatten(output)[0], tree_flatten(shadow)[0]
        if len(outputs) != len(shadows):
            return
        for meta, value in zip(outputs, shadows, strict=True):
            if isinstance(meta, Tensor) and isinstance(value, Tensor) and meta.shape == value.shape:
                self.shadows[meta] = value

    def _forget(self, written: Tensor | None) -> None:
        """A tensor was overwritten with what is not known: no shadow in the same memory holds any longer."""
        value = self.shadows.get(written) if written is not None else None
        if value is None:
            return
        memory = value.untyped_storage().data_ptr()
        for meta in [m for m, v in self.shadows.items() if v.untyped_storage().data_ptr() == memory]:
            del self.shadows[meta]


def _numbers(args: Any, kwargs: Any) -> int:
    """At most how many elements a factory such as `arange` or `zeros` is asked for."""
    sizes = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, int)]
    return max((abs(size) for size in sizes), default=0)


# Assumptions: about values --------------------------------------------------------------------------------


def _one(tensor: Tensor, verdict: bool) -> Any:
    if tensor.dtype == torch.bool:
        return verdict
    return 1.0 if tensor.is_floating_point() else 1


def _truth(recorder: StubbedRecorder, args: Any, kwargs: Any) -> bool:
    """Checks that all is well are taken to succeed; other truth values are the recorder's verdict."""
    node = recorder.nodes.get(args[0])
    asked = str(getattr(node.target, "__name__", node.target)) if node is not None else ""
    return True if asked in ("all", "allclose", "equal", "eq") else recorder.verdict


def _item(recorder: StubbedRecorder, args: Any, kwargs: Any) -> Any:
    return _truth(recorder, args, kwargs) if args[0].dtype == torch.bool else _one(args[0], recorder.verdict)


def _list(recorder: StubbedRecorder, args: Any, kwargs: Any) -> Any:
    return torch.full(args[0].shape, _one(args[0], recorder.verdict)).tolist()


def _always(recorder: StubbedRecorder, args: Any, kwargs: Any) -> bool:
    return True


_LOOKS: dict[str, Callable[[StubbedRecorder, Any, Any], Any]] = {
    "item": _item,
    "__bool__": _truth,
    "is_nonzero": _truth,
    "__int__": lambda recorder, args, kwargs: int(_one(args[0], recorder.verdict)),
    "__index__": lambda recorder, args, kwargs: int(_one(args[0], recorder.verdict)),
    "__float__": lambda recorder, args, kwargs: 1.0,
    "__contains__": _always,
    "tolist": _list,
    "equal": _always,
    "allclose": _always,
}
"""Calls that turn data into Python values, and what they are assumed to give."""


# Assumptions: about sizes ---------------------------------------------------------------------------------


def _nonzero(recorder: StubbedRecorder, args: Any, kwargs: Any) -> Any:
    """All of it is nonzero, so that every branch that selects gets something."""
    tensor = args[0] if args else kwargs["input"]
    if kwargs.get("as_tuple"):
        return tuple(_ids(tensor.numel()) for _ in range(max(tensor.ndim, 1)))
    return _ids(tensor.numel(), tensor.ndim)


def _where(recorder: StubbedRecorder, args: Any, kwargs: Any) -> Any:
    return _nonzero(recorder, args[:1], {**kwargs, "as_tuple": True})


def _masked_select(recorder: StubbedRecorder, args: Any, kwargs: Any) -> Any:
    mask = args[1] if len(args) > 1 else kwargs["mask"]
    shape = torch.broadcast_shapes(args[0].shape, mask.shape)
    return args[0].expand(shape).reshape(-1)


def _getitem(recorder: StubbedRecorder, args: Any, kwargs: Any) -> Any:
    """Masks select everything: each stands for as many positions as it has entries; one number is the first."""
    tensor, index = args
    index = index if isinstance(index, tuple) else (index,)
    made: list[Any] = []
    for item in index:
        if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8):
            made += [_ids(item.numel()) for _ in range(item.ndim)]
        elif isinstance(item, Tensor) and item.ndim == 0:  # which of them does not change the shape
            made.append(0)
        else:
            made.append(item)
    return tensor[tuple(made)]


def _unique(recorder: StubbedRecorder, args: Any, kwargs: Any) -> Any:
    """Nothing occurs twice."""
    tensor = args[0]
    parts = [tensor.reshape(-1)]
    if kwargs.get("return_inverse"):
        parts.append(torch.empty(tensor.shape, dtype=torch.long, device="meta"))
    if kwargs.get("return_counts"):
        parts.append(_ids(tensor.numel()))
    return parts[0] if len(parts) == 1 else tuple(parts)


def _repeat(recorder: StubbedRecorder, args: Any, kwargs: Any) -> Any:
    """Everything is repeated once."""
    tensor, axis = args[0], kwargs.get("dim", args[2] if len(args) > 2 else None)
    if kwargs.get("output_size") is not None and axis is not None:
        shape = list(tensor.shape)
        shape[axis] = kwargs["output_size"]
        return tensor.new_empty(shape)
    return tensor.reshape(-1) if axis is None else tensor.clone()


def _bincount(recorder: StubbedRecorder, args: Any, kwargs: Any) -> Any:
    return _ids(max(kwargs.get("minlength", args[2] if len(args) > 2 else 0), 1))


def _setitem(recorder: StubbedRecorder, args: Any, kwargs: Any) -> Any:
    """What is written where a mask says need not be known: shapes stay."""
    return None


def _same(recorder: StubbedRecorder, args: Any, kwargs: Any) -> Any:
    return args[0]


def _ids(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.long, device="meta")


_SIZED: dict[str, Callable[[StubbedRecorder, Any, Any], Any]] = {
    "nonzero": _nonzero,
    "argwhere": _nonzero,
    "where": _where,
    "masked_select": _masked_select,
    "__getitem__": _getitem,
    "__setitem__": _setitem,
    "masked_scatter": _same,
    "masked_scatter_": _same,
    "index_put_": _same,
    "unique": _unique,
    "unique_consecutive": _unique,
    "repeat_interleave": _repeat,
    "bincount": _bincount,
    "histc": _bincount,
}
"""Calls whose result's size depends on data, and what they are assumed to give."""
