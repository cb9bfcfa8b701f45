"""Adds a member to a stored joint model whose other members stay as they are; `trim.restrict` is the way back.

Nothing that is stored already is decoded or encoded: banks get further parts, and tensors that are stored already are
aliases of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import count

from surgery.anatomy.plan import Placement, Plan
from surgery.core.registry import find_method
from surgery.core.tensor_method import TensorMethod
from surgery.storage.codecs import Encoded
from surgery.storage.keys import PartKey, PlainKey, StorageKey
from surgery.storage.stored import ALIAS_BYTES, Stored, same_bytes


def graft(stored: Stored, addition: Stored, banks: Mapping[str, str | PlainKey]) -> Stored:
    """A stored joint model with one more member.

    Args:
        stored: of the other members.
        addition: of the new member alone, each of its banks with what the bank that it will join has in common.
        banks: by the key of each bank of the addition, that of the bank that its sites join, or that of a plain tensor
            that becomes what a new bank has in common.
    """
    stored, banks = _lend(stored, addition, banks)
    plans = {bank.key: bank for bank in stored.plan.banks}
    tensors: dict[StorageKey, Encoded] = dict(stored.tensors)
    placements: list[Placement] = []
    for p in addition.plan.placements:  # one bank for each site
        bank, more = plans[banks[p.bank]], addition.plan.bank(p.bank)
        held = {k.part: e for k, e in tensors.items() if isinstance(k, PartKey) and k.bank == bank.key}
        method = find_method(bank.method, TensorMethod)
        plans[bank.key], parts = method.extend(bank, held, more, addition.parts(p.bank))
        tensors.update({PartKey(bank.key, name): each for name, each in parts.items()})
        placements.append(replace(p, bank=bank.key, start=bank.locations))
    plain, aliases = _shared_with(stored, addition)
    return give_back(
        Stored(
            Plan(
                (*stored.plan.members, *addition.plan.members),
                tuple(plans.values()),
                (*stored.plan.placements, *placements),
                stored.plan.left_alone,
            ),
            tensors | plain,
            {**stored.aliases, **aliases},
            {**stored.ties, **addition.ties},
            {**stored.extra, **addition.extra},
        )
    )


def _lend(
    stored: Stored, addition: Stored, banks: Mapping[str, str | PlainKey]
) -> tuple[Stored, dict[str, str]]:
    """Plain tensors that new sites join as banks of their own, and the keys of all banks that are joined."""
    found, tensors = dict[str, str](), dict(stored.tensors)
    plans, placements = list(stored.plan.banks), list(stored.plan.placements)
    for p in addition.plan.placements:
        key = banks[p.bank]
        if isinstance(key, str):
            found[p.bank] = key
            continue
        method = find_method(addition.plan.bank(p.bank).method, TensorMethod)
        names = {plan.key for plan in plans}
        name = next(name for i in count() if (name := f"{p.bank.rpartition('-')[0]}-lent-{i}") not in names)
        owners = stored.ties.get(key.member, {}).get(key.name, (key.name,))
        lent = method.lend(
            name, replace(p.site, member=key.member, name=key.name, owners=owners), tensors.pop(key)
        )
        assert lent is not None  # that it can be was asked before
        plan, placement, parts = lent
        plans.append(plan)
        placements.append(placement)
        tensors.update({PartKey(name, part): each for part, each in parts.items()})
        found[p.bank] = name
    whole = replace(stored.plan, banks=tuple(plans), placements=tuple(placements))
    return replace(stored, plan=whole, tensors=tensors), found


def give_back(stored: Stored) -> Stored:
    """The same with tensors that were lent to others as plain ones of their member again, where no other needs them."""
    back = {
        bank.key: tensor
        for bank in stored.plan.banks
        if (tensor := find_method(bank.method, TensorMethod).given_back(bank, stored.parts(bank.key)))
        is not None
    }
    if not back:
        return stored
    tensors = {k: each for k, each in stored.tensors.items() if isinstance(k, PlainKey) or k.bank not in back}
    aliases, ties = dict(stored.aliases), {member: dict(tied) for member, tied in stored.ties.items()}
    first: dict[str, PlainKey] = {}
    for member in stored.plan.members:
        for p in stored.plan.of(member):
            if p.bank in back:
                key = PlainKey(member, p.site.name)
                if first.setdefault(p.bank, key) == key:
                    tensors[key] = back[p.bank]
                else:
                    aliases[key] = first[p.bank]
                if len(p.site.owners) > 1:
                    ties.setdefault(member, {})[p.site.name] = p.site.owners
    plan = replace(
        stored.plan,
        banks=tuple(bank for bank in stored.plan.banks if bank.key not in back),
        placements=tuple(p for p in stored.plan.placements if p.bank not in back),
    )
    return replace(stored, plan=plan, tensors=tensors, aliases=aliases, ties=ties)


def _shared_with(
    stored: Stored, addition: Stored
) -> tuple[dict[PlainKey, Encoded], dict[PlainKey, PlainKey]]:
    """Plain tensors of an addition that no other member holds byte for byte, and whose key those have that one does."""
    alike: dict[object, list[PlainKey]] = {}
    for key, each in stored.tensors.items():
        if isinstance(key, PlainKey) and each.nbytes >= ALIAS_BYTES:
            alike.setdefault(_form(each), []).append(key)
    plain: dict[PlainKey, Encoded] = {}
    aliases: dict[PlainKey, PlainKey] = {}
    for key, each in addition.tensors.items():
        if isinstance(key, PlainKey):
            same = (at for at in alike.get(_form(each), ()) if same_bytes(stored.tensors[at], each))
            first = next(same, None)
            if first is None:
                plain[key] = each
            else:
                aliases[key] = first
    aliases.update({key: aliases.get(first, first) for key, first in addition.aliases.items()})
    return plain, aliases


def _form(encoded: Encoded) -> object:
    return encoded.precision, encoded.dtype, encoded.shape
