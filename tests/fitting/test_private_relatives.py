"""Private tensors of relatives, such as embeddings, are stored together where that pays."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from artifacts import contents, member
from torch import nn

import surgery

NAMES = ("one", "two", "three")


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.middle, self.last = nn.Embedding(400, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, ids):
        x = self.table(ids)
        return self.last((x + torch.relu(self.middle(x))).mean(1))


def readers(size=0.02):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base, found = Reader().eval(), {}
        for name in NAMES:
            found[name] = net = deepcopy(base)
            with torch.no_grad():
                for weight in (net.table.weight, net.middle.weight):
                    weight += size * weight.std() * torch.randn(weight.shape)
    return found


def joined(**options):
    ids = torch.randint(400, (16, 12), generator=torch.Generator().manual_seed(1))
    members = [member(net, name, ids) for name, net in readers().items()]
    plan = surgery.make_plan([surgery.discover(each, **options) for each in members])
    return surgery.join(members, plan)


@pytest.fixture(scope="module")
def fitted():
    return surgery.fit(joined(), budget=0.1)


def test_one_table_serves_all_members(fitted):
    generated = {p.site.name for p in fitted.plan.placements}
    assert "table.weight" in generated
    assert not any(each.name == "table.weight" for each in fitted.plan.left_alone)
    assert max(fitted.report.errors.values()) < 0.1


def test_it_is_saved_loaded_and_fitted_again(fitted, tmp_path):
    surgery.save(fitted, tmp_path / "joint")
    again = surgery.load(tmp_path / "joint", modules={name: Reader() for name in NAMES})
    for name in NAMES:
        one, other = fitted.collapse(name), again.collapse(name)
        assert all(torch.equal(one[key], other[key]) for key in one)
    surgery.save(again, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "joint")
    smaller = surgery.fit(again, max_error=0.2)
    assert smaller.report.met and smaller.report.stored_bytes < fitted.report.stored_bytes


def test_a_fit_that_does_not_share_gives_the_table_back(fitted, tmp_path):
    surgery.save(fitted, tmp_path / "joint")
    again = surgery.load(tmp_path / "joint", modules={name: Reader() for name in NAMES})
    found = surgery.fit(again, hypermodules=4)
    assert {p.site.name for p in found.plan.placements} == {"middle.weight"}
    assert sum(each.name == "table.weight" for each in found.plan.left_alone) == len(NAMES)


def test_one_member_alone_shares_nothing():
    ids = torch.randint(400, (16, 12))
    alone = surgery.fit(surgery.join([member(readers()["one"], "one", ids)]), budget=0.2)
    assert not any(p.site.name == "table.weight" for p in alone.plan.placements)


def test_what_is_private_by_request_stays_with_its_member():
    found = surgery.fit(joined(private=["table.weight", "middle.weight"]), budget=0.1)
    assert not found.plan.placements
