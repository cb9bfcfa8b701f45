"""What is decoded once is used again, for other members and for the next stored form, and never for what changed."""

from __future__ import annotations

import pytest
import torch
from artifacts import member
from test_structure import family

import surgery
from surgery.fitting import decoding
from surgery.fitting.decoding import Decodings
from surgery.storage.codecs import decode, encode, grouped
from surgery.storage.keys import PartKey, PlainKey
from surgery.storage.stored import Stored, store


@pytest.fixture(scope="module")
def stored():
    inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    joint = surgery.join([member(net, name, inputs) for name, net in family(0.02, rank=2).items()])
    found = store(surgery.fit(joint, budget=0.15))
    assert {bank.method for bank in found.plan.banks} == {"siblings"}
    return found


def weights(decodings: Decodings, stored: Stored):
    found = {name: decodings.weights_of(stored, name) for name in stored.plan.members}
    decodings.end_attempt()
    return found


def equal(one, other):
    return all(
        one[name].keys() == other[name].keys()
        and all(torch.equal(one[name][key], other[name][key]) for key in one[name])
        for name in one
    )


def counted(monkeypatch):
    """How often anything is decoded, banks or tensors."""
    calls = []

    def count(name):
        real = getattr(decoding, name)
        monkeypatch.setattr(decoding, name, lambda *arguments: calls.append(name) or real(*arguments))

    count("build_bank"), count("decode")
    return calls


def test_a_bank_is_decoded_once_for_all_members_and_all_attempts(stored, monkeypatch):
    calls, decodings = counted(monkeypatch), Decodings()
    first = weights(decodings, stored)
    assert calls.count("build_bank") == len(stored.plan.banks)
    calls.clear()
    assert equal(weights(decodings, stored), first)
    assert "build_bank" not in calls
    native = sum(e.precision.is_native for name in stored.plan.members for e in stored.plain(name).values())
    assert calls.count("decode") == native  # lie where they lay


@pytest.mark.parametrize("room", [0, 3000, 1 << 30])
def test_weights_are_the_same_whatever_there_is_room_for(stored, room):
    decodings = Decodings(room)
    for _ in range(2):
        assert equal(weights(decodings, stored), weights(Decodings(0), stored))
        assert decodings.held <= room


def test_what_changed_is_decoded_anew_and_the_rest_let_go(stored):
    decodings = Decodings()
    before = weights(decodings, stored)
    key, old = next(
        (k, e) for k, e in stored.tensors.items() if isinstance(k, PlainKey) and len(e.shape) == 2
    )
    coarse = encode(torch.randn(old.shape), grouped(3, 16))
    changed = Stored(stored.plan, {**stored.tensors, key: coarse}, stored.aliases, stored.ties)
    after = weights(decodings, changed)
    assert equal(after, weights(Decodings(0), changed)) and not equal(after, before)
    held = {id(source) for each in decodings._kept.values() for source in each.source}
    assert id(coarse) in held and id(old) not in held
    assert decodings.held == sum(each.nbytes for each in decodings._kept.values())


def test_what_relatives_share_is_decoded_once_whatever_is_their_own(stored, monkeypatch):
    decodings, key = Decodings(), PartKey(stored.plan.banks[0].key, "rows.0")
    before, seen = weights(decodings, stored), []
    monkeypatch.setattr(decoding, "decode", lambda encoded: seen.append(encoded) or decode(encoded))
    own = encode(2 * decode(stored.tensors[key]), grouped(8, 64))
    changed = Stored(stored.plan, {**stored.tensors, key: own}, stored.aliases, stored.ties)
    after = weights(decodings, changed)
    shared = stored.tensors[PartKey(key.bank, "shared")]
    assert any(each is own for each in seen) and not any(each is shared for each in seen)
    assert equal(after, weights(Decodings(0), changed)) and not equal(after, before)
