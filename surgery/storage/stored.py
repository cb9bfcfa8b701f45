"""Storage: a joint model as named, encoded tensors, and back.

Every tensor has a storage key (`surgery.storage.keys`): of a member, or of a bank. What parts a bank has is its
method's affair; those of rows and codes are in `surgery.methods.rows.parts`.

A stored form belongs to the weights that it was made from. A tensor whose live value is what its stored form decodes
to is written in that form again, so saving what was loaded gives the same bytes; a tensor that changed is stored in
its own dtype, as it is, until a fit decides anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from surgery.anatomy.plan import BankPlan, Plan, torch_dtype
from surgery.core.bank import Bank
from surgery.core.dictionary import Dictionary, Source
from surgery.core.joint import JointModel
from surgery.core.known import Known
from surgery.core.registry import find_method
from surgery.core.settle import settle
from surgery.core.tensor_method import TensorMethod
from surgery.disk.aside import is_aside, put_aside
from surgery.handles.handle import Handle, Made
from surgery.handles.state import LazyState
from surgery.members.extra_state import extra_state_of, set_extra_state
from surgery.members.member import Member
from surgery.members.occupancy import check_unoccupied
from surgery.slots.collapse import follow
from surgery.slots.slots import assign, locate, put_back
from surgery.storage.ahead import Decode
from surgery.storage.codecs import Decoded, Encoded, as_dtype, decode, encode_native
from surgery.storage.keys import PartKey, PlainKey, StorageKey
from surgery.util import memory
from surgery.util.devices import cpu_by_default

Value = TypeVar("Value")

_FEW = 16  # values by which stored forms are distinguished
ALIAS_BYTES = 512  # a tensor smaller than this is not worth the manifest's line that would alias it


@dataclass(frozen=True)
class Stored:
    """Everything that an artifact holds of a joint model.

    Attributes:
        plan: what is generated.
        tensors: encoded tensors by storage key.
        aliases: keys of plain tensors that equal another key's, byte for byte, and are stored once.
        ties: per member, tied names by first owner.
        extra: per member, extra state by its key in the state dict.
    """

    plan: Plan
    tensors: Mapping[StorageKey, Encoded]
    aliases: Mapping[PlainKey, PlainKey] = field(default_factory=dict)
    ties: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    extra: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def parts(self, bank: str) -> dict[str, Encoded]:
        """The parts of a bank by name."""
        return dict(self._parts.get(bank, {}))

    def own(self, member: str) -> dict[str, Encoded]:
        """By name, the plain tensors of a member that are stored under its own keys."""
        return dict(self._own.get(member, {}))

    def plain(self, member: str) -> dict[str, Encoded]:
        """By name, all plain tensors of a member; a tensor that several have in common is one object for them all."""
        return self.own(member) | {name: self.tensors[first] for name, first in self.same(member).items()}

    def same(self, member: str) -> dict[str, PlainKey]:
        """By name, the keys under which tensors of a member are stored that equal another's."""
        return dict(self._same.get(member, {}))

    @cached_property
    def _parts(self) -> dict[str, dict[str, Encoded]]:
        return _grouped(
            (key.bank, key.part, e) for key, e in self.tensors.items() if isinstance(key, PartKey)
        )

    @cached_property
    def _own(self) -> dict[str, dict[str, Encoded]]:
        return plain_by_member(self.tensors)

    @cached_property
    def _same(self) -> dict[str, dict[str, PlainKey]]:
        return _grouped((key.member, key.name, first) for key, first in self.aliases.items())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are stored."""
        return sum(encoded.nbytes for encoded in self.tensors.values())


@torch.no_grad()
def store(joint: JointModel) -> Stored:
    """Encode a joint model.

    Banks that have the parts and the alignment that a fit or an artifact gave them are stored part by part; others are
    settled first. Whatever is not what its stored form decodes to is stored without loss.

    Raises:
        PlanError: where a generated weight of a member was replaced.
    """
    follow(joint)
    with joint.dictionary.borrowed():
        return _stored(joint)


def _stored(joint: JointModel) -> Stored:
    keep = {plan.key for plan in joint.plan.banks if _has_stored_form(plan, joint)}
    settled = settle(joint, keep)
    known = {k: each for k, each in joint.encoded.items() if isinstance(k, PlainKey) or k.bank in keep}
    plain = plain_tensors(joint, settled.plan, settled.plain)
    tensors: dict[StorageKey, Encoded] = {k: _encode_as_before(t, known.get(k)) for k, t in plain.items()}
    for plan in settled.plan.banks:  # bank by bank: parts may be copies of rows
        like = _parts(joint.encoded, plan.key) if plan.key in keep else ()
        live = bank_tensors(plan, settled.banks[plan.key], like)
        tensors |= {key: _encode_as_before(tensor, known.get(key)) for key, tensor in live.items()}
    return deduplicate(Stored(settled.plan, tensors, ties=ties(joint), extra=extra(joint)))


def _has_stored_form(plan: BankPlan, joint: JointModel) -> bool:
    """Whether a bank has the parts, shapes and indices that it was stored with."""
    bank, before = joint.dictionary[plan.key], _parts(joint.encoded, plan.key)
    if not before or not bank.packable:
        return False
    live = bank.pack(plan, before)
    if {name: each.shape for name, each in before.items()} != {n: tuple(t.shape) for n, t in live.items()}:
        return False
    # Indices, such as an alignment: what they point to has no stored form of its own once they are others.
    return all(
        torch.equal(decode(before[name]).long(), t.cpu().long())
        for name, t in live.items()
        if not t.is_floating_point()
    )


def plain_tensors(
    joint: JointModel, plan: Plan, settled: Mapping[tuple[str, str], Tensor]
) -> dict[StorageKey, Tensor]:
    """Every tensor that `plan` does not generate, by storage key, once for all its owners."""
    generated = {(p.site.member, p.site.name) for p in plan.placements}
    tensors: dict[StorageKey, Tensor] = {}
    for name in joint.names:
        for first in joint.owners[name]:
            if (name, first) in generated:
                continue
            tensor = settled.get((name, first))
            if tensor is None:
                holder, attribute = locate(joint[name], first)
                tensor = getattr(holder, attribute).detach()
            tensors[PlainKey(name, first)] = tensor
    return tensors


def bank_tensors(plan: BankPlan, bank: Bank, like: Collection[str] = ()) -> dict[StorageKey, Tensor]:
    """The parts of one bank by storage key.

    Args:
        plan: of the bank.
        bank: any that can be packed.
        like: the parts that it was stored as before.
    """
    return {PartKey(plan.key, part): tensor for part, tensor in bank.pack(plan, like).items()}


@cpu_by_default()  # a loaded model makes it when it is asked for, wherever that is
def build_bank(plan: BankPlan, tensors: Mapping[StorageKey, Encoded], decode: Decode = decode) -> Bank:
    """The inverse of `bank_tensors`."""
    parts = {part: decode(each) for part, each in _parts(tensors, plan.key).items()}
    bank = find_method(plan.method, TensorMethod).unpack(plan, parts)
    for parameter in bank.parameters() if is_aside() else ():
        parameter.data = put_aside(parameter.detach())
    return bank


def _source(plan: BankPlan, stored: Stored, decode_first: Decode) -> Source:
    """Where a bank can be had again: it is made of its parts, which `decode_first` decodes the first time."""
    parts: dict[StorageKey, Encoded] = {
        PartKey(plan.key, name): e for name, e in stored.parts(plan.key).items()
    }
    ways = [decode_first]
    return Source(lambda: build_bank(plan, parts, ways.pop() if ways else decode))


def _parts(tensors: Mapping[StorageKey, Encoded], bank: str) -> dict[str, Encoded]:
    return {key.part: each for key, each in tensors.items() if isinstance(key, PartKey) and key.bank == bank}


def plain_by_member(tensors: Mapping[StorageKey, Encoded]) -> dict[str, dict[str, Encoded]]:
    """Plain tensors by name, those of each member; in one pass, as there may be many members."""
    return _grouped((key.member, key.name, e) for key, e in tensors.items() if isinstance(key, PlainKey))


def _grouped(entries: Iterable[tuple[str, str, Value]]) -> dict[str, dict[str, Value]]:
    found: dict[str, dict[str, Value]] = {}
    for owner, name, value in entries:
        found.setdefault(owner, {})[name] = value
    return found


def compressed(plan: Plan, encoded: Mapping[StorageKey, Encoded]) -> frozenset[tuple[str, str]]:
    """Tensors, by member and first owner, that are not stored in their own dtype.

    Args:
        plan: what is generated.
        encoded: by storage key, as `expand` returns them.
    """
    found = [key for key, each in encoded.items() if not each.precision.is_native]
    banks = {key.bank for key in found if isinstance(key, PartKey)}
    plain = {(key.member, key.name) for key in found if isinstance(key, PlainKey)}
    return frozenset(plain | {(p.site.member, p.site.name) for p in plan.placements if p.bank in banks})


def loosened(joint: JointModel) -> dict[str, int]:
    """How many compressed tensors changed since, so that they are stored in their own dtype; by that dtype.

    Example:
        >>> surgery.train(surgery.fit(joint, max_error=0.02), tasks)
        >>> loosened(joint)
        {'float32': 38}
    """
    before = joint.known.compressed
    if not before:
        return {}
    stored = store(joint)
    found: dict[str, int] = {}
    for member, name in sorted(before - compressed(stored.plan, expand(stored))):
        dtype = str(getattr(*locate(joint[member], name)).dtype).removeprefix("torch.")
        found[dtype] = found.get(dtype, 0) + 1
    return found


def deduplicate(stored: Stored) -> Stored:
    """Keep one of several plain tensors that are equal byte for byte, within and across members."""
    tensors: dict[StorageKey, Encoded] = {}
    aliases: dict[PlainKey, PlainKey] = {}
    seen: dict[object, list[PlainKey]] = {}
    for key, encoded in stored.tensors.items():
        if isinstance(key, PlainKey) and encoded.nbytes >= ALIAS_BYTES:
            alike = seen.setdefault(_looks(encoded), [])
            first = next((at for at in alike if same_bytes(stored.tensors[at], encoded)), None)
            if first is not None:
                aliases[key] = first
                continue
            alike.append(key)
        tensors[key] = encoded
    return replace(stored, tensors=tensors, aliases=aliases)


def ties(joint: JointModel) -> dict[str, dict[str, tuple[str, ...]]]:
    """Per member, the names of every tied tensor by its first owner."""
    return {
        name: tied
        for name, owners in joint.owners.items()
        if (tied := {first: names for first, names in owners.items() if len(names) > 1})
    }


def extra(joint: JointModel) -> dict[str, dict[str, Any]]:
    """Per member that has any, extra state by its key in the state dict."""
    return {name: found for name in joint.names if (found := extra_state_of(joint[name]))}


def revive(
    members: Sequence[Member], stored: Stored, known: Known | None = None, decode: Decode = decode
) -> JointModel:
    """A joint model from its stored form; the members' modules may still be without weights."""
    check_unoccupied({member.name: member.module for member in members})
    encoded = expand(stored)
    _assign_plain(members, stored, encoded, decode)
    banks = {plan.key: _source(plan, stored, decode) for plan in stored.plan.banks}
    joint = JointModel(members, stored.plan, Dictionary(banks), encoded, known)
    for name, values in stored.extra.items():
        set_extra_state(joint[name], values)
    return joint


def adopt(joint: JointModel, stored: Stored, known: Known | None = None) -> JointModel:
    """Give a joint model another stored form in place: a new plan, new banks, new plain tensors."""
    joint.vacate()
    joint.dictionary = Dictionary()
    for p in stored.plan.placements:  # what is generated from now on makes room for what generates it
        module, first = joint[p.site.member], p.site.owners[0]
        empty = torch.empty(p.site.shape, dtype=torch_dtype(p.site.dtype), device="meta")
        put_back(module, p.site.owners, empty, getattr(*locate(module, first)).requires_grad)
    memory.give_back()
    encoded = expand(stored)
    _assign_plain(list(joint.members.values()), stored, encoded)
    banks = {plan.key: build_bank(plan, stored.tensors) for plan in stored.plan.banks}
    return joint.occupy(stored.plan, Dictionary(banks), encoded, known or Known())


def expand(stored: Stored) -> dict[StorageKey, Encoded]:
    """Encoded tensors by storage key, those that are stored under another key too."""
    return dict(stored.tensors) | {key: stored.tensors[first] for key, first in stored.aliases.items()}


def _assign_plain(
    members: Sequence[Member], stored: Stored, encoded: Mapping[StorageKey, Encoded], decode: Decode = decode
) -> None:
    shared = {*stored.aliases, *stored.aliases.values()}
    plain = plain_by_member(encoded)
    for member in members:
        tensors: dict[str, Handle] = {}
        for name, each in plain.get(member.name, {}).items():
            own = handle = Decoded(each, decode)
            # Stored once, but several own it: each gets memory of its own.
            if PlainKey(member.name, name) in shared:
                handle = Made(own.shape, own.dtype, own.device, lambda own=own: put_aside(own.read().clone()))
            elif not each.precision.is_native:
                handle = Made(own.shape, own.dtype, own.device, lambda own=own: put_aside(own.read()))
            tensors[name] = handle
        assign(member.module, LazyState(tensors), dict(stored.ties.get(member.name, {})))


def _encode_as_before(tensor: Tensor, before: Encoded | None) -> Encoded:
    """The stored form that a tensor came from where it still decodes to the tensor, else the tensor as it is."""
    if before is not None and before.shape == tuple(tensor.shape):
        before = as_dtype(before, tensor.dtype)  # another one where the model was moved
        if before is not None:
            old = decode(before).to(tensor.device)
            if old is tensor or _bytes(old).equal(_bytes(tensor)):
                return before
    return encode_native(tensor)


def same_bytes(one: Encoded, other: Encoded) -> bool:
    """Whether two stored forms of one precision, dtype and shape are equal byte for byte."""
    if one is other:
        return True
    pairs = [(each, other.parts[name].to(each.device)) for name, each in sorted(one.parts.items())]
    return all(_bytes(a).equal(_bytes(b)) for a, b in pairs)


def _looks(encoded: Encoded) -> object:
    """Equal for equal stored forms: their form, and a few values from all over, which distinguish most."""
    few = []
    for name, part in sorted(encoded.parts.items()):
        flat = part.reshape(-1)
        few.append((name, bytes(_bytes(flat[:: max(1, flat.numel() // _FEW)].cpu()).numpy().data)))
    return str(encoded.precision), encoded.shape, encoded.dtype, tuple(few)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
