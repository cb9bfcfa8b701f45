"""State dicts from stored tensors alone, bit for bit the same on every machine.

A generated block is a sum of c products, and kernels differ in the order and the rounding of that sum. Here
it is taken in the order of the basis blocks, one rounded multiplication and one rounded addition at a time,
so that the content hash of a member can be recorded on one machine and checked on another, without the
member's own class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery.anatomy.plan import Placement, torch_dtype
from surgery.core.bank import Bank
from surgery.geometry.blocks import untile
from surgery.handles.handle import CPU, Handle, Made, Resident, Shared
from surgery.handles.state import LazyState
from surgery.members.extra_state import KEY
from surgery.storage.codecs import Decoded, Encoded
from surgery.storage.stored import Stored, build_bank
from surgery.util import memory

CHUNK = 1 << 14  # locations generated at once, which bounds the memory


def state_of(stored: Stored, member: str) -> dict[str, Any]:
    """One member's state dict, extra state included; tied names share a tensor.

    Args:
        stored: of the joint model.
        member: its name.
    """
    return lazy_state_of(stored, member).resident()


def lazy_state_of(stored: Stored, member: str) -> LazyState:
    """What `state_of` returns, each tensor decoded or generated when it is asked for.

    A bank is built with the first of its weights that is read, and dropped with the last.
    """
    state: dict[str, Any] = {}
    held: dict[int, Handle] = {}
    for name, each in stored.plain(member).items():
        handle = _handle(each)
        # Equal tensors that are stored once are no ties: each is decoded by itself, unless it is there as it is.
        state[name] = held.setdefault(id(each), handle) if isinstance(handle, Resident) else handle
    ties = dict(stored.ties.get(member, {}))
    placed = stored.plan.of(member)
    users = Counter(p.bank for p in placed)
    banks = {
        plan.key: Shared(partial(build_bank, plan, stored.tensors), users[plan.key])
        for plan in stored.plan.banks
        if plan.key in users
    }
    for p in placed:
        state[p.site.name] = _generated(p, banks[p.bank])
        ties[p.site.name] = p.site.owners
    for first, names in ties.items():
        state.update(dict.fromkeys(names, state[first]))
    return LazyState({**state, **stored.extra.get(member, {})})


def _handle(encoded: Encoded) -> Handle:
    if encoded.precision.is_native and memory.is_compact(part := encoded.parts[""]):
        return Resident(part)
    return Decoded(encoded)


def _generated(p: Placement, bank: Shared[Bank]) -> Handle:
    dtype = torch_dtype(p.site.dtype)
    return Made(p.site.shape, dtype, CPU, lambda: weight_of(p, bank.take()))


def same_state(one: LazyState, other: LazyState) -> bool:
    """Whether two state dicts have equal tensors bit for bit, by their places in memory where they share these.

    Extra state is not compared.
    """
    mine, theirs = one.handles, other.handles
    if {n: (h.shape, h.dtype) for n, h in mine.items()} != {n: (h.shape, h.dtype) for n, h in theirs.items()}:
        return False
    seen: set[tuple[int, int]] = set()
    for name, each in mine.items():
        pair = id(each), id(theirs[name])
        if pair not in seen and not _same_bits(each.look(), theirs[name].look()):
            return False
        seen.add(pair)
    return True


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return True
    return torch.equal(*(each.contiguous().view(-1).view(torch.uint8) for each in (one, other)))


@torch.no_grad()
def weight_of(p: Placement, bank: Bank) -> Tensor:
    """The weight of one site."""
    parts = []
    for start in range(p.start, p.stop, CHUNK):
        parts.append(bank.portable_blocks(start, min(start + CHUNK, p.stop)))
    weight = p.site.view.to_tensor(untile(torch.cat(parts), p.grid))
    return memory.compact(weight.contiguous().to(torch_dtype(p.site.dtype)))


class _WithExtraState(nn.Module):
    """A module that has nothing but extra state of its own."""

    extra: Any = None

    def get_extra_state(self) -> Any:
        """As it was given."""
        return self.extra


def module_of(state: Mapping[str, Any]) -> nn.Module:
    """A module with no forward that has exactly this state dict, where a member's class is not at hand.

    Example:
        >>> module = module_of({"a.weight": torch.ones(2), "b": torch.zeros(3, dtype=torch.long)})
        >>> [name for name, _ in module.named_parameters()], [name for name, _ in module.named_buffers()]
        (['a.weight'], ['b'])
    """
    with_extra = {name.rpartition(".")[0] for name in state if name.rpartition(".")[2] == KEY}

    def new(path: str) -> nn.Module:
        return _WithExtraState() if path in with_extra else nn.Module()

    root = new("")
    made: dict[int, nn.Parameter] = {}
    for name, tensor in state.items():
        holder = root
        *path, attribute = name.split(".")
        for depth, step in enumerate(path):
            if step not in holder._modules:
                holder.add_module(step, new(".".join(path[: depth + 1])))
            holder = holder.get_submodule(step)
        if attribute == KEY:
            holder.extra = tensor
            continue
        if tensor.is_floating_point() or tensor.is_complex():
            parameter = made.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=False))
            holder.register_parameter(attribute, parameter)
        else:
            holder.register_buffer(attribute, tensor)
    return root
