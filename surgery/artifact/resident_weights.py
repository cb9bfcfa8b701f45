"""Weights of members that stay packed: what each is held as, so that all take little more than they do in files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from surgery.anatomy.plan import Placement, torch_dtype
from surgery.artifact.guarding import guard
from surgery.artifact.resident import Resident, ResidentModel
from surgery.core.registry import find_method
from surgery.core.tensor_method import TensorMethod
from surgery.errors import PlanError
from surgery.members.extra_state import set_extra_state
from surgery.members.member import Member
from surgery.slots.slots import assign, forget_derived, locate, put_back
from surgery.storage.cache import Cache
from surgery.storage.codecs import Encoded, decode, encode_native, unpacked
from surgery.storage.held import held_faster
from surgery.storage.keys import PartKey
from surgery.storage.packed import Form, PackedWeight
from surgery.storage.stored import Stored, expand

HELD: dict[Resident, float] = {"packed": 1.15, "shared": 1.3}
"""Of stored bytes, what may be held in all."""
MARGIN = 0.01  # for buffers that are not stored

Forms = dict[str | Placement, Form]
"""What a member's weights are decoded or generated from, by parameter name or by its site's place in a bank."""


def make_resident(members: list[Member], stored: Stored, resident: Resident, cache: int = 0) -> ResidentModel:
    """Fill members, still without weights, with what is stored of them.

    Args:
        members: of the artifact; modules on the meta device.
        stored: of them.
        resident: how weights are held.
        cache: bytes of decoded tensors that are kept.

    Raises:
        PlanError: where that is no way, or modules of a member were replaced.
    """
    for member in members:
        if member.replaced:
            raise PlanError(
                f"Modules of member '{member.name}' were replaced, which are not held as {resident}: load it without "
                "`resident`."
            )
    nbytes, kept = stored.nbytes, Cache(cache) if cache else None
    # Codes that are Huffman-coded are held as they were before: a few bytes more, of which rows can be had alone.
    stored = replace(stored, tensors={key: unpacked(each) for key, each in stored.tensors.items()})
    forms = _forms(members, stored, kept, of_common=resident == "shared")
    other = _faster(members, forms, int((HELD[resident] - MARGIN) * nbytes))
    decoded: dict[int, Tensor] = {}  # what is not packed, by its stored form: members have it in common
    for member in members:
        mine = {
            place: replace(form, parts={name: other.get(id(e), e) for name, e in form.parts.items()})
            for place, form in forms[member.name].items()
        }
        _fill(member, mine, decoded, dict(stored.ties.get(member.name, {})))
        for name, values in stored.extra.items():
            if name == member.name:
                set_extra_state(member.module, values)
        guard(member.module)
    return ResidentModel({member.name: member for member in members}, resident, nbytes, kept)


def _forms(
    members: Sequence[Member], stored: Stored, cache: Cache | None, of_common: bool
) -> dict[str, Forms]:
    """By member; what several have in common is one stored form in each of theirs."""
    found: dict[str, Forms] = {member.name: {} for member in members}
    for key, each in expand(stored).items():
        if not isinstance(key, PartKey):
            found[key.member][key.name] = Form({"": each}, cache=cache)
    for bank in stored.plan.banks:
        method, parts = find_method(bank.method, TensorMethod), stored.parts(bank.key)
        for p in stored.plan.placements:
            if p.bank == bank.key:
                plan, (placement,), kept = method.restrict(bank, [p], parts)
                found[p.site.member][p] = Form(kept, (plan, placement), cache)
    held = Counter(id(e) for mine in found.values() for form in mine.values() for e in form.parts.values())
    for forms in found.values():
        for p, form in forms.items():
            if isinstance(p, Placement) and all(held[id(e)] == 1 for e in form.parts.values()):
                dtype = torch_dtype(p.site.dtype)
                if sum(e.nbytes for e in form.parts.values()) >= math.prod(p.site.shape) * dtype.itemsize:
                    forms[p] = Form({"": encode_native(form.read(dtype))})  # its rows are no smaller
    if cache and of_common:
        users = _users(found)
        for forms in found.values():
            for place, form in forms.items():
                names = frozenset(
                    name
                    for name, e in form.parts.items()
                    if len(users[id(e)]) > 1 and not e.precision.is_native
                )
                forms[place] = replace(form, common=names)
    return found


def _users(forms: Mapping[str, Forms]) -> dict[int, set[str]]:
    """Members of every stored form, by its id."""
    users: dict[int, set[str]] = {}
    for member, mine in forms.items():
        for form in mine.values():
            for each in form.parts.values():
                users.setdefault(id(each), set()).add(member)
    return users


def _faster(members: Sequence[Member], forms: Mapping[str, Forms], most: int) -> dict[int, Encoded]:
    """What is held in place of some stored forms, by their ids, so that all take no more than `most` bytes."""
    found = {id(e): e for mine in forms.values() for form in mine.values() for e in form.parts.values()}
    pieces = {
        (part.data_ptr(), part.numel()): part.nbytes for e in found.values() for part in e.parts.values()
    }
    uses = {key: len(names) / len(members) for key, names in _users(forms).items()}
    tables = {
        id(form.parts[""])
        for member in members
        for place, form in forms[member.name].items()
        if isinstance(place, str) and isinstance(locate(member.module, place)[0], nn.Embedding)
    }
    return held_faster([*found.values()], uses, most - sum(pieces.values()), tables)


def _fill(
    member: Member, forms: Forms, decoded: dict[int, Tensor], ties: Mapping[str, tuple[str, ...]]
) -> None:
    """Give a member its tensors: packed where that takes less, or memory that is shared."""
    module, tensors = member.module, {}
    for place, form in forms.items():
        if not isinstance(place, str):
            continue
        each = form.parts[""]
        holder, attribute = locate(module, place)
        if attribute in holder._buffers:  # a forward pass may write to it
            tensors[place] = decode(each).clone()
        elif each.precision.is_native:
            if id(each) not in decoded:
                decoded[id(each)] = decode(each)
            tensors[place] = decoded[id(each)]
        else:
            tensors[place] = _parameter(form, each.shape, each.dtype)
    assign(module, tensors, dict(ties))
    for p, form in forms.items():
        if isinstance(p, str):
            continue
        dtype = torch_dtype(p.site.dtype)
        dense = form.plan is None  # as it is
        weight = form.read(dtype) if dense else _parameter(form, p.site.shape, dtype)
        put_back(module, p.site.owners, weight, requires_grad=False)
    for parameter in module.parameters():
        if not isinstance(parameter, PackedWeight):
            parameter.requires_grad_(False)
    forget_derived(module)


def _parameter(form: Form, shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(PackedWeight(form, shape, dtype), requires_grad=False)
