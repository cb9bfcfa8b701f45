"""Packed weights: parameters whose codes stay as they are stored, decoded when they are used and dropped after.

A `PackedWeight` says shape, dtype and device of the weight that it stands for and holds its stored form. Whatever
PyTorch computes with it gets the decoded weight, which is gone when that call is over; so classes, and code that reads
weights of modules that it does not call, stay what they are.

An embedding decodes the rows that are looked up alone. Nothing is learnt: a weight that is decoded anew each time keeps
no change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_map

from surgery.anatomy.plan import BankPlan, Placement
from surgery.core.generation import generated
from surgery.core.method import TensorMethod
from surgery.core.registry import find_method
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

    def moved(self, device: torch.device, copies: dict[int, Encoded]) -> Form:
        """The same on another device; what forms have in common is moved once."""
        parts = {}
        for name, each in self.parts.items():
            if id(each) not in copies:
                there = {piece: part.to(device) for piece, part in each.parts.items()}
                copies[id(each)] = replace(each, parts=there)
            parts[name] = copies[id(each)]
        return replace(self, parts=parts)


def _refuse_steps(optimizer: Any, *_: Any) -> None:
    """Raise where an optimizer that is about to step was given packed weights, which it would skip without a word.

    Raises:
        TrainingError: naming what trains.
    """
    if any(isinstance(each, PackedWeight) for group in optimizer.param_groups for each in group["params"]):
        raise TrainingError(REFUSED)


class PackedWeight(Tensor):
    """A weight that is decoded when it is used."""

    form: Form

    @staticmethod
    def __new__(  # noqa: D102
        cls, form: Form, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> PackedWeight:
        made = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)  # pyright: ignore
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
        return self  # which nothing changes

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OF_MEMORY:
            raise TrainingError(REFUSED)
        if func is nn.functional.embedding and (found := _looked_up(*args, **kwargs)) is not None:
            return found
        if func in _AT_ONCE:  # each of their steps would decode again
            args, kwargs = _decoded(args, kept=True), _decoded(kwargs, kept=True)
        with torch._C.DisableTorchFunctionSubclass():  # what comes of it is an ordinary tensor
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

    def like(
        self, form: Form, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> PackedWeight:
        """Another stored form in its place."""
        return PackedWeight(form, self.shape, dtype or self.dtype, device or self.device)

    def _moved(self, dtype: torch.dtype | None, device: Any) -> PackedWeight | None:
        """On another device, in another dtype; None where it has to be decoded for that."""
        form, where = self.form, torch.device(device or self.device)
        if dtype not in (None, self.dtype):
            one = self.form.parts.get("") if self.form.plan is None else None
            again = None if one is None or dtype is None else as_dtype(one, dtype)
            if again is None:
                return None
            form = replace(self.form, parts={"": again})
        if where != self.device:
            form = form.moved(where, {})
        return self.like(form, dtype, where)


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


def _decoded(value: Any, kept: bool) -> Any:
    def weight(each: Any) -> Any:
        if not isinstance(each, PackedWeight):
            return each
        # Under inference mode PyTorch makes views of ordinary tensors alone for what is one.
        with torch.inference_mode(False), torch.no_grad():
            return each.form.kept(each.dtype) if kept else each.form.read(each.dtype)

    if isinstance(value, dict):
        return {name: _decoded(each, kept) for name, each in value.items()}
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


_AT_ONCE: set[Callable[..., Any]] = {
    nn.functional.linear, nn.functional.embedding, nn.functional.embedding_bag,
    nn.functional.multi_head_attention_forward, nn.functional.bilinear, torch._VF.lstm, torch._VF.gru,  # pyright: ignore
    torch._VF.rnn_tanh, torch._VF.rnn_relu, torch._VF.lstm_cell, torch._VF.gru_cell,  # pyright: ignore
}  # fmt: skip
"""Calls of which one packed weight is used several times."""


_OF_MEMORY: set[Callable[..., Any]] = {
    Tensor.data_ptr, Tensor.storage, Tensor.untyped_storage, Tensor.share_memory_, Tensor.set_, Tensor.resize_,
}  # fmt: skip
"""Calls that ask for memory, which a packed weight has none of."""


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
