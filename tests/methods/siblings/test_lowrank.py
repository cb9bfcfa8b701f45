"""Products of low rank in a metric: exact where they are whole, best and priced exactly where they are truncated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.fitting.metric import Draws, Metric, mean_square, mean_statistics, metric_of, together
from surgery.methods.siblings import lowrank
from surgery.methods.siblings.lowrank import factors


def made(out, n, seed, samples):
    """A difference, and moments of inputs and outputs."""
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(out, n, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, n, generator=generator, dtype=torch.float64)
    g = torch.randn(2 * out, out, generator=generator, dtype=torch.float64)
    return d, x.T @ x, g.T @ g + 1e-3 * torch.eye(out)


def price(error, into, out):
    return float(((out @ error @ into) * error).sum())


CASES = given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99), st.integers(1, 12), st.booleans())


@CASES
@settings(max_examples=60, deadline=None)
def test_full_rank_is_exact_and_every_tail_is_what_the_truncation_costs(out, n, seed, samples, both):
    d, into, metric = made(out, n, seed, samples)
    found = factors(d, into, metric if both else None)
    g = metric if both else torch.eye(out, dtype=torch.float64)
    torch.testing.assert_close(found.product(), d)
    whole = price(d, into, g)
    for rank, tail in enumerate(found.tails.tolist()):
        assert price(d - found.product(rank), into, g) == pytest.approx(tail, rel=1e-6, abs=1e-9 * whole)


@CASES
@settings(max_examples=30, deadline=None)
def test_no_product_of_the_rank_costs_less(out, n, seed, samples, both):
    d, into, metric = made(out, n, seed, samples)
    g = metric if both else torch.eye(out, dtype=torch.float64)
    found = factors(d, into, metric if both else None)
    generator = torch.Generator().manual_seed(seed + 1)
    for rank in range(min(out, n)):
        u = torch.randn(out, rank, generator=generator, dtype=torch.float64) + found.contexts[:, :rank]
        # The best rows for these contexts: weighted least squares.
        rows = torch.linalg.lstsq(u.T @ g @ u, u.T @ g @ d).solution if rank else d[:0]
        assert price(d - u @ rows, into, g) >= float(found.tails[rank]) * (1 - 1e-6) - 1e-9


def test_with_identities_it_is_the_plain_svd():
    d, _, _ = made(7, 5, 0, 1)
    found, (u, s, v) = factors(d, torch.eye(5), torch.eye(7)), torch.linalg.svd(d, full_matrices=False)
    torch.testing.assert_close(found.energy, s.square())
    torch.testing.assert_close(found.product(2), u[:, :2] * s[:2] @ v[:2])


@pytest.mark.parametrize(("out", "n", "diagonal"), [(60, 90, False), (90, 60, True)])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_few_directions_of_a_large_difference_are_about_the_best_ones(out, n, diagonal, power, monkeypatch):
    _, into, metric = made(out, n, 3, 2 * n)
    generator = torch.Generator().manual_seed(4)
    d = torch.randn(out, 60, generator=generator, dtype=torch.float64) * torch.arange(1, 61) ** -power
    d = d @ torch.randn(60, n, generator=generator, dtype=torch.float64)
    side = metric.diagonal() if diagonal else metric
    best = factors(d, into, side, most=16)
    monkeypatch.setattr(lowrank, "WIDE", 50)
    monkeypatch.setattr(lowrank, "SPARE", 8)
    found = factors(d, into, side, most=16)
    g = side.diag() if diagonal else side
    least, left = (price(d - each.product(), into, g) for each in (best, found))
    assert not torch.equal(found.rows, best.rows)
    assert least <= left * (1 + 1e-9) and left < 1.02 * least
    # What is said of each direction is what leaving it out costs.
    for rank in (0, 5, 12):
        more = price(d - found.product(rank), into, g) - left
        assert more == pytest.approx(float(found.tails[rank]), rel=1e-6)


def test_both_factors_of_a_direction_are_of_one_size():
    d, into, out = made(6, 8, 1, 20)
    found = factors(d, into, out)
    torch.testing.assert_close(found.rows.square().mean(1), found.contexts.square().mean(0))


def test_a_metric_of_draws_prices_independent_errors_as_sensitivities_do():
    generator = torch.Generator().manual_seed(0)
    draws, power = Draws(), 0.0
    for _ in range(200):
        g = torch.randn(6, 1, generator=generator) @ torch.randn(1, 9, generator=generator)
        draws.add(g)
        power += float(g.square().mean()) / 200
    metric = metric_of([draws], 200)
    errors = [torch.randn(6, 9, generator=generator) for _ in range(200)]
    mean = sum(metric.price(e) / float(e.square().sum()) for e in errors) / 200
    assert mean == pytest.approx(power, rel=0.05)
    assert Metric.independent(power, 6, 9).price(errors[0]) == pytest.approx(
        power * float(errors[0].square().sum())
    )


def test_a_metric_of_draws_prices_any_error_where_gradients_are_products():
    """Gradients `a b^T` with independent a and b are exactly what the Kronecker product assumes."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(6, 6, generator=generator), torch.randn(9, 9, generator=generator)
    error = torch.randn(6, 1, generator=generator) @ torch.randn(1, 9, generator=generator)
    draws, moved, n = Draws(), 0.0, 4000
    for _ in range(n):
        g = (left @ torch.randn(6, 1, generator=generator)) @ (torch.randn(1, 9, generator=generator) @ right)
        draws.add(g)
        moved += float((g * error).sum() ** 2) / n
    assert metric_of([draws], n).price(error) == pytest.approx(moved, rel=0.25)


@pytest.mark.parametrize("wide", ["rows", "columns"])
def test_a_price_of_many_rows_is_estimated_from_some(wide, monkeypatch):
    """Rows of very different size, with what they have in common along the strongest direction of H."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(900, 40, generator=generator) * torch.rand(900, 1, generator=generator) ** 4
    rows += torch.randn(900, 1, generator=generator) * torch.ones(40) / 9
    inputs = torch.randn(200, 40, generator=generator) + torch.randn(200, 1, generator=generator)
    weights, moment = torch.rand(900, generator=generator) ** 2, inputs.T @ inputs / 200
    sides, error = ((weights, moment), rows) if wide == "rows" else ((moment, weights), rows.T)
    exact = float(torch.einsum("kn,nm,km,k->", rows, moment, rows, weights))
    assert Metric(*sides).price(error) == pytest.approx(exact, rel=1e-5)
    monkeypatch.setattr("surgery.fitting.metric.MOST_OF_PRICE", 0)
    monkeypatch.setattr("surgery.fitting.metric.SOME", 300)
    estimate = Metric(*sides).price(error)
    assert estimate != pytest.approx(exact, rel=1e-6)
    assert estimate == pytest.approx(
        exact, rel=0.1
    )  # about 1 / sqrt(300) of how prices scatter about their shares


def test_draws_that_are_added_up_first_give_the_same_moments_in_the_mean(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(4000, 4, 4, generator=generator) @ torch.randn(4, 12, generator=generator)
    one_by_one, added = Draws(), Draws(len(gradients))
    monkeypatch.setattr("surgery.fitting.metric.MOST_WORK", 4**2 * 12 * 1000)
    assert together(4, 12, len(gradients)) == 4
    for g in gradients:
        one_by_one.add(g)
        added.add(g)
    first, second = metric_of([one_by_one], 1), metric_of([added], 1)
    for one, other in ((first.into, second.into), (first.out, second.out)):
        assert float((one - other).norm() / one.norm()) < 0.1  # of 1,000 sums of four draws each


def test_draws_without_a_usable_gradient_have_no_metric():
    draws = Draws()
    assert metric_of([draws], 1) is None
    draws.add(torch.zeros(2, 3))
    assert metric_of([draws], 1) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (7,), (300, 700), (3, 70_000), (700, 300)])
def test_a_gradient_is_measured_and_added_in_one_reading(shape, dtype):
    """By pieces of rows, so that no element is missed and none is counted twice, turned ones included."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    turned = gradient.T if gradient.ndim == 2 and len(gradient) == 700 else gradient
    total = torch.ones(turned.shape)
    power = mean_square(turned, total)
    assert power.dtype == torch.float64
    assert float(power) == pytest.approx(float(gradient.double().square().mean()), rel=1e-5)
    assert torch.equal(total, 1 + turned.float())
    assert torch.equal(mean_square(turned), power)


def test_draws_leave_gradients_as_they_are():
    gradients = [torch.full((4, 4), float(i)) for i in range(1, 4)]
    draws = Draws(1 << 20)
    for g in gradients:
        draws.add(g)
    assert [float(g[0, 0]) for g in gradients] == [1.0, 2.0, 3.0]


def test_draws_without_inputs_have_the_same_outputs_and_a_diagonal():
    generator = torch.Generator().manual_seed(0)
    whole, outputs = Draws(2), Draws(2, inputs=False)
    for _ in range(2):
        gradient = torch.randn(6, 9, generator=generator)
        whole.add(gradient)
        outputs.add(gradient)
    found, alone = metric_of([whole], 2), metric_of([outputs], 2)
    assert found is not None and alone is not None
    assert torch.equal(alone.out, found.out)
    torch.testing.assert_close(alone.into, found.into.diagonal())


def test_a_shared_matrix_is_rounded_by_the_means_of_both_sides():
    generator = torch.Generator().manual_seed(0)
    sides = [(torch.rand(4, 4, generator=generator), torch.rand(5, 5, generator=generator)) for _ in range(3)]
    known = mean_statistics([Metric(out, into) for out, into in sides])
    assert known is not None and known.second_moment is not None and known.outputs is not None
    torch.testing.assert_close(known.outputs, sum(out for out, _ in sides) / 3)
    torch.testing.assert_close(known.second_moment, sum(into for _, into in sides) / 3)
    diagonal = mean_statistics([Metric(torch.ones(4), into) for _, into in sides])
    assert diagonal is not None and diagonal.outputs is None
    assert mean_statistics([Metric(out, torch.ones(5)) for out, _ in sides]) is None
