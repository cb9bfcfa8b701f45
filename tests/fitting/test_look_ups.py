"""Look-ups of tables: how often rows are used, and how much rows count that no data used yet."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery.errors import PlanError
from surgery.fitting.tables import look_ups, unseen_share
from surgery.members.member import Inputs, Member
from surgery.storage.keys import PlainKey
from surgery.storage.stored import store


class Readers(nn.Module):
    """A table that is looked up twice, one of bags of rows, and one that is multiplied with."""

    def __init__(self):
        super().__init__()
        self.words, self.bags, self.tied = nn.Embedding(12, 4), nn.EmbeddingBag(9, 4), nn.Embedding(7, 4)

    def forward(self, ids):
        first = self.words(ids) + F.embedding(weight=self.words.weight, input=ids.flip(0))
        return (first.mean(1) + self.bags(ids % 9)) @ self.tied.weight.T


@given(st.integers(0, 999), st.integers(1, 5), st.integers(1, 8))
@settings(max_examples=20, deadline=None)
def test_look_ups_are_counted_by_row(seed, batch, length):
    module, generator = Readers().eval(), torch.Generator().manual_seed(seed)
    batches = [torch.randint(0, 12, (batch, length), generator=generator) for _ in range(3)]
    names = [f"{name}.weight" for name in ("words", "bags", "tied")]
    found = look_ups(module, names, [((ids,), {}) for ids in batches])
    every = torch.cat(batches).flatten()
    assert torch.equal(found["words.weight"], 2 * torch.bincount(every, minlength=12))
    assert torch.equal(found["bags.weight"], torch.bincount(every % 9, minlength=9))
    assert "tied.weight" not in found


@pytest.mark.parametrize("power", [0.8, 1.2, 2.0])
def test_what_unseen_rows_count_is_estimated_without_bias(power):
    """Of look-ups by a power law: the mean of the estimates against that of what unseen rows are in fact looked up."""
    generator = torch.Generator().manual_seed(0)
    law = 1 / torch.arange(1, 2001, dtype=torch.float64) ** power
    law = law / law.sum()
    estimates, true = [], []
    for _ in range(200):
        ids = torch.multinomial(law, 500, replacement=True, generator=generator)
        uses = torch.bincount(ids, minlength=len(law))
        estimates.append(unseen_share(uses / uses.sum(), uses))
        true.append(float(law[uses == 0].sum()))
    error = torch.tensor(estimates).double() - torch.tensor(true).double()
    # Beside chance one look-up in 501 is always taken to be of a new row.
    assert abs(float(error.mean())) < 3 * float(error.std()) / 200**0.5 + 2 / 501


@given(st.integers(0, 999), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_a_share_is_a_share(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    uses = torch.randint(0, 4, (rows,), generator=generator)
    own = torch.rand(rows, generator=generator) * (uses > 0)
    share = unseen_share(own / own.sum().clamp_min(1e-30), uses)
    assert 0 < share <= 1 + 1e-6


class Tagger(nn.Module):
    """A table and a linear layer."""

    def __init__(self, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.words, self.out = nn.Embedding(300, 32), nn.Linear(32, 32)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        generator.manual_seed(seed)
        self.out.weight.data += 0.05 * torch.randn(32, 32, generator=generator)

    def forward(self, ids):
        return self.out(self.words(ids).mean(1))


def tagger(seed: int, name: str) -> Member:
    return surgery.load_member(
        Tagger(seed), name=name, inputs=Inputs((torch.zeros(2, 12, dtype=torch.long),))
    )


def test_an_equal_table_of_calibrated_relatives_is_stored_once():
    generator = torch.Generator().manual_seed(7)
    probes = {
        name: [Inputs((torch.randint(0, 300, (8, 12), generator=generator),)) for _ in range(3)]
        for name in "ab"
    }
    joint = surgery.join([tagger(1, "a"), tagger(2, "b")])
    surgery.fit(joint, budget=0.3, seed=0, probes=probes, device="cpu")
    assert joint.report is not None and max(joint.report.errors.values()) < 0.1
    assert PlainKey("b", "words.weight") in store(joint).aliases


def test_inputs_that_a_member_cannot_run_on_are_named():
    joint = surgery.join([tagger(1, "a")])
    with pytest.raises(
        PlanError, match=r"Member 'a' must run on its probe inputs, but on 0 \[2, 3\] of torch.int64"
    ):
        surgery.fit(joint, budget=0.2, probes={"a": [Inputs((torch.full((2, 3), 999),))]}, device="cpu")
