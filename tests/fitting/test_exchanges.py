"""Exchanges of options, whose gains are kept from one to the next, against all gains computed anew each time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.fitting import exchanges
from surgery.fitting.allocation import revalued
from surgery.fitting.exchanges import mend_bytes, mend_error, use_up_bytes, use_up_error
from surgery.fitting.tabulated import Choice, Table


def random_table(seed):
    """Units whose options are of any size and error, some of them smaller and more exact than others."""
    rng = np.random.default_rng(seed)
    units, options, members = rng.integers(1, 8), rng.integers(1, 6), rng.integers(1, 5)
    size = rng.integers(1, 50, (units, options)).astype(float)
    size[:, 1:][rng.random((units, options - 1)) < 0.2] = np.inf
    arrangement = np.sort(rng.integers(0, units, units))
    arrangement = np.unique(arrangement, return_inverse=True)[1]
    count = int(arrangement.max()) + 1
    group = np.unique(np.sort(rng.integers(0, count, count)), return_inverse=True)[1]
    weight = rng.exponential(1.0, (units, members)) * (rng.random((units, members)) < 0.6)
    error = rng.exponential(1.0, (units, options)) * (rng.random((units, options)) < 0.9)
    table = Table(size, error, weight, arrangement, group, np.zeros(count))
    taken = np.zeros(count, bool)
    taken[[rng.choice(np.nonzero(group == g)[0]) for g in range(group.max() + 1)]] = True
    return rng, table, revalued(table, Choice(np.zeros(units, int), taken, 0.0, np.zeros(0)))


def greedy(table, choice, gain_of, done):
    """The exchange of greatest gain, again and again; None where it ends before it is done."""
    while not done(choice):
        best, found = 0.0, None
        for unit in np.nonzero(choice.taken[table.arrangement])[0]:
            for option in np.nonzero(np.isfinite(table.size[unit]))[0]:
                now = choice.option[unit]
                more = table.size[unit, option] - table.size[unit, now]
                worse = table.error[unit, option] - table.error[unit, now]
                gain = gain_of(choice, table.weight[unit], more, worse)
                if gain > best:
                    best, found = gain, (unit, option)
        if found is None:
            return choice, False
        option = choice.option.copy()
        option[found[0]] = found[1]
        choice = revalued(table, Choice(option, choice.taken, 0.0, np.zeros(0)))
    return choice, True


def same(found, wanted):
    assert np.array_equal(found.option, wanted.option)
    np.testing.assert_allclose(found.nbytes, wanted.nbytes, rtol=1e-12)
    np.testing.assert_allclose(found.error, wanted.error, rtol=1e-9, atol=1e-12)


CASES = given(st.integers(0, 10**6), st.floats(0.0, 1.5))


@pytest.mark.parametrize("failed", [1, 64])
@CASES
@settings(max_examples=60, deadline=None)
def test_what_is_left_of_an_error_saves_bytes(failed, seed, part):
    _, table, choice = random_table(seed)
    bound = choice.error * (1 + part)

    def gain(now, weight, more, worse):
        fits = (weight * worse <= np.maximum(bound - now.error, 0.0)).all()
        return -more if fits else 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchanges, "FAILED", failed)
        same(use_up_error(table, choice, bound), greedy(table, choice, gain, lambda _: False)[0])


@CASES
@settings(max_examples=60, deadline=None)
def test_what_is_left_of_a_budget_lowers_the_error(seed, part):
    _, table, choice = random_table(seed)
    budget = choice.nbytes * (1 + part)

    def gain(now, weight, more, worse):
        return -worse * weight.sum() if more <= budget - now.nbytes else 0.0

    same(use_up_bytes(table, choice, budget), greedy(table, choice, gain, lambda _: False)[0])


@pytest.mark.parametrize("piece", [1, 1 << 22])
@CASES
@settings(max_examples=60, deadline=None)
def test_an_error_beyond_its_bound_is_mended(piece, seed, part):
    rng, table, choice = random_table(seed)
    # Sums of what is exchanged are rounded, so none ends at exactly 0.
    bound = choice.error * part * rng.random(len(choice.error)) + 1e-9

    def gain(now, weight, more, worse):
        over = np.maximum(now.error - bound, 0.0)
        return np.minimum(weight * -worse, over)[over > 0].sum() / max(more, 1e-9) if worse < 0 else 0.0

    wanted, met = greedy(table, choice, gain, lambda now: (now.error <= bound).all())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchanges, "PIECE", piece)
        found = mend_error(table, choice, bound)
    assert (found is not None) == met
    if found is not None:
        same(found, wanted)


@CASES
@settings(max_examples=60, deadline=None)
def test_bytes_beyond_a_budget_are_mended(seed, part):
    _, table, choice = random_table(seed)
    budget = choice.nbytes * part

    def gain(now, weight, more, worse):
        saving = min(-more, now.nbytes - budget)
        return saving / max(weight.sum() * worse, 1e-30) if saving > 0 else 0.0

    wanted, met = greedy(table, choice, gain, lambda now: now.nbytes <= budget)
    found = mend_bytes(table, choice, budget)
    assert (found is not None) == met
    if found is not None:
        same(found, wanted)
