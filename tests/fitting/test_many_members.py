"""Members that share nothing meet a bound each by itself, however many there are."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from artifacts import member
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery.fitting import attempts
from surgery.fitting.allocation import of_each, revalued, within_errors
from surgery.fitting.tabulated import Table


def nets(count):
    """Unrelated nets of different widths."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            f"net{n}": nn.Sequential(nn.Linear(12, 40 + 8 * n), nn.GELU(), nn.Linear(40 + 8 * n, 6)).eval()
            for n in range(count)
        }


@pytest.mark.parametrize("count", [2, 7])
def test_scattered_errors_do_not_leave_many_members_as_they_are(monkeypatch, count):
    measured = attempts.measure_errors

    def scattered(stored, trials, decodings=None):
        """Off what is predicted by up to twice, as outputs of deep nets are, the same for the same weights."""
        errors = measured(stored, trials)
        noise = [random.Random(error).uniform(-0.7, 0.7) if error else 0.0 for error in errors.tolist()]
        return errors * np.exp(noise)

    monkeypatch.setattr(attempts, "measure_errors", scattered)
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    joint = surgery.join([member(net, name, x) for name, net in nets(count).items()])
    report = surgery.fit(joint, max_error=0.05).report
    assert max(report.errors.values()) <= 0.05
    assert report.stored_bytes < 0.5 * sum(report.original_bytes.values())


def test_no_choice_is_measured_twice(monkeypatch):
    measured, seen = attempts.measure_errors, []

    def noted(stored, trials, decodings=None):
        seen.append(tuple(sorted((str(key), str(each.precision)) for key, each in stored.tensors.items())))
        return measured(stored, trials, decodings)

    monkeypatch.setattr(attempts, "measure_errors", noted)
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    joint = surgery.join([member(net, name, x) for name, net in nets(1).items()])
    assert surgery.fit(joint, max_error=0.05).report.met
    assert 1 < len(seen) == len(set(seen))


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_a_choice_of_each_member_alone_costs_each_what_its_own_did(seed, members, groups):
    rng = np.random.default_rng(seed)
    owner = rng.integers(0, members, groups)
    weight = np.eye(members)[owner] * rng.exponential(1.0, (groups, 1))
    size = np.sort(rng.integers(1, 99, (groups, 3)), axis=1)[:, ::-1].astype(float)
    error = np.sort(rng.exponential(1.0, (groups, 3)), axis=1)
    order = np.arange(groups)
    table = Table(size, error, weight, order, order, np.zeros(groups))
    choices = [within_errors(table, rng.exponential(1.0, members).tolist()) for _ in range(members)]
    found = of_each(table, choices)
    assert found is not None
    np.testing.assert_allclose(found.error, [choice.error[n] for n, choice in enumerate(choices)])
    assert found.nbytes == revalued(table, found).nbytes
    assert found.nbytes == sum(
        size[unit, choices[who].option[unit]] for unit, who in enumerate(owner.tolist())
    )


def test_members_that_draw_on_the_same_rows_are_not_taken_apart():
    one = np.ones(1)
    table = Table(
        np.array([[9.0, 1.0]]), np.array([[0.0, 1.0]]), np.ones((1, 2)), np.zeros(1, int), np.zeros(1, int), 0 * one
    )  # fmt: skip
    small, exact = within_errors(table, [2.0, 2.0]), within_errors(table, [0.0, 0.0])
    assert of_each(table, [small, exact]) is None
