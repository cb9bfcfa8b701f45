"""Rows that are stored together: encoded in one pass over their columns, and stacked without encoding anew."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moments import moment

from surgery.storage.codecs import (
    BFLOAT16,
    NATIVE,
    Statistics,
    decode,
    encode,
    encode_together,
    grouped,
    stack_rows,
    take_rows,
)
from surgery.storage.codecs.feedback import damped, price


def rows_of(counts, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, columns, generator=generator) for count in counts]


COUNTS = st.lists(st.integers(1, 5), min_size=1, max_size=4)
PRECISIONS = st.sampled_from(
    [NATIVE, BFLOAT16, *(grouped(b, g) for b in (2, 3, 5, 7, 8, 10, 12) for g in (4, 64))]
)


@given(COUNTS, st.integers(1, 70), PRECISIONS, st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_stacked_rows_are_taken_apart_again(counts, columns, precision, seed):
    each = [encode(rows, precision) for rows in rows_of(counts, columns, seed)]
    whole = stack_rows(each)
    assert whole.shape == (sum(counts), columns)
    assert torch.equal(decode(whole), torch.cat([decode(part) for part in each]))
    layout = whole.precision.codec.layout(whole.shape, whole.dtype, whole.precision.settings)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in whole.parts.items()} == dict(layout)
    start = 0
    for part in each:
        own = take_rows(whole, torch.arange(start, start + part.shape[0]))
        assert all(torch.equal(own.parts[name], mine) for name, mine in part.parts.items())
        start += part.shape[0]


def test_rows_of_which_some_are_native_are_stacked_natively():
    fine, wild = torch.randn(2, 64), torch.full((1, 64), 1e30)
    whole = stack_rows([encode(fine, grouped(4, 64)), encode(wild, grouped(4, 64))])
    assert whole.precision == NATIVE
    assert torch.equal(decode(whole), torch.cat([decode(encode(fine, grouped(4, 64))), wild]))


def test_vectors_have_no_rows_to_stack():
    with pytest.raises(ValueError, match="rows"):
        stack_rows([encode(torch.ones(64), grouped(4, 64))] * 2)


@given(COUNTS, st.integers(2, 70), st.sampled_from([8, 64]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_rows_encoded_together_are_as_good_as_each_alone(counts, columns, group, seed):
    rows, second = rows_of(counts, columns, seed), moment(columns, seed, 3 * columns)
    widths = [(2, 3, 4, 8, 12)[(seed + i) % 5] for i in range(len(counts))]
    precisions, known = [grouped(bits, group) for bits in widths], Statistics(second, 1)
    together = encode_together(rows, precisions, known)
    for own, precision, found in zip(rows, precisions, together, strict=True):
        assert (found.precision, found.shape, found.dtype) == (precision, tuple(own.shape), own.dtype)
        fed, plain, one = (
            price(decode(each) - own, damped(second))
            for each in (found, encode(own, precision), encode(own, precision, known))
        )
        # Coordinate descent ends when few codes of all rows change, so one sweep more or less of what alone takes.
        assert bool((fed <= plain * (1 + 1e-5) + 1e-9).all())
        torch.testing.assert_close(fed.sum(), one.sum(), rtol=0.25, atol=1e-9)


def test_rows_under_no_statistics_are_encoded_as_each_alone():
    rows, precisions = rows_of((3, 2, 4), 70, 0), [grouped(3, 64), NATIVE, grouped(5, 64)]
    for own, precision, found in zip(rows, precisions, encode_together(rows, precisions, None), strict=True):
        assert all(
            torch.equal(part, encode(own, precision).parts[name]) for name, part in found.parts.items()
        )
