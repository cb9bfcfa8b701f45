"""Tables of relatives: bits by row, more for rows that are looked up or that fine-tuning moved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery.fitting.tables import UNSEEN, row_weights
from surgery.members.member import Inputs
from surgery.storage.codecs import decode, unpacked
from surgery.storage.stored import store

ROWS, WIDTH, USED = 600, 64, 40


class Reader(nn.Module):
    """The mean of looked-up rows, and a linear map of it."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, ids):
        return self.out(self.table(ids).mean(1))


def members():
    """Two fine-tunes that look up the first rows alone and move these and some others."""
    torch.manual_seed(0)
    base = Reader().state_dict()
    ids = torch.randint(0, USED, (32, 6))
    found = []
    for seed, name in enumerate(("a", "b")):
        module, generator = Reader().eval(), torch.Generator().manual_seed(seed)
        module.load_state_dict(base)
        with torch.no_grad():
            module.table.weight[: 2 * USED] += 0.02 * torch.randn(2 * USED, WIDTH, generator=generator)
        found.append(surgery.load_member(module, name=name, inputs=Inputs((ids,))))
    return found


@pytest.mark.parametrize("calibrated", [True, False])
def test_rows_in_use_have_more_bits_and_load_again(tmp_path, calibrated):
    made = members()
    given = {each.name: [each.inputs] for each in made} if calibrated else None
    joint = surgery.fit(surgery.join(made), budget=0.07, probes=given, seed=0, device="cpu")
    (table,) = [
        each for each in map(unpacked, store(joint).tensors.values()) if each.precision.name == "mixed"
    ]
    assert table.shape == (ROWS, WIDTH)
    original = members()[0].module.table.weight.detach()
    error = (decode(table) - original).square().mean(1)
    used, moved, rest = error[:USED], error[USED : 2 * USED], error[2 * USED :]
    assert moved.median() < rest.median()
    assert not calibrated or used.median() < moved.median()
    surgery.save(joint, tmp_path / "joint")
    again = surgery.load(tmp_path / "joint", modules={name: Reader() for name in ("a", "b")})
    for name in joint.names:
        one, other = joint.collapse(name), again.collapse(name)
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert not surgery.verify(tmp_path / "joint", modules={n: Reader() for n in ("a", "b")}).files


@given(st.integers(0, 99), st.integers(1, 30), st.integers(0, 30))
@settings(max_examples=40, deadline=None)
def test_weights_of_rows_add_up(seed, rows, seen):
    generator = torch.Generator().manual_seed(seed)
    power = torch.rand(rows, generator=generator)
    power[seen:] = 0
    damped = (power / power.sum().clamp_min(1e-9) + 0.05 / rows) / 1.05
    moved = torch.rand(rows, generator=generator) * (torch.rand(rows, generator=generator) > 0.5)
    found = row_weights(damped, moved)
    assert bool((found >= 0).all()) and float(found.sum()) <= 1 + 1e-4
    alone = row_weights(None, moved)
    assert bool((alone >= 0).all()) and float(alone.sum()) <= 1 + 1e-4
    if seen:
        assert float(found[:seen].sum()) >= (1 - UNSEEN) * 0.999


def test_a_member_alone_has_more_bits_for_rows_in_use():
    one = members()[0]
    joint = surgery.fit(
        surgery.join([one]), budget=0.12, probes={one.name: [one.inputs]}, seed=0, device="cpu"
    )
    (table,) = [
        each for each in map(unpacked, store(joint).tensors.values()) if each.precision.name == "mixed"
    ]
    error = (decode(table) - members()[0].module.table.weight.detach()).square().mean(1)
    assert error[:USED].median() < 0.1 * error[USED:].median()


def test_what_all_rows_moved_by_is_private_rows_of_one_table():
    """Fine-tuning that moves all rows of a table along one direction costs a context a row, not another table."""
    torch.manual_seed(0)
    base, made = Reader().state_dict(), []
    for seed, name in enumerate("abc"):
        module, generator = Reader().eval(), torch.Generator().manual_seed(seed)
        module.load_state_dict(base)
        far, where = torch.rand(ROWS, 1, generator=generator), torch.randn(1, WIDTH, generator=generator)
        with torch.no_grad():
            module.table.weight += 0.2 * far * where
        ids = torch.randint(0, ROWS, (64, 12), generator=generator)
        made.append(surgery.load_member(module, name=name, inputs=Inputs((ids,))))
    probes = {each.name: [each.inputs] for each in made}
    joint = surgery.fit(surgery.join(made), budget=0.1, probes=probes, seed=0, device="cpu")
    (bank,) = [bank for bank in joint.plan.banks if bank.block[1] == WIDTH and bank.locations == 3 * ROWS]
    assert bank.method == "siblings"
    parts = store(joint).parts(bank.key)
    private = sum(part.nbytes for name, part in parts.items() if name != "shared")
    assert 0 < private < 0.5 * parts["shared"].nbytes
