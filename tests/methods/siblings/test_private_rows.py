"""Private rows: how many bits they have beside their contexts, and what rounding both costs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.fitting.metric import Metric, times
from surgery.methods.siblings import private
from surgery.methods.siblings.lowrank import factors
from surgery.storage.codecs import NATIVE, decode, encode, encode_together, grouped, rounded


def moment_of(side, seed):
    """A second moment whose directions differ by some orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(side, side, generator=generator)).Q
    moment = turn * torch.logspace(0, -3, side) @ turn.T
    return moment / moment.trace()


def found_in(o, n, seed, whole=True):
    generator = torch.Generator().manual_seed(seed)
    difference = torch.randn(o, n, generator=generator)
    out, into = moment_of(o, seed), moment_of(n, seed + 1)
    metric = Metric(out, into) if whole else Metric(out.diagonal(), into.diagonal())
    return difference, metric, factors(difference, metric.into, metric.out)


def noise_of(found, metric):
    return private.Noise.of(found, metric, private.Feedback.of(metric))


def stored(difference, metric, found, count, precision, more):
    """What a bank stores of the first directions, and what it costs beyond leaving the others out."""
    feedback = private.Feedback.of(metric)
    contexts = decode(encode(found.contexts[:, :count].T.contiguous(), precision, feedback.contexts))
    seen = times(contexts, metric.out)
    rows = torch.linalg.lstsq(seen @ contexts.T, seen @ difference).solution
    (encoded,) = encode_together([rows], [private.of_rows(precision, more)], feedback.rows)
    return metric.price(difference - contexts.T @ decode(encoded)) - metric.price(
        difference - found.product(count)
    )


@given(st.sampled_from(private.OPTIONS), st.integers(0, private.MOST_MORE))
def test_rows_have_at_least_as_many_bits_as_are_asked_for(contexts, more):
    rows = private.of_rows(contexts, more)
    if contexts == NATIVE:
        assert rows == NATIVE
    else:
        assert rows.settings.bits >= min(contexts.settings.bits + more, 12)
        assert rows.settings.group == contexts.settings.group


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 5])
@pytest.mark.parametrize(("o", "n"), [(96, 24), (48, 48), (24, 96)])
def test_what_rounding_costs_is_foretold(o, n, bits, whole):
    told, is_so = 0.0, 0.0
    for seed in range(6):
        difference, metric, found = found_in(o, n, seed, whole)
        noise, precision = noise_of(found, metric), grouped(bits, 64)
        more = private.more_bits([noise])
        told += float(noise.first(8).lost(precision, more).sum())
        is_so += stored(difference, metric, found, 8, precision, more)
    # Gains of feedback and of rows made anew are those of many directions and fine steps: within a factor of two.
    assert 0.5 < told / is_so < 2.0


@given(st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_narrow_rows_have_more_bits_than_wide_ones(seed):
    """With independent errors half the logarithm of how many contexts there are for each entry of a row, or less where
    so short a row has a scale of its own.
    """

    def more(o, n):
        difference = torch.randn(o, n, generator=torch.Generator().manual_seed(seed))
        metric = Metric.independent(1.0, o, n)
        return private.more_bits([noise_of(factors(difference, metric.into, metric.out), metric)])

    assert (more(16, 256), more(64, 64)) == (0, 0)
    assert 1 <= more(256, 16) <= 2


def test_more_bits_in_rows_take_fewer_bytes_within_one_error():
    """Of a matrix with many outputs, eight rows of 24 entries beside 8 times 192 contexts."""
    difference, metric, found = found_in(192, 24, 0)
    more = private.more_bits([noise_of(found, metric)])
    alike = stored(difference, metric, found, 8, grouped(4, 64), 0)
    assert more and stored(difference, metric, found, 8, grouped(4, 64), more) < 0.8 * alike


def test_feedback_lowers_what_rounding_costs(monkeypatch):
    difference, metric, found = found_in(96, 48, 0)
    fed = stored(difference, metric, found, 8, grouped(3, 64), 1)
    monkeypatch.setattr(private, "FED_BACK", 0)
    assert private.Feedback.of(metric) == private.Feedback()
    assert fed < 0.7 * stored(difference, metric, found, 8, grouped(3, 64), 1)


def test_nothing_is_told_of_directions_that_are_not_there():
    _, metric, found = found_in(8, 8, 0)
    none = noise_of(found.first(0), metric)
    assert private.more_bits([none]) == private.more_bits([]) == 0


@pytest.mark.parametrize("whole", [True, False])
def test_what_rounding_wide_vectors_costs_is_seen_in_some_of_their_entries(whole):
    generator = torch.Generator().manual_seed(0)
    n = 4 * private.SEEN
    vectors = torch.randn(40, n, generator=generator) * torch.linspace(1, 3, n)
    weight = torch.linspace(2, 1, n)
    side = weight.diag() + 0.01 if whole else weight
    stored = partial(rounded, precision=grouped(4, 64))
    wrong = stored(vectors) - vectors
    exact = (wrong @ side * wrong).sum(1) if whole else (wrong * weight * wrong).sum(1)
    found = private._rounding(vectors, side, stored)
    assert float(found.sum()) == pytest.approx(float(exact.sum()), rel=0.02)
    assert bool(((found / exact).log().abs() < 0.2).all())


@pytest.mark.parametrize("precision", [precision for precision, _ in private.FINER], ids=str)
def test_what_fine_rows_lose_is_foretold_from_what_8_bits_do(precision):
    vectors = torch.randn(40, 384, generator=torch.Generator().manual_seed(0))
    eight, finer = (
        float((rounded(vectors, each) - vectors).square().sum()) for each in (grouped(8, 64), precision)
    )
    assert dict(private.FINER)[precision] == pytest.approx(finer / eight, rel=0.2)
