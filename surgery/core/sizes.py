"""Counts parameters and bytes of members alone and of their parts of a joint model.

*Parameters* of a member are the elements of its `nn.Parameter`s, a tied one once; buffers are none. *Bytes* are those
of the tensors in its state dict, parameters and buffers, a tied one once. A member *alone* has each of these in its
own dtype. In a joint model, what several use is divided among its uses: a row among the locations that draw on it, a
tensor that is stored once among its members. So parts add up to the whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from surgery.anatomy.plan import BankPlan, torch_dtype
from surgery.core.registry import find_method
from surgery.core.tensor_method import TensorMethod
from surgery.members.member import owners_of, state_tensors
from surgery.storage.keys import PlainKey

if TYPE_CHECKING:
    from surgery.core.joint import JointModel
    from surgery.storage.stored import Stored

COPY = "shared copy"


@dataclass(frozen=True)
class TensorReport:
    """How one tensor is stored.

    Attributes:
        member: whose it is.
        name: first owner.
        how: as its method says, such as `shared rows`; `shared copy` with its precision, or the precision of a plain
            tensor.
        nbytes: its part of the artifact; shared bytes are divided among their users.
        original: bytes that it takes alone, in its own dtype.
    """

    member: str
    name: str
    how: str
    nbytes: int
    original: int


# -- bytes -------------------------------------------------------------------------------------------------


def count_tensors(stored: Stored) -> tuple[TensorReport, ...]:
    """What every tensor of every member takes, member by member; the parts are whole bytes and add up to
    `stored.nbytes`.

    Example:
        >>> rows = count_tensors(store(joint))
        >>> sum(row.nbytes for row in rows) == store(joint).nbytes
        True
    """
    users: dict[PlainKey, int] = {}
    for first in stored.aliases.values():
        users[first] = users.get(first, 1) + 1
    parts = {bank.key: location_bytes(stored, bank).cumsum(0) for bank in stored.plan.banks}
    rows: list[TensorReport] = []
    exact, counted = 0.0, 0  # so far, as it is and in whole bytes
    words = {bank.key: how_stored(bank.method) for bank in stored.plan.banks}
    for member in stored.plan.members:
        found: list[tuple[str, str, float, int]] = []
        own = {name: PlainKey(member, name) for name in stored.own(member)}
        for name, first in (*own.items(), *stored.same(member).items()):
            encoded, sharers = stored.tensors[first], users.get(first, 1)
            how = f"{COPY}, {encoded.precision.shown}" if sharers > 1 else encoded.precision.shown
            whole = math.prod(encoded.shape) * encoded.dtype.itemsize
            found.append((name, how, encoded.nbytes / sharers, whole))
        for p in stored.plan.of(member):
            upto = parts[p.bank]
            part = float(upto[p.stop - 1]) - (float(upto[p.start - 1]) if p.start else 0.0)
            whole = math.prod(p.site.shape) * torch_dtype(p.site.dtype).itemsize
            found.append((p.site.name, words[p.bank], part, whole))
        for name, how, part, whole in found:
            exact += part
            rows.append(TensorReport(member, name, how, round(exact) - counted, whole))
            counted = round(exact)
    return tuple(rows)


def how_stored(method: str) -> str:
    """How reports say that a tensor of a method's bank is stored."""
    return find_method(method, TensorMethod).stored_as or method


def bytes_alone(stored: Stored) -> dict[str, int]:
    """Bytes of each member alone, *before* it was joined: its tensors, tied ones once, each in its own dtype."""
    return _by_member(stored, {row: row.original for row in count_tensors(stored)})


def bytes_joint(stored: Stored) -> dict[str, int]:
    """Bytes that each member takes of a stored joint model; they add up to `stored.nbytes`."""
    return _by_member(stored, {row: row.nbytes for row in count_tensors(stored)})


def bytes_of_module(module: nn.Module) -> int:
    """Bytes of a model's state dict, a tied tensor once: what `bytes_alone` says of it once it is joined."""
    state = state_tensors(module)
    return sum(state[first].numel() * state[first].element_size() for first in owners_of(module))


def location_bytes(stored: Stored, bank: BankPlan) -> Tensor:
    """Bytes that each location takes of a stored bank `[L]`, float64: its part of what is shared, and its own."""
    return find_method(bank.method, TensorMethod).location_bytes(bank, stored.parts(bank.key))


# -- parameters --------------------------------------------------------------------------------------------


def parameters_of_module(module: nn.Module) -> int:
    """Parameters of a model, a tied one once."""
    return sum(parameter.numel() for parameter in module.parameters())


def parameters_alone(joint: JointModel) -> dict[str, int]:
    """Parameters of each member alone: of its sites, and of what it keeps to itself; before modules were replaced."""
    alone = {name: member.alone for name, member in joint.members.items()}
    return {
        name: before.parameters
        if (before := alone[name]) is not None
        else sum(parameter.numel() for parameter in joint.private(name).values())
        + sum(math.prod(p.site.shape) for p in joint.plan.of(name))
        for name in joint.names
    }


def parameters_joint(joint: JointModel) -> dict[str, float]:
    """Parameters that each member takes of a joint model after collapse: its part of the dictionary, and its private
    ones, where one that several members hold is divided among them."""
    holders: dict[int, int] = {}
    for name in joint.names:
        for parameter in joint.private(name).values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    found = {
        name: sum(parameter.numel() / holders[id(parameter)] for parameter in joint.private(name).values())
        for name in joint.names
    }
    for plan in joint.plan.banks:
        part = location_parameters(joint, plan.key)
        for p in joint.plan.placements:
            if p.bank == plan.key:
                found[p.site.member] += float(part[p.start : p.stop].sum())
    return found


def parameters_of_dictionary(joint: JointModel) -> tuple[int, int]:
    """Parameters in the dictionary after collapse, and in the sites that it generates."""
    now = sum(float(location_parameters(joint, plan.key).sum()) for plan in joint.plan.banks)
    return round(now), sum(math.prod(p.site.shape) for p in joint.plan.placements)


def parameters_trained(joint: JointModel) -> int:
    """Parameters that training changes: of the dictionary and private ones, but for those that are frozen."""
    return sum(parameter.numel() for parameter in joint.parameters() if parameter.requires_grad)


def location_parameters(joint: JointModel, key: str) -> Tensor:
    """Parameters that each location takes of a bank after collapse `[L]`, float64.

    Args:
        joint: the joint model.
        key: of the bank.
    """
    plan = joint.plan.bank(key)
    first = not plan.stack or key == joint.plan.stacks[plan.stack][0]
    mine = joint.plan.in_bank(key)
    with joint.dictionary.borrowed():
        return joint.dictionary[key].location_parameters(mine, first)


def _by_member(stored: Stored, sizes: Mapping[TensorReport, int]) -> dict[str, int]:
    found = dict.fromkeys(stored.plan.members, 0)
    for row, size in sizes.items():
        found[row.member] += size
    return found
