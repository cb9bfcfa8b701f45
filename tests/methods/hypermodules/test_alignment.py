"""Laws of the evolutionary alignment, against loops written from MUiR's Algorithms 1 and 2."""

from __future__ import annotations

import doctest
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery.methods.hypermodules import alignment, explanation
from surgery.methods.hypermodules.alignment import (
    decide,
    draw_by_usage,
    draw_locations,
    draw_new,
    draw_uniformly,
    mass,
    starting_weight,
    usage,
)
from surgery.methods.hypermodules.explanation import (
    draw_by_explanation,
    explained,
    explained_pairs,
    fit_contexts,
    scale_contexts,
)

SIGMAS = 5  # of a standard normal: a right sampler is refused once in 1.7 million draws of a seed


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_frequencies(found: Tensor, probability: Tensor) -> None:
    """Pearson's chi-square, which for many degrees of freedom is normal (Wilson and Hilferty)."""
    expected = probability * found.sum()
    assert not found[expected == 0].any(), "what has probability 0 was drawn"
    found, expected = found[expected > 0], expected[expected > 0]
    degrees = len(found) - 1
    chi_square = float(((found - expected) ** 2 / expected).sum())
    spread = 2 / (9 * degrees)
    score = ((chi_square / degrees) ** (1 / 3) - (1 - spread)) / spread**0.5
    assert score < SIGMAS, (found.tolist(), expected.tolist())


def mass_by_loops(candidates: Tensor, soft: Tensor) -> tuple[list[list[float]], list[int]]:
    """Each alternative's softmax mass with its duplicates', and the first of the largest, one location at a time."""
    masses, winners = [], []
    for names, weights in zip(candidates.tolist(), soft.tolist(), strict=True):
        total = sum(math.exp(w) for w in weights)
        each = [math.exp(w) / total for w in weights]
        added = [sum(p for other, p in zip(names, each, strict=True) if other == name) for name in names]
        masses.append(added)
        winners.append(max(range(len(names)), key=lambda i, added=added: (round(added[i], 12), -i)))
    return masses, winners


# -- drawing -------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.floats(0.01, 1.0), st.integers(0, 99))
@settings(deadline=None)
def test_locations_are_a_sorted_sample_of_the_wanted_size(locations: int, fraction: float, seed: int) -> None:
    chosen = draw_locations(locations, fraction, seeded(seed))
    assert len(chosen) == min(locations, max(1, round(fraction * locations)))
    assert torch.equal(chosen, torch.unique(chosen))
    assert chosen.min() >= 0 and chosen.max() < locations


def test_every_location_is_as_likely_as_any_other() -> None:
    generator = seeded(0)
    counts = sum(torch.bincount(draw_locations(20, 0.25, generator), minlength=20) for _ in range(4000))
    assert isinstance(counts, Tensor)
    assert (counts.double() - 1000).abs().max() < SIGMAS * (4000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_challengers_come_by_usage_and_sometimes_new(seed: int) -> None:
    """`P(H_k) = (1-eps) * usage_k / L + eps / #unused` for each used and each unused hypermodule."""
    psi, epsilon, unused = torch.tensor([0] * 6 + [1] * 3 + [3]), 0.2, 5
    generator = seeded(seed)
    drawn = draw_by_usage(psi, 20_000, 4, generator)
    drawn, new = draw_new(drawn, epsilon, unused, first=4, generator=generator)
    assert new == unused
    found = torch.bincount(drawn.flatten(), minlength=4 + unused)
    share = (1 - epsilon) * usage(psi, 4) / len(psi)
    assert_frequencies(found, torch.cat([share, torch.full((unused,), epsilon / unused)]))


def test_uniform_challengers_are_equally_likely() -> None:
    names = torch.tensor([2, 5, 6, 9])
    found = torch.bincount(draw_uniformly(names, 10_000, 3, seeded(0)).flatten(), minlength=10)
    assert_frequencies(found, torch.isin(torch.arange(10), names) / 4)


@given(st.integers(0, 999), st.floats(0.0, 1.0), st.integers(0, 6))
@settings(deadline=None)
def test_new_hypermodules_are_numbered_without_gaps(seed: int, epsilon: float, unused: int) -> None:
    before = torch.zeros(7, 3, dtype=torch.long)
    after, new = draw_new(before, epsilon, unused, first=10, generator=seeded(seed))
    assert new <= unused
    assert torch.unique(after[after != 0]).tolist() == list(range(10, 10 + new))
    assert not before.any()


# -- deciding ------------------------------------------------------------------------------------------------


@given(st.floats(0.01, 0.99), st.integers(1, 20))
def test_the_incumbent_starts_with_probability_one_minus_alpha(alpha: float, challengers: int) -> None:
    soft = torch.tensor([0.0] + [starting_weight(alpha, challengers)] * challengers, dtype=torch.float64)
    assert float(soft.softmax(0)[0]) == pytest.approx(1 - alpha, abs=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.5, 2.0])
def test_alpha_out_of_range_is_an_error(alpha: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        starting_weight(alpha, 2)


@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 7), st.integers(1, 5))
@settings(deadline=None)
def test_mass_and_winner_equal_the_loops(seed: int, count: int, alternatives: int, names: int) -> None:
    candidates = torch.randint(names, (count, alternatives), generator=seeded(seed))
    soft = torch.randn(count, alternatives, generator=seeded(seed + 1), dtype=torch.float64)
    masses, winners = mass_by_loops(candidates, soft)
    assert torch.allclose(mass(candidates, soft), torch.tensor(masses, dtype=torch.float64))
    # A duplicate is the same hypermodule, so the winner's name decides.
    rows = torch.arange(count)
    assert torch.equal(candidates[rows, decide(candidates, soft)], candidates[rows, torch.tensor(winners)])


def test_duplicates_win_together() -> None:
    candidates, soft = torch.tensor([[7, 3, 3], [7, 3, 4]]), torch.tensor([[0.1, 0.0, 0.0]] * 2)
    assert decide(candidates, soft).tolist() == [1, 0]


def test_of_equals_the_incumbent_stays() -> None:
    candidates = torch.tensor([[7, 3], [3, 7]])
    assert decide(candidates, torch.zeros(2, 2)).tolist() == [0, 0]


# -- what a hypermodule can do for a block -----------------------------------------------------------------


@given(st.integers(0, 999), st.integers(1, 4), st.integers(4, 9))
@settings(deadline=None, max_examples=30)
def test_fitted_contexts_are_least_squares(seed: int, context: int, width: int) -> None:
    generator = seeded(seed)
    blocks = torch.randn(5, width, generator=generator, dtype=torch.float64)
    rows = torch.randn(6, context, width, generator=generator, dtype=torch.float64)
    names = torch.randint(6, (5, 3), generator=generator)
    fitted = fit_contexts(blocks, rows, names, ridge=0.0)
    for n in range(5):
        for a in range(3):
            best = torch.linalg.lstsq(rows[names[n, a]].T, blocks[n].unsqueeze(1)).solution.squeeze(1)
            assert torch.allclose(fitted[n, a], best, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 4), st.integers(2, 12))
def test_scaled_contexts_keep_direction_and_the_block_s_length(seed: int, context: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks, rows = (
        torch.randn(5, width, generator=generator),
        torch.randn(3, context, width, generator=generator),
    )
    places = torch.randint(3, (5, 2), generator=generator)
    fitted = fit_contexts(blocks, rows, places)
    scaled = scale_contexts(fitted, blocks, rows, places)
    for n, a in itertools.product(range(5), range(2)):
        made = scaled[n, a] @ rows[places[n, a]]
        assert made.norm() == pytest.approx(float(blocks[n].norm()), rel=1e-3)
        assert torch.cosine_similarity(scaled[n, a], fitted[n, a], dim=0) == pytest.approx(1, abs=1e-4)
    assert scale_contexts(torch.zeros(5, 2, context), blocks, rows, places).abs().max() == 0


def test_fitted_contexts_of_dependent_rows_stay_finite() -> None:
    rows = torch.ones(1, 2, 4)
    fitted = fit_contexts(torch.full((1, 4), 3.0), rows, torch.zeros(1, 1, dtype=torch.long))
    assert torch.allclose(torch.einsum("nac,cd->nad", fitted, rows[0]), torch.full((1, 1, 4), 3.0), atol=1e-3)


@given(st.integers(0, 999), st.integers(1, 4), st.integers(1, 9))
@settings(deadline=None, max_examples=50)
def test_the_explained_share_is_that_of_the_best_context(seed: int, context: int, width: int) -> None:
    generator = seeded(seed)
    blocks = torch.randn(5, width, generator=generator, dtype=torch.float64)
    rows = torch.randn(3, context, width, generator=generator, dtype=torch.float64)
    share = explained(blocks, rows).double()
    assert ((share >= 0) & (share <= 1 + 1e-5)).all()
    for n in range(5):
        for k in range(3):
            fit = rows[k].T @ (torch.linalg.pinv(rows[k].T) @ blocks[n])
            left = (blocks[n] - fit).square().sum() / blocks[n].square().sum()
            assert float(share[n, k]) == pytest.approx(float(1 - left), abs=1e-4)
    pairs = explained_pairs(blocks[:3], rows)
    assert torch.allclose(pairs.double(), share[:3].diagonal(), atol=1e-5)


def test_a_block_in_the_span_is_explained_and_a_block_of_zeros_is_not() -> None:
    rows = torch.randn(2, 3, 8, generator=seeded(0))
    blocks = torch.stack([torch.tensor([0.5, -2.0, 1.0]) @ rows[1], torch.zeros(8)])
    assert explained(blocks, rows)[0, 1] == pytest.approx(1, abs=1e-5)
    assert explained(blocks, rows)[1].tolist() == [0, 0]


def test_dependent_rows_explain_no_more_than_they_span() -> None:
    row, block = torch.tensor([1.0, 0, 0, 0]), torch.tensor([[1.0, 1, 1, 1]])
    rows = torch.stack([torch.stack([row, 2 * row]), torch.zeros(2, 4)])
    assert torch.allclose(explained(block, rows), torch.tensor([[0.25, 0.0]]))
    assert torch.allclose(explained_pairs(block.expand(2, -1), rows), torch.tensor([0.25, 0.0]))


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_draws_by_explanation_go_by_usage_times_share(power: float) -> None:
    generator = seeded(0)
    rows = torch.randn(5, 2, 6, generator=generator)
    block = torch.randn(1, 6, generator=generator)
    psi = torch.tensor([0] * 5 + [1] * 3 + [2] + [4])
    drawn = draw_by_explanation(block.expand(20_000, -1), rows, psi, 4, generator, pool=len(psi), power=power)
    weight = usage(psi, 5) * explained(block, rows)[0].double() ** power
    assert_frequencies(torch.bincount(drawn.flatten(), minlength=5), weight / weight.sum())


def test_a_location_s_own_use_does_not_count() -> None:
    """Alone it meets the others alone; among many it mostly meets its own hypermodule."""
    rows = torch.eye(2).repeat(3, 1, 1)
    psi, own = torch.tensor([0, 1, 1, 1, 2]), torch.tensor([0, 2])
    drawn = draw_by_explanation(torch.ones(2, 2), rows, psi, 20_000, seeded(0), own=own)
    assert_frequencies(torch.bincount(drawn[0], minlength=3), torch.tensor([0.0, 0.75, 0.25]))
    assert_frequencies(torch.bincount(drawn[1], minlength=3), torch.tensor([0.25, 0.5, 0.25]))


def test_a_pool_of_few_locations_leaves_usage_in_the_draw() -> None:
    """Where all hypermodules are alike, what is drawn over many pools goes by usage."""
    rows = torch.eye(2).repeat(3, 1, 1)
    psi = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    generator, found = seeded(0), torch.zeros(3)
    for _ in range(1500):
        drawn = draw_by_explanation(torch.ones(1, 2), rows, psi, 1, generator, pool=8)
        found += torch.bincount(drawn.flatten(), minlength=3)
    assert_frequencies(found, usage(psi, 3) / 100)


def test_siblings_are_drawn_where_the_pool_explains_nothing() -> None:
    rows = torch.eye(4).unsqueeze(1)  # hypermodule k explains input k alone
    blocks = torch.eye(4)[[3, 3]]
    psi, first = torch.tensor([0, 1, 2]), torch.tensor([[3, 0], [-1, 0]])
    drawn = draw_by_explanation(blocks, rows, psi, 50, seeded(0), first, pool=3)
    assert (drawn[0] == 3).all()
    assert (drawn[1] != 3).all()


def test_what_explains_too_little_is_drawn_only_where_nothing_explains_enough() -> None:
    rows = torch.eye(3).unsqueeze(1)
    blocks = torch.tensor([[3.0, 2.0, 0.0], [1.0, 1.0, 1.0]])  # shares 9/13, 4/13, 0; and a third each
    psi, generator = torch.tensor([0, 1, 1, 1, 2]), seeded(0)
    drawn = draw_by_explanation(blocks, rows, psi, 3000, generator, least=0.5)
    assert (drawn[0] == 0).all()
    assert_frequencies(torch.bincount(drawn[1], minlength=3), torch.tensor([0.2, 0.6, 0.2]))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(4, 40), st.integers(0, 999))
def test_both_orthonormal_bases_span_the_same(c: int, d: int, seed: int) -> None:
    rows = torch.randn(6, c, d, generator=seeded(seed))
    rows[0] = 0
    rows[1, -1] = rows[1, 0] * 3  # adds nothing where c > 1
    rows[2] *= 1e-6
    rows[3] *= 1e6
    one, other = (f(rows) for f in (explanation._orthonormal, explanation._gram_schmidt))
    for basis in (one, other):
        size = basis.square().sum(1)
        assert ((size - 1).abs() < 1e-5).logical_or(size == 0).all()
    assert torch.allclose(one @ one.mT, other @ other.mT, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_changes_no_draw() -> None:
    psi = torch.randint(50, (300,), generator=seeded(0))
    rows, blocks = torch.randn(50, 2, 8, generator=seeded(1)), torch.randn(30, 8, generator=seeded(2))
    here = draw_by_usage(psi, 30, 4, seeded(3)), draw_by_explanation(blocks, rows, psi, 4, seeded(4))
    there = (
        draw_by_usage(psi.cuda(), 30, 4, seeded(3)),
        draw_by_explanation(blocks.cuda(), rows.cuda(), psi.cuda(), 4, seeded(4)),
    )
    assert torch.equal(here[0], there[0].cpu())
    assert (here[1] != there[1].cpu()).float().mean() < 0.05  # shares are rounded otherwise


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(alignment).failed == 0 == doctest.testmod(explanation).failed
