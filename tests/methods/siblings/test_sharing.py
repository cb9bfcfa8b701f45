"""Sharing: principal rows of siblings, subspaces of blocks, and banks of a fixed number of hypermodules."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import assert_same_bits, dictionary_gradients, loss_of, member, plain_copy, run, sibling
from torch import nn

import surgery
from surgery.anatomy.plan import BankPlan
from surgery.core.joining import join
from surgery.errors import PlanError
from surgery.fitting import related
from surgery.fitting.fit import fit
from surgery.fitting.related import resembling
from surgery.methods.hypermodules.exactly import _divide
from surgery.methods.hypermodules.subspaces import fit_subspaces
from surgery.methods.siblings import related as ways
from surgery.methods.siblings.principal import principal_rows
from surgery.storage.stored import store


@given(
    st.integers(0, 999), st.integers(2, 5), st.integers(1, 6), st.integers(1, 40), st.floats(0, 2),
    st.sampled_from([1e-12, 1.0, 1e9]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_principal_rows_give_every_block_back(seed, n, locations, width, noise, scale):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(locations, width, generator=g)
    blocks = base + noise * torch.randn(n, locations, width, generator=g)
    sensitivity = scale * 10 ** (2 * torch.rand(n, generator=g))
    rows, contexts, share = principal_rows(blocks, sensitivity)
    again = torch.einsum("ilj,jld->ild", contexts, rows)
    # n products of fp32 rounding, of numbers as large as the largest block scaled by the root of 100
    # sensitivities.
    assert float((again - blocks).abs().max()) <= 1e-5 * float(blocks.abs().max())
    energy = rows.square().sum((1, 2))
    assert bool((energy[1:] <= energy[:-1] * (1 + 1e-5) + 1e-8 * energy[0]).all())
    torch.testing.assert_close(share.sum(0), torch.ones_like(share.sum(0)))


def test_errors_of_principal_rows_weigh_what_monte_carlo_says():
    """Noise in row j moves sibling i's output by `power * share[i, l, j]` per squared error."""
    g = torch.Generator().manual_seed(0)
    n, locations, width = 3, 4, 5
    blocks = torch.randn(locations, width, generator=g) + 0.5 * torch.randn(n, locations, width, generator=g)
    sensitivity = torch.tensor([1.0, 30.0, 4.0])
    _, contexts, share = principal_rows(blocks, sensitivity)
    power = sensitivity.sqrt().mean().square()
    for j in range(n):
        noise = torch.randn(20_000, locations, width, generator=g)
        moved = torch.einsum("il,sld->isld", contexts[:, :, j], noise).square().sum(3).mean(1)
        found = sensitivity[:, None] * moved
        # 20,000 draws of 5 numbers: a standard deviation of sqrt(2 / 100,000), 0.5%.
        torch.testing.assert_close(found / width, power * share[:, :, j], rtol=0.03, atol=1e-6)


def test_the_first_row_explains_as_much_as_the_best_direction():
    g = torch.Generator().manual_seed(0)
    blocks = torch.randn(4, 3, 50, generator=g) + 2 * torch.randn(3, 50, generator=g)
    rows, _, _ = principal_rows(blocks, torch.ones(4))
    for location in range(3):
        values = torch.linalg.svdvals(blocks[:, location])
        torch.testing.assert_close(rows[:, location].norm(dim=1), values)


@given(st.integers(0, 999), st.lists(st.integers(0, 3), min_size=2, max_size=8))
@settings(max_examples=60, deadline=None)
def test_siblings_are_found_whatever_their_order_sign_and_size(seed, families):
    g = torch.Generator().manual_seed(seed)
    bases = torch.randn(4, 40, 60, generator=g)
    factors = [1.0, -2.0, 0.01]
    tensors = [
        factors[i % 3] * (bases[f] + 0.3 * torch.randn(40, 60, generator=g)) for i, f in enumerate(families)
    ]
    expected = [[i for i, f in enumerate(families) if f == family] for family in set(families)]
    found = resembling(tensors, seed)
    assert sorted(found) == sorted(group for group in expected if len(group) > 1)


def test_small_tensors_are_no_siblings_by_chance():
    g = torch.Generator().manual_seed(0)
    assert resembling([torch.randn(4, 4, generator=g) for _ in range(50)], 0) == []
    assert resembling([torch.zeros(9, 9), torch.zeros(9, 9)], 0) == []


def in_subspaces(seed, k, c, width, each):
    """Blocks that lie exactly in k subspaces of c directions, with the number of their subspace."""
    g = torch.Generator().manual_seed(seed)
    bases = torch.randn(k, c, width, generator=g)
    number = torch.arange(k).repeat_interleave(each)
    return torch.einsum("lc,lcd->ld", torch.randn(k * each, c, generator=g), bases[number]), number


def explained(blocks, rows, psi, contexts):
    c = contexts.shape[1]
    made = torch.einsum("lc,lcd->ld", contexts, rows.view(-1, c, rows.shape[1])[psi])
    return 1 - float((blocks - made).square().sum() / blocks.square().sum())


@pytest.mark.parametrize(("k", "c", "width"), [(3, 2, 32), (5, 1, 16), (4, 3, 64)])
def test_subspaces_that_blocks_lie_in_are_recovered(k, c, width):
    blocks, number = in_subspaces(0, k, c, width, 40)
    # Alternation finds local optima; some start among a few finds the true one.
    best = max(
        (fit_subspaces(blocks, k, c, seed, 60) for seed in range(12)), key=lambda f: explained(blocks, *f)
    )
    assert explained(blocks, *best) > 1 - 1e-5
    pairs = set(zip(number.tolist(), best[1].tolist(), strict=True))
    assert len(pairs) == k


@given(st.integers(0, 999), st.integers(1, 8), st.integers(1, 3), st.integers(3, 20), st.integers(8, 60))
@settings(max_examples=40, deadline=None)
def test_subspaces_against_a_slow_reference(seed, k, c, width, count):
    g = torch.Generator().manual_seed(seed)
    blocks = torch.randn(count, width, generator=g)
    rows, psi, contexts = fit_subspaces(blocks, k, c, seed, 5)
    bases = rows.view(k, c, width)
    torch.testing.assert_close(bases @ bases.mT, torch.eye(c).expand(k, c, c), atol=1e-5, rtol=0)
    for block, chosen, z in zip(blocks, psi.tolist(), contexts, strict=True):
        energies = [float((basis @ block).square().sum()) for basis in bases]
        assert energies[chosen] >= max(energies) * (1 - 1e-5)
        torch.testing.assert_close(z, bases[chosen] @ block, atol=1e-5, rtol=1e-5)


@given(st.integers(0, 999), st.integers(2, 8), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_more_rounds_never_explain_less(seed, k, c):
    blocks, _ = in_subspaces(seed, 4, 2, 20, 30)
    blocks = blocks + 0.1 * torch.randn(blocks.shape, generator=torch.Generator().manual_seed(seed))
    found = [explained(blocks, *fit_subspaces(blocks, k, c, seed, rounds)) for rounds in range(1, 9)]
    # One step of subspace iteration raises the energy of its blocks, as assignment does; a trace of noise
    # keeps the rank, and a restart of an unused subspace takes nothing from those in use.
    assert all(after >= before - 1e-5 for before, after in itertools.pairwise(found))


@pytest.mark.parametrize("same", [True, False])
def test_a_bank_of_every_block_is_nearly_exact_and_of_few_is_small(same):
    members = [member("mlp", "a"), member("mlp", "b", seed=0 if same else 1)]
    whole = sum(p.nbytes for m in members for p in m.module.parameters())
    joint = fit(join(members, block=(8, 8)), hypermodules=8, block=(8, 8), context=2)
    assert joint.report.target == "8 hypermodules"
    assert joint.report.stored_bytes == store(joint).nbytes < 0.6 * whole
    assert joint.report.saved == {"sharing": whole - joint.report.stored_bytes, "precision": 0}
    (key,) = joint.dictionary.banks
    assert joint.dictionary[key].hypermodules <= 8
    a, b = joint.collapse("a"), joint.collapse("b")
    if same:
        assert_same_bits(a, b)
    with joint.step():
        loss_of(run(joint["a"], members[0])).backward()
    assert float(dictionary_gradients(joint)[0][key].norm()) > 0


def test_blocks_that_share_subspaces_are_fitted_exactly_in_a_joint_model():
    base = member("mlp")
    with torch.no_grad():
        for layer in (2, 4, 6):
            tiles = in_subspaces(layer, 1, 2, 64, 16)[0].view(4, 4, 8, 8)
            base.module[layer].weight.copy_(tiles.permute(0, 2, 1, 3).reshape(32, 32) * 0.1)
    plain = plain_copy(base)
    found = []
    for seed in range(8):
        one = plain_copy(plain)
        joint = fit(join([one], block=(8, 8)), hypermodules=3, block=(8, 8), context=2, seed=seed)
        found.append(joint.report.errors["mlp"])
    assert min(found) < 1e-3


def test_a_bank_larger_than_its_sites_is_refused():
    with pytest.raises(
        PlanError, match=r"must take at most the sites' .* bytes, but takes .*lower `hypermodules`"
    ):
        fit(join([member("mlp")], block=(8, 8)), hypermodules=48, block=(8, 8), context=8)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_hypermodules_are_divided_in_proportion(locations, part):
    banks = tuple(BankPlan(str(i), (2, 2), 1, "float32", count) for i, count in enumerate(locations))
    total = round(len(banks) + part * (sum(locations) - len(banks)))
    shares = _divide(total, banks)
    assert sum(shares) == total
    assert all(1 <= share <= count for share, count in zip(shares, locations, strict=True))
    ideal = [total * count / sum(locations) for count in locations]
    # Rounding moves a share by one; the least of one each may take up to one from the others for each bank.
    assert all(abs(share - want) <= len(banks) for share, want in zip(shares, ideal, strict=True))


def test_partly_related_members_share_what_is_related():
    base = member("mlp")
    other = sibling(base, "s", 0.02, 1)
    torch.nn.init.normal_(other.module[4].weight, std=0.2, generator=torch.Generator().manual_seed(9))
    joint = fit(join([base, other]), max_error=0.01)
    shared = {row.name for row in joint.report.detail if row.how == "shared rows"}
    assert "4.weight" not in shared
    assert shared >= {"2.weight", "6.weight"}


def test_a_way_of_storing_related_sites_is_one_function(monkeypatch):
    """Beside those of this package: it is asked for every group of related sites, and taken where it costs least."""
    monkeypatch.setattr(related, "_WAYS", dict(related._WAYS))
    asked = []

    @related.register_way("free")
    def free(scene, sites):
        asked.append([site.name for site in sites])
        shared = related.ways()[0](scene, sites)
        return replace(shared, fixed=-1e6)

    base = member("mlp")
    joint = fit(join([base, sibling(base, "other", 0.01, 1)]), max_error=0.05)
    generated = sorted({p.site.name for p in joint.plan.placements})
    assert generated and sorted({name for names in asked for name in names}) == generated
    with pytest.raises(ValueError, match="'free' is registered already"):
        related.register_way("free")(lambda scene, sites: None)


def test_rows_of_relatives_are_made_once_for_all_of_them(monkeypatch):
    """Each is a part of what is made of all relatives together."""
    made, real = [], ways.principal_rows
    monkeypatch.setattr(ways, "principal_rows", lambda *given: made.append(1) or real(*given))
    torch.manual_seed(0)
    base = nn.Linear(96, 96)
    nets = [copy.deepcopy(base) for _ in range(3)]
    with torch.no_grad():
        for net in nets:
            net.weight += 0.01 * torch.randn(96, 96)
    x = torch.randn(8, 96)
    members = [surgery.load_member(net, name=f"m{i}", inputs=x) for i, net in enumerate(nets)]
    surgery.fit(surgery.join(members), max_error=0.02, device="cpu")
    assert len(made) == 1
