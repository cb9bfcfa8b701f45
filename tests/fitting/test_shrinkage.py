"""Shrinkage: the cost of feedback under a moment that was learned elsewhere, and how much of a moment is believed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.fitting.shrinkage import DRAWN, LARGEST, SHARES, _errors, best_share, cost, looked_at, shrunk
from surgery.storage.codecs.feedback import DAMPING, damped, expected_gain

SEEDS = st.integers(0, 9999)


def inputs(count: int, n: int, seed: int, rank: int | None = None) -> torch.Tensor:
    """Points `[count, n]` near a subspace that is the same for all seeds."""
    plane = torch.randn(rank or n, n, generator=torch.Generator().manual_seed(77))
    generator = torch.Generator().manual_seed(seed)
    near = torch.randn(count, rank or n, generator=generator) @ plane / (rank or n) ** 0.5
    return (near + 0.05 * torch.randn(count, n, generator=generator)).double()


def moment(*args) -> torch.Tensor:
    x = inputs(*args)
    return x.T @ x / len(x)


@given(seed=SEEDS, n=st.integers(2, 8), share=st.sampled_from(SHARES))
@settings(max_examples=20, deadline=None)
def test_the_cost_is_that_of_entries_rounded_one_after_another(seed, n, share):
    """GPTQ written out: of each entry's rounding error of 1, later ones take back what they can."""
    learned, seen = moment(20, n, seed), moment(20, n, seed + 1)
    added = (share + DAMPING) * learned.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    upper, total = torch.linalg.cholesky(torch.linalg.inv(learned + added), upper=True), 0.0
    for own in range(n):
        wanted = torch.zeros(n, dtype=torch.float64)
        stored = torch.zeros(n, dtype=torch.float64)
        for j in range(n):
            stored[j] = wanted[j] + (j == own)
            left = (wanted[j] - stored[j]) / upper[j, j]  # GPTQ, Eq. (3)
            wanted[j + 1 :] -= left * upper[j, j + 1 :]  # GPTQ, Eq. (2)
        total += float(stored @ seen @ stored)
    assert cost(learned, seen, share, torch.eye(n).double()) == pytest.approx(total, rel=1e-6)


@given(seed=SEEDS, n=st.integers(2, 24))
@settings(max_examples=20, deadline=None)
def test_on_what_was_learned_the_cost_is_the_gain_that_is_foretold(seed, n):
    learned = moment(30, n, seed)
    found = cost(learned, damped(learned), 0.0, torch.eye(n).double()) / float(damped(learned).trace())
    assert found == pytest.approx(expected_gain(learned.float()), rel=1e-3)


@given(seed=SEEDS, n=st.integers(1, 12), share=st.sampled_from([*SHARES, None]))
@settings(max_examples=20, deadline=None)
def test_the_trace_stays_and_couplings_fall(seed, n, share):
    whole = moment(20, n, seed)
    found = shrunk(whole, share)
    assert float(found.trace()) == pytest.approx(float(whole.trace()))
    factor = 0.0 if share is None else 1 / (1 + share)
    off = ~torch.eye(n, dtype=torch.bool)
    assert torch.allclose(found[off], whole[off] * factor)


def test_many_inputs_are_believed_and_few_are_not():
    n = 32
    many = best_share(*(moment(4096, n, seed, 4) for seed in (0, 1)))
    few = best_share(*(moment(12, n, seed) for seed in (0, 1)))
    assert many == 0.0
    assert few is None or few >= 1.0


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_moments_of_nothing_and_of_no_numbers_are_not_believed(value):
    known, unknown = moment(20, 4, 0), torch.full((4, 4), value, dtype=torch.float64)
    assert best_share(known, unknown) is None and best_share(unknown, known) is None


def test_what_one_half_alone_shows_is_not_believed():
    halves = [torch.zeros(16, 16, dtype=torch.float64) for _ in range(2)]
    for half, seed in zip(halves, (0, 1), strict=True):
        only = torch.randn(16, generator=torch.Generator().manual_seed(seed)).double()
        half += torch.outer(only, only)
    share = best_share(*halves)
    assert share is None or share >= 1.0


@given(seed=SEEDS)
@settings(max_examples=5, deadline=None)
def test_random_errors_say_of_many_entries_what_each_entry_s_own_says(seed):
    n = DRAWN + 40
    learned, seen = moment(60, n, seed, 8), moment(60, n, seed + 1, 8)
    every = cost(learned, seen, 0.4, torch.eye(n).double())
    drawn = cost(learned, seen, 0.4, _errors(n).double())
    # Each of the rows drawn is the sum of all in the mean; their spread is about a tenth of that.
    assert drawn / DRAWN == pytest.approx(every, rel=0.25)


def test_of_wide_moments_some_columns_are_looked_at():
    wide = torch.arange(float((LARGEST + 8) ** 2)).view(LARGEST + 8, -1)
    found = looked_at(wide)
    assert found.shape == (LARGEST, LARGEST)
    assert found[0, 0] == wide[0, 0] and found[-1, -1] == wide[-1, -1]
    assert looked_at(wide[:4, :4]).equal(wide[:4, :4])
