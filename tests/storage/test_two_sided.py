"""Error feedback on both sides: it is the formula's, tr(G E H E^T) never rises above plain rounding's, and what knows
nothing of rows is what it was.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moments import GROUPS, SEEDS, WIDTHS, moment

from surgery.storage.codecs import Statistics, decode, encode, feedback, grouped, integers, two_sided
from surgery.storage.codecs.two_sided import Outputs, expected_gain, feed_back_both, price

SIZES = st.tuples(st.integers(2, 40), st.integers(2, 40))


def rounded(weight, precision, into, out=None):
    return encode(weight, precision, Statistics(into, 1, outputs=out))


def cost(error, into, out):
    return float(price(error, Outputs.of(out), feedback.Inputs.of(into)))


class Whole:
    """Whole numbers."""

    def codes(self, column):
        return column.round()

    def values(self, codes):
        return codes


def by_the_formula(weight, into, out, block):
    """Entry by entry: with M and N the unit upper triangular factors of G, by blocks, and H, every entry takes on what
    errors before it leave, W + M^T E N - E (2505.22988, section 3)."""

    def factor(x, block):
        """M, of which blocks on the diagonal are identities: x = M D M^T, D of blocks."""
        found = torch.eye(len(x), dtype=x.dtype)
        for start in reversed(range(0, len(x), block)):
            own, before = slice(start, start + block), slice(0, start)
            found[before, own] = x[before, own] @ torch.linalg.inv(x[own, own])
            x = x.clone()
            x[before, before] -= found[before, own] @ x[own, before]
        return found

    m, n, error, found = factor(out, block), factor(into, 1), torch.zeros_like(weight), weight.clone()
    for i in range(len(weight)):
        for j in range(weight.shape[1]):
            before = m.T @ error @ n  # entries that are not yet rounded have no error
            found[i, j] = (weight + before)[i, j].round()
            error[i, j] = (weight - found)[i, j]
    return found


@pytest.mark.parametrize(("count", "blocks"), [(9, 16), (12, 4), (13, 4), (10, 1)])
def test_codes_are_those_of_the_formula_entry_by_entry(count, blocks, monkeypatch):
    monkeypatch.setattr(two_sided, "BLOCKS", blocks)
    rows = 3 * torch.randn(count, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = feedback.Inputs.of(moment(12, 3, 60).double() / 12 + 0.5 * torch.eye(12, dtype=torch.float64))
    outputs = Outputs.of(moment(count, 4, 60).double() / count)
    codes, scales = feed_back_both(rows, inputs, outputs, 4, lambda columns: Whole())
    order = outputs.order
    expected = torch.empty_like(rows)
    expected[order] = by_the_formula(rows[order], inputs.moment, outputs.moment, outputs.block)
    assert torch.equal(codes, expected)
    assert torch.equal(scales, torch.ones(count, 3, dtype=torch.float64))


@given(SIZES, st.sampled_from([2, 4, 8, 12]), st.sampled_from([8, 64]), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_where_rows_are_not_coupled_it_is_the_feedback_of_columns_bit_for_bit(size, bits, group, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, into = torch.randn(size, generator=generator), moment(size[1], seed, 50)
    before = rounded(weight, grouped(bits, group), into)
    for out in (torch.eye(size[0]), torch.rand(size[0], generator=generator).diag()):
        after = rounded(weight, grouped(bits, group), into, out)
        assert all(torch.equal(part, after.parts[name]) for name, part in before.parts.items())


@given(SIZES, WIDTHS, GROUPS, SEEDS, st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_no_matrix_costs_more_than_plainly_rounded(size, bits, group, seed, samples):
    weight = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    into, out = moment(size[1], seed, samples), moment(size[0], seed + 1, samples)
    plain = decode(encode(weight, grouped(bits, group)))
    fed = decode(rounded(weight, grouped(bits, group), into, out))
    before, after = (cost(each - weight, into, out) for each in (plain, fed))
    assert after <= before * (1 + 1e-4)


@pytest.mark.parametrize("into", [moment(128, 1, 500), torch.eye(128)], ids=["both", "rows alone"])
@pytest.mark.parametrize("bits", [3, 5])
def test_its_gain_is_foretold_from_the_moments_alone(bits, into):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    out = moment(64, 2, 500)
    before = decode(rounded(weight, grouped(bits, 64), into)) - weight
    plain = decode(encode(weight, grouped(bits, 64))) - weight
    after = decode(rounded(weight, grouped(bits, 64), into, out)) - weight
    gain, foretold = cost(after, into, out) / cost(plain, into, out), expected_gain(out)
    assert 0.8 < gain / (foretold * feedback.expected_gain(into)) < 1.1
    assert foretold < 0.7 and cost(after, into, out) < 0.8 * cost(before, into, out)


def test_more_rows_than_are_worked_on_at_once_do_not_know_of_one_another(monkeypatch):
    weight, into, out = torch.randn(8, 16), moment(16, 1, 50), moment(8, 2, 50)
    columns = rounded(weight, grouped(4, 8), into)
    monkeypatch.setattr(integers, "BOTH_SIDES", 100)
    assert torch.equal(decode(rounded(weight, grouped(4, 8), into, out)), decode(columns))


@pytest.mark.parametrize("shape", [(8, 16), (1, 16), (16, 8), (8,)])
def test_outputs_of_other_rows_are_not_used(shape):
    weight, into = torch.randn(shape, generator=torch.Generator().manual_seed(0)), moment(16, 1, 50)
    one, both = (decode(rounded(weight, grouped(4, 8), into, out)) for out in (None, moment(9, 2, 50)))
    assert torch.equal(one, both)


def test_outputs_that_were_never_moved_do_no_harm():
    weight, into = torch.randn(6, 16, generator=torch.Generator().manual_seed(0)), moment(16, 1, 50)
    out = torch.zeros(6, 6)
    out[:3, :3] = moment(3, 2, 1)
    fed = decode(rounded(weight, grouped(4, 8), into, out))
    assert bool(fed.isfinite().all()) and float((fed - weight).abs().max()) < 2


def test_a_convolution_is_rounded_as_the_map_of_its_patches():
    weight = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    into, out = moment(36, 1, 200), moment(8, 2, 200)
    fed = decode(rounded(weight, grouped(4, 64), into, out))
    flat = decode(rounded(weight.flatten(1), grouped(4, 64), into, out))
    assert torch.equal(fed.flatten(1), flat)
    assert not torch.equal(fed, decode(rounded(weight, grouped(4, 64), into)))
