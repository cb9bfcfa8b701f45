"""Adds a member to a stored joint model whose other members stay as they are; `trim.restrict` is the way back.

Nothing that is stored already is decoded or encoded: banks get further parts, and tensors that are stored already are
aliases of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from surgery.anatomy.plan import Placement, Plan
from surgery.core.method import tensor_method
from surgery.storage.codecs import Encoded
from surgery.storage.keys import PartKey, PlainKey, StorageKey
from surgery.storage.stored import ALIAS_BYTES, Stored


def graft(stored: Stored, addition: Stored, banks: Mapping[str, str]) -> Stored:
    """A stored joint model with one more member.

    Args:
        stored: of the other members.
        addition: of the new member alone, each of its banks with what the bank that it will join has in common.
        banks: by the key of each bank of the addition, that of the bank that its sites join.
    """
    plans = {bank.key: bank for bank in stored.plan.banks}
    tensors: dict[StorageKey, Encoded] = dict(stored.tensors)
    placements: list[Placement] = []
    for p in addition.plan.placements:  # one bank for each site
        bank, more = plans[banks[p.bank]], addition.plan.bank(p.bank)
        held = {k.part: e for k, e in tensors.items() if isinstance(k, PartKey) and k.bank == bank.key}
        method = tensor_method(bank.method)
        plans[bank.key], parts = method.extend(bank, held, more, addition.parts(p.bank))
        tensors.update({PartKey(bank.key, name): each for name, each in parts.items()})
        placements.append(replace(p, bank=bank.key, start=bank.locations))
    plain, aliases = _shared_with(stored, addition)
    return Stored(
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


def same_bytes(one: Encoded, other: Encoded) -> bool:
    """Whether two stored forms of one precision, dtype and shape are equal byte for byte; most are seen to differ in a
    few values."""
    if one is other:
        return True
    few = slice(0, 16)
    pairs = [(each.reshape(-1), other.parts[name].reshape(-1)) for name, each in sorted(one.parts.items())]
    return all(_equal(a[few], b[few]) for a, b in pairs) and all(_equal(a, b) for a, b in pairs)


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(*(each.contiguous().view(torch.uint8) for each in (one, other)))


def _form(encoded: Encoded) -> object:
    return encoded.precision, encoded.dtype, encoded.shape
