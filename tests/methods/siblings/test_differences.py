"""Siblings as a shared matrix and private rows: the bank, and fits that choose it."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from artifacts import contents, member
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery.anatomy.plan import BankPlan
from surgery.anatomy.sites import Site
from surgery.core.registry import find_method
from surgery.geometry.views import CanonicalView
from surgery.methods.siblings import differences
from surgery.methods.siblings.bank import SiblingsBank
from surgery.methods.siblings.lowrank import Factors
from surgery.methods.siblings.private import Feedback
from surgery.settings.methods import method_names
from surgery.storage.codecs import decode, encode_native, grouped
from surgery.storage.codecs import encode as encoded
from surgery.storage.stored import store

METHOD = find_method("siblings")
NAMES = ("one", "two", "three")


def bank(sites, o, n, chunks, seed):
    generator = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(count, width, generator=generator)
        for count, width in ((o, n), (sum(chunks), n), (sum(chunks), o))
    ]
    owner = torch.randint(sites, (sum(chunks),), generator=generator)
    return SiblingsBank(sites, *made, owner, chunks), BankPlan(
        "k", (1, n), 1, "float32", sites * o, method="siblings"
    )


BANKS = given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 6),
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(0, 99),
)


@BANKS
@settings(max_examples=40, deadline=None)
def test_every_block_is_its_shared_row_and_its_private_rows(sites, o, n, chunks, seed):
    made, plan = bank(sites, o, n, chunks, seed)
    wanted = torch.zeros(sites, o, n)
    for i in range(sites):
        for p in range(o):
            wanted[i, p] = made.shared[p].detach()
            for j in range(sum(chunks)):
                if int(made.owner[j]) == i:
                    wanted[i, p] += (made.contexts[j, p] * made.rows[j]).detach()
    wanted = wanted.flatten(0, 1)
    start, stop = sorted((seed % (sites * o), (7 * seed) % (sites * o + 1)))
    torch.testing.assert_close(made.blocks().detach(), wanted)
    torch.testing.assert_close(made.blocks(start, stop).detach(), wanted[start:stop])
    with patch("surgery.methods.siblings.bank.PIECE", 1 + seed % 13):  # by a few rows, in the same order
        assert torch.equal(made.portable_blocks(start, stop), wanted[start:stop])
    again = METHOD.unpack(plan, made.pack(plan))
    assert all(torch.equal(a, b) for a, b in zip(again.state().values(), made.state().values(), strict=True))
    assert again.chunks == made.chunks


@BANKS
@settings(max_examples=20, deadline=None)
def test_some_sites_alone_are_what_they_were(sites, o, n, chunks, seed):
    from surgery.anatomy.plan import Placement
    from surgery.geometry.blocks import BlockGrid

    made, plan = bank(sites, o, n, chunks, seed)
    parts = {
        k: encoded(v, grouped(4, 64)) if v.ndim > 1 else encode_native(v) for k, v in made.pack(plan).items()
    }
    whole = METHOD.unpack(plan, {k: decode(v) for k, v in parts.items()})
    chosen = [i for i in range(sites) if (seed >> i) & 1] or [sites - 1]
    placements = [Placement(None, "k", BlockGrid(1, o, n, 1, n), i * o) for i in chosen]
    smaller, moved, kept = METHOD.restrict(plan, placements, parts)
    own = METHOD.unpack(smaller, {k: decode(v) for k, v in kept.items()})
    assert smaller.locations == own.locations == len(chosen) * o and not METHOD.wrong_parts(smaller, kept)
    for old, new in zip(placements, moved, strict=True):
        assert torch.equal(own.blocks(new.start, new.stop), whole.blocks(old.start, old.stop))
    assert float(METHOD.location_bytes(plan, parts).sum()) == pytest.approx(
        sum(p.nbytes for p in parts.values())
    )


@BANKS
@settings(max_examples=30, deadline=None)
def test_sites_that_are_added_are_taken_out_again(sites, o, n, chunks, seed):
    """`extend` and `restrict` are one another's inverse, and neither touches what belongs to others."""
    from surgery.anatomy.plan import Placement
    from surgery.geometry.blocks import BlockGrid

    made, plan = bank(sites, o, n, chunks, seed)
    added, more = bank(1 + seed % 3, o, n, [1] * (seed % 3), seed + 1)
    parts, others = (
        {k: encoded(v, grouped(4, 64)) if v.ndim > 1 else encode_native(v) for k, v in each.pack(p).items()}
        for each, p in ((made, plan), (added, more))
    )
    others["shared"] = parts["shared"]
    whole, found = METHOD.extend(plan, parts, more, others)
    assert whole.locations == plan.locations + more.locations and not METHOD.wrong_parts(whole, found)
    assert all(found[name] is each for name, each in parts.items() if name != "owner")
    live = METHOD.unpack(whole, {k: decode(v) for k, v in found.items()})
    for first, count, wanted_plan, wanted in ((0, sites, plan, parts), (sites, added.sites, more, others)):
        placements = [
            Placement(None, "k", BlockGrid(1, o, n, 1, n), i * o) for i in range(first, first + count)
        ]
        smaller, _, kept = METHOD.restrict(whole, placements, found)
        alone = METHOD.unpack(wanted_plan, {k: decode(v) for k, v in wanted.items()})
        assert smaller.locations == wanted_plan.locations
        assert torch.equal(alone.blocks(), live.blocks(first * o, (first + count) * o))
        used = {name for name, each in wanted.items() if each.shape[0] or name == "owner"}
        assert used <= kept.keys() and all(
            torch.equal(decode(kept[name]), decode(wanted[name])) for name in used
        )


def test_parts_that_do_not_fit_are_named():
    made, plan = bank(2, 3, 4, [2], 0)
    parts = {k: encode_native(v) for k, v in made.pack(plan).items()}
    assert METHOD.wrong_parts(plan, parts) == []
    for name, wrong in (
        ("owner", torch.tensor([0, 2], dtype=torch.uint8)),
        ("rows.0", torch.zeros(2, 5)),
        ("contexts.0", torch.full((2, 3), torch.nan)),
        ("shared", torch.zeros(4, 4)),
    ):
        assert METHOD.wrong_parts(plan, {**parts, name: encode_native(wrong)})


def test_no_recipe_asks_for_it():
    assert "siblings" not in method_names()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 64), nn.Linear(64, 4)
        self.middle = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for layer in self.middle:
            x = x + torch.relu(layer(x))
        return self.last(x)


def family(rank=2, size=0.1):
    """Members of one base whose differences are of low rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base, nets = Net().eval(), {}
        for name in NAMES:
            net = Net().eval()
            net.load_state_dict(base.state_dict())
            with torch.no_grad():
                for layer in net.middle:
                    layer.weight += size * torch.randn(64, rank) @ torch.randn(rank, 64) / 8
            nets[name] = net
    return nets


@pytest.fixture(scope="module")
def fitted():
    joint = surgery.join([member(net, name, torch.randn(8, 16)) for name, net in family().items()])
    return surgery.fit(joint, budget=0.12)


def test_a_family_is_a_shared_matrix_and_private_rows(fitted):
    banks = fitted.plan.banks
    assert {each.method for each in banks} == {"siblings"} and len(banks) == 3
    assert all(error < 0.1 for error in fitted.report.errors.values()), fitted.report.errors
    parts = store(fitted).tensors
    ranks = [each.shape[0] for key, each in parts.items() if ".rows." in f".{key}".replace("/", ".")]
    assert sum(ranks) >= 3 * 3 * 2  # all of the differences


def test_it_is_better_than_each_alone_in_the_same_bytes(fitted):
    nets = family()
    for name in NAMES:
        alone = surgery.fit(surgery.join([member(nets[name], name, torch.randn(8, 16))]), budget=0.12)
        assert fitted.report.errors[name] < 0.5 * alone.report.errors[name]


@pytest.mark.parametrize(("bound", "share"), [pytest.param(3e-4, 0.22, marks=pytest.mark.slow), (1e-5, 0.6)])
def test_private_rows_are_as_exact_as_what_is_shared(bound, share):
    joint = surgery.join([member(net, name, torch.randn(8, 16)) for name, net in family().items()])
    report = surgery.fit(joint, max_error=bound).report
    assert {each.method for each in joint.plan.banks} == {"siblings"}
    assert max(report.errors.values()) <= bound
    assert report.stored_bytes < share * sum(report.original_bytes.values())


def test_it_is_saved_loaded_and_exported_bit_for_bit(fitted, tmp_path):
    surgery.save(fitted, tmp_path / "joint")
    modules = {name: Net() for name in NAMES}
    again = surgery.load(tmp_path / "joint", modules=modules)
    for name in NAMES:
        one, other = fitted.collapse(name), again.collapse(name)
        assert all(torch.equal(one[key], other[key]) for key in one)
    report = surgery.verify(tmp_path / "joint", modules={name: Net() for name in NAMES})
    assert not report.files and all(check.rebuilt for check in report.members)
    surgery.save(again, tmp_path / "again")
    assert contents(Path(tmp_path / "again")) == contents(Path(tmp_path / "joint"))
    surgery.export(fitted, "two", tmp_path / "two", format="compressed")
    small = surgery.load(tmp_path / "two", modules={"two": Net()})
    assert all(torch.equal(a, small.collapse("two")[key]) for key, a in fitted.collapse("two").items())


@pytest.mark.slow
@pytest.mark.parametrize("widest", [0, 63])
def test_sides_too_wide_for_a_moment_are_fitted_by_their_diagonal(monkeypatch, widest):
    monkeypatch.setattr("surgery.fitting.metric.WIDEST", widest)
    joint = surgery.join([member(net, name, torch.randn(8, 16)) for name, net in family().items()])
    surgery.fit(joint, budget=0.12)
    assert {bank.method for bank in joint.plan.banks} == {"siblings"}
    assert all(error < 0.15 for error in joint.report.errors.values()), joint.report.errors


def test_what_a_family_has_not_in_common_is_not_left_out():
    """A budget far below what the differences take keeps those that move outputs most."""
    joint = surgery.join([member(net, name, torch.randn(8, 16)) for name, net in family(64, 0.3).items()])
    errors = surgery.fit(joint, budget=0.09).report.errors
    assert all(error < 0.75 for error in errors.values()), errors


@pytest.fixture
def loaded(fitted, tmp_path):
    surgery.save(fitted, tmp_path / "joint")
    return surgery.load(tmp_path / "joint", modules={name: Net() for name in NAMES})


def test_a_fit_of_a_fitted_family_may_choose_anything_again(loaded):
    before = loaded.report.stored_bytes
    again = surgery.fit(loaded, max_error=0.3)
    assert again.report.met and again.report.stored_bytes < before


def test_a_fitted_family_becomes_hypermodules(loaded):
    found = surgery.fit(loaded, hypermodules=20)
    assert {each.method for each in found.plan.banks} == {"hypermodules"}


def test_a_fitted_family_is_trained_in_what_it_shares(loaded):
    before = {name: loaded.collapse(name)["middle.0.weight"] for name in NAMES}
    x, y = torch.randn(8, 16), torch.randn(8, 4)
    tasks = [surgery.Task(name, name, [(x, y)], loss="mse", validation=[(x, y)]) for name in NAMES]
    surgery.train(loaded, tasks, {"generations": 1, "steps": 2})
    assert {loaded.dictionary[key].form for key in loaded.dictionary} == {"siblings"}
    moved = [loaded.collapse(name)["middle.0.weight"] - before[name] for name in NAMES]
    assert all(float(each.abs().max()) > 0 for each in moved)


@pytest.mark.parametrize("together", [1, 3, 8, 100])
def test_a_product_with_a_large_difference_is_added_up_by_pieces(together, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    original, shared = (
        torch.randn(10, 6, generator=generator).bfloat16(),
        torch.randn(10, 6, generator=generator),
    )
    seen = torch.randn(4, 10, generator=generator, dtype=torch.float64)
    view = CanonicalView.of("o i -> 1 o i", (10, 6))
    site = Site("a", "w", ("w",), "linear", (10, 6), "bfloat16", view, 0)
    found = Factors(shared[:, :0], shared[:0], shared.new_zeros(0).double())
    relative = differences.Relative(site, original, torch.ones(10), found, Feedback())
    monkeypatch.setattr(differences, "TOGETHER", together)
    product = differences._product_with_difference(seen, relative, shared)
    torch.testing.assert_close(product, seen @ (original.float() - shared).double())
