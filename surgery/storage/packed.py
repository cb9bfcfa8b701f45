"""Packed weights: parameters whose codes stay as they are stored, decoded when they are used and dropped after.

A `PackedWeight` says shape, dtype and device of the weight that it stands for and holds its stored form. Whatever
PyTorch computes with it gets the decoded weight, which is gone when that call is over; so classes, and code that reads
weights of modules that it does not call, stay what they are.

An embedding decodes the rows that are looked up alone. Nothing is learnt: a weight that is decoded anew each time keeps
no change.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, cached_property
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_map

from surgery.anatomy.plan import BankPlan, Placement
from surgery.core.generation import generated
from surgery.core.registry import find_method
from surgery.core.tensor_method import TensorMethod
from surgery.errors import TrainingError
from surgery.storage.cache import Cache
from surgery.storage.codecs import Encoded, as_dtype, decode, decoder, take_rows

REFUSED = (
    "Weights that stay packed are neither trained nor changed, saved or shared: take `extract(NAME)`, whose weights "
    "are ordinary ones, or load the artifact without `resident`."
)


@dataclass(frozen=True)
class Form:
    """What a packed weight is decoded or generated from.

    Attributes:
        parts: stored tensors by name; one, without a name, of a plain tensor.
        plan: of the bank that generates it, with its place there; None of a plain tensor.
        cache: of what was decoded; None where nothing is kept.
        common: names of the parts whose decoded tensors the cache may keep; None for the weight itself.
    """

    parts: Mapping[str, Encoded]
    plan: tuple[BankPlan, Placement] | None = None
    cache: Cache | None = None
    common: frozenset[str] | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All that is held."""
        return [part for each in self.parts.values() for part in each.parts.values()]

    @property
    def device(self) -> torch.device:
        """Where it is held, and decoded."""
        return self.tensors[0].device

    @property
    def key(self) -> tuple:
        """Equal for forms that hold the same memory, and so decode to the same weight."""
        place = None if self.plan is None else (self.plan[1].site.shape, self.plan[1].start)
        return *((each.data_ptr(), each.device, each.numel()) for each in self.tensors), place

    @cached_property
    def _decoders(self) -> dict[str, Callable[[], Tensor]]:
        return {name: decoder(each) for name, each in self.parts.items()}

    def read(self, dtype: torch.dtype) -> Tensor:
        """The weight, in memory of its own."""
        return self._composed(dtype, lambda name: self._decoders[name]())

    def kept(self, dtype: torch.dtype) -> Tensor:
        """The weight, which nobody may write to: from the cache, where it is there."""
        if self.cache is None:
            return self.read(dtype)
        if self.common is None:
            return self.cache.take(self, lambda: self.read(dtype))
        cache, common = self.cache, self.common

        def part(name: str) -> Tensor:
            make = self._decoders[name]
            return cache.take(self.parts[name], make) if name in common else make()

        return self._composed(dtype, part)

    def _composed(self, dtype: torch.dtype, part: Callable[[str], Tensor]) -> Tensor:
        if self.plan is None:
            found = part("")
        else:
            plan, placement = self.plan
            parts, method = {name: part(name) for name in self.parts}, find_method(plan.method, TensorMethod)
            made = method.weight(plan, placement, parts)
            if made is None:
                bank = method.unpack(plan, parts)
                (handle,) = generated({plan.key: bank}, [placement]).values()
                made = handle.read()
            found = made
        return found if found.dtype == dtype else found.to(dtype)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Some rows of the weight `[R, ...]`; None where they cannot be had alone."""
        if self.plan is not None or len(self.parts[""].shape) < 2:
            return None
        return decode(take_rows(self.parts[""], index)).to(dtype)

    def moved(self, device: torch.device, dtype: torch.dtype) -> Form:
        """The same on another device, or of a weight of another dtype; see `moved_together`."""
        return replace(
            self, parts={name: self._moved(each, device, dtype) for name, each in self.parts.items()}
        )

    def _moved(self, one: Encoded, device: torch.device, dtype: torch.dtype) -> Encoded:
        copies = _COPIES.get()
        key = id(one), device, dtype if self.plan is None else None
        if copies is not None and key in copies:
            return copies[key][1]
        there = one
        if self.plan is None:
            there = as_dtype(one, dtype) or one  # else the weight is cast when it is decoded
        if any(part.device != device for part in one.parts.values()):
            there = replace(there, parts={name: part.to(device) for name, part in there.parts.items()})
        if copies is not None:
            copies[key] = one, there
        return there


_COPIES: ContextVar[dict[tuple, tuple[Any, Any]] | None] = ContextVar("copies", default=None)
"""By what they are copies of, which stays alive as long, so that no other gets its place."""


@contextmanager
def moved_together() -> Iterator[None]:
    """Inside, what stored forms have in common is moved or cast once."""
    token = _COPIES.set({}) if _COPIES.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _COPIES.reset(token)


def change_together(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `Module._apply` does to tensors, done once to ordinary ones that lie in the same memory.

    Args:
        change: moves or casts; used within `moved_together`.
    """

    def once(tensor: Tensor) -> Tensor:
        copies = _COPIES.get()
        if copies is None or isinstance(tensor, PackedWeight) or not tensor.numel() or tensor.is_meta:
            return change(tensor)
        place = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        if place not in copies:
            copies[place] = tensor.detach(), change(tensor)
        return copies[place][1]

    return once


SKIPPED = (
    "An optimizer was given weights that it would skip; `[p for p in model.parameters() if p.requires_grad]` leaves "
    f"them out. {REFUSED}"
)


def _refuse_steps(optimizer: Any, *_: Any) -> None:
    """Raise where an optimizer that is about to step was given packed weights, which it would skip without a word.

    Raises:
        TrainingError: naming what trains.
    """
    if any(isinstance(each, PackedWeight) for group in optimizer.param_groups for each in group["params"]):
        raise TrainingError(SKIPPED)


def _is_optimizer(caller: FrameType) -> bool:
    """Whether it is an optimizer that looks at what it is given, before its first step."""
    return caller.f_code.co_name == "add_param_group" and caller.f_globals["__name__"] == Optimizer.__module__


class PackedWeight(Tensor):
    """A weight that is decoded when it is used."""

    form: Form

    @staticmethod
    def __new__(  # noqa: D102
        cls, form: Form, shape: Sequence[int], dtype: torch.dtype
    ) -> PackedWeight:
        made = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=form.device)  # pyright: ignore
        made.form = form
        _watch_optimizers()
        return made

    def unpacked(self) -> Tensor:
        """The weight."""
        with torch.no_grad():
            return self.form.read(self.dtype)

    def requires_grad_(self, requires_grad: bool = True) -> PackedWeight:
        """Refused: nothing that stays packed is trained.

        Raises:
            TrainingError: where it is asked for.
        """
        if requires_grad:
            raise TrainingError(REFUSED)
        return self

    def __repr__(self, **kwargs: Any) -> str:
        held = sum(each.nbytes for each in self.form.parts.values())
        return f"PackedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, {held:,} bytes)"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: whoever reads it would need this package.

        Raises:
            TrainingError: always.
        """
        raise TrainingError(REFUSED)

    def __deepcopy__(self, memo: dict) -> PackedWeight:
        """Another weight, which may be moved or cast by itself, of the same stored form."""
        made = self.like(self.form)
        if hasattr(self, "_is_param"):
            made._is_param = True  # pyright: ignore[reportAttributeAccessIssue]
        memo[id(self)] = made
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OF_MEMORY:
            raise TrainingError(REFUSED)
        if func == _IS_LEAF and _is_optimizer(sys._getframe(1)):
            raise TrainingError(SKIPPED)
        if func == _SET_DATA:  # as `Module.to` does, also to other devices
            if not all(isinstance(each, PackedWeight) for each in args):
                raise TrainingError(REFUSED)
            args[0].form = args[1].form
        if func is nn.functional.embedding and (found := _looked_up(*args, **kwargs)) is not None:
            return found
        if func in _AT_ONCE:  # each of their steps would decode again
            args, kwargs = _decoded(args, True, True), _decoded(kwargs, True, True)
        with torch._C.DisableTorchFunctionSubclass():  # what comes of it is an ordinary tensor
            if func not in _RECURRENT:
                return func(*args, **kwargs)
            with warnings.catch_warnings():  # on a GPU: decoded weights lie in several pieces of memory
                warnings.filterwarnings("ignore", "RNN module weights are not part of")
                return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0].like(args[0].form)
        if func is torch.ops.aten._to_copy.default and type(args[0]) is cls:
            moved = args[0]._moved(kwargs.get("dtype"), kwargs.get("device"))
            if moved is not None:
                return moved
        if func._schema.is_mutable and _written(func, args, kwargs):
            raise TrainingError(REFUSED)
        kept = all(each.alias_info is None for each in func._schema.returns)  # a view could be written to
        return func(*_decoded(args, kept), **_decoded(kwargs, kept))

    def like(self, form: Form, dtype: torch.dtype | None = None) -> PackedWeight:
        """Another stored form in its place, where that is held."""
        return PackedWeight(form, self.shape, dtype or self.dtype)

    def _moved(self, dtype: torch.dtype | None, device: Any) -> PackedWeight | None:
        """On another device, in another dtype; None where it has to be decoded for that."""
        dtype = dtype or self.dtype
        if not dtype.is_floating_point:
            return None
        where = self.device if device is None else torch.device(device)
        return self.like(self.form.moved(where, dtype), dtype)


@cache
def _watch_optimizers() -> None:
    """Have every optimizer of this process look at what it steps, from the first packed weight on."""
    register_optimizer_step_pre_hook(_refuse_steps)


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator writes to a packed weight: what is decoded for it would be dropped with what it wrote."""
    for place, argument in enumerate(func._schema.arguments):
        given = args[place] if place < len(args) else kwargs.get(argument.name)
        each = given if isinstance(given, (list, tuple)) else (given,)
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and any(isinstance(one, PackedWeight) for one in each):
            return True
    return False


def _decoded(value: Any, kept: bool, like_trained: bool = False) -> Any:
    # Of a weight that requires gradients PyTorch takes sums in another order, even where none are computed.
    like_trained = like_trained and not torch.is_grad_enabled()

    def trained(made: Tensor) -> bool:
        return like_trained and not torch.is_autocast_enabled(
            made.device.type
        )  # which keeps casts of such weights

    def weight(each: Any) -> Any:
        if not isinstance(each, PackedWeight):
            return each
        # Under inference mode PyTorch makes views of ordinary tensors alone for what is one.
        with torch.inference_mode(False), torch.no_grad():
            made = each.form.kept(each.dtype) if kept else each.form.read(each.dtype)
            return made.detach().requires_grad_() if trained(made) else made

    if isinstance(value, dict):
        return {name: _decoded(each, kept, like_trained) for name, each in value.items()}
    if isinstance(value, (tuple, list)) and not any(isinstance(each, (tuple, list, dict)) for each in value):
        return [weight(each) for each in value]  # the usual case
    return tree_map(weight, value)


def _looked_up(
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    """Rows of a packed table, of which each is decoded once; None where the whole table has to be."""
    if not isinstance(weight, PackedWeight) or max_norm is not None or not input.numel():
        return None
    wanted, place = input.unique(return_inverse=True)
    if int(wanted[0]) < 0 or int(wanted[-1]) >= weight.shape[0] or len(wanted) * 2 > weight.shape[0]:
        return None
    rows = weight.form.rows(wanted, weight.dtype)
    return None if rows is None else rows[place]


_RECURRENT: set[Callable[..., Any]] = {
    torch._VF.lstm, torch._VF.gru, torch._VF.rnn_tanh, torch._VF.rnn_relu,  # pyright: ignore
}  # fmt: skip
_AT_ONCE: set[Callable[..., Any]] = {
    nn.functional.linear, nn.functional.embedding, nn.functional.embedding_bag,
    nn.functional.multi_head_attention_forward, nn.functional.bilinear, *_RECURRENT,
    torch._VF.lstm_cell, torch._VF.gru_cell,  # pyright: ignore
}  # fmt: skip
"""Calls of which one packed weight is used several times."""


_OF_MEMORY: set[Callable[..., Any]] = {
    Tensor.data_ptr, Tensor.storage, Tensor.untyped_storage, Tensor.share_memory_, Tensor.set_, Tensor.resize_,
}  # fmt: skip
"""Calls that ask for memory, which a packed weight has none of."""

_IS_LEAF: Any = Tensor.is_leaf.__get__  # pyright: ignore[reportAttributeAccessIssue]
_SET_DATA: Any = Tensor.data.__set__  # pyright: ignore[reportAttributeAccessIssue]


def held_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of all that modules hold, each piece of memory once: stored forms and ordinary tensors."""
    seen: dict[tuple, int] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            for each in tensor.form.tensors if isinstance(tensor, PackedWeight) else (tensor,):
                if each.device.type != "meta":
                    storage = each.untyped_storage()
                    seen[each.device, storage.data_ptr(), each.storage_offset(), each.numel()] = each.nbytes
    return sum(seen.values())
