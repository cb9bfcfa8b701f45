"""Rows in several precisions: laws of the codec, and of the classes that a fit has a choice of."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.artifact.layout import encoded_forms
from surgery.errors import ArtifactError
from surgery.storage.codecs import (
    Precision,
    Statistics,
    as_dtype,
    by_row,
    decode,
    encode,
    grouped,
    mixtures,
    part_layout,
    row_costs,
    take_rows,
)

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@st.composite
def tables(draw):
    """A table, a precision of its rows, and weights of these or None."""
    bits = draw(st.lists(st.sampled_from([2, 3, 4, 5, 8, 12]), min_size=1, max_size=4, unique=True))
    counts = [(b, draw(st.integers(1, 4))) for b in sorted(bits, reverse=True)]
    rows, inner = sum(count for _, count in counts), draw(st.sampled_from([(1,), (5,), (2, 7), (70,)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    table = torch.randn(rows, *inner, generator=generator).to(draw(st.sampled_from(FLOATS)))
    weights = torch.rand(rows, generator=generator) if draw(st.booleans()) else None
    return table, by_row(draw(st.sampled_from([3, 64])), counts), weights


@given(tables(), st.sampled_from(FLOATS), st.data())
@settings(max_examples=30, deadline=None)
def test_every_row_is_stored_as_integers_of_its_class(drawn, other, data):
    table, precision, weights = drawn
    encoded = encode(table, precision, Statistics(None, 1, weights))
    layout = {name: (part.dtype, tuple(part.shape)) for name, part in encoded.parts.items()}
    assert layout == part_layout(tuple(table.shape), table.dtype, precision)
    assert Precision.parse(str(precision)) == precision and precision.codec.fault(encoded.parts) == ""
    values, which = decode(encoded), encoded.parts["class"].long()
    assert (values.shape, values.dtype) == (table.shape, table.dtype)
    assert values.untyped_storage().nbytes() == values.nbytes
    assert decode(as_dtype(encoded, other)).dtype == other
    chosen = precision.settings
    for row, of_row, number in zip(table, values, which, strict=True):
        bits, _ = chosen.rows[number]
        assert torch.equal(decode(encode(row[None], grouped(bits, chosen.group)))[0], of_row)
    cost = row_costs(table, weights)
    for number in range(len(chosen.rows) - 1):  # rows that cost more have as many bits or more
        assert cost[which == number].min() >= cost[which > number].max()
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(table) - 1), min_size=1, max_size=6)))
    taken = take_rows(encoded, rows)
    assert (
        torch.equal(decode(taken), values[rows]) and Precision.parse(str(taken.precision)) == taken.precision
    )
    assert {name: tuple(part.shape) for name, part in taken.parts.items()} == {
        name: size for name, (_, size) in part_layout(taken.shape, taken.dtype, taken.precision).items()
    }


@given(st.integers(0, 99), st.integers(2, 40), st.sampled_from([1, 4, 12]))
@settings(max_examples=40, deadline=None)
def test_no_whole_precision_is_better_than_classes_in_both_bits_and_error(seed, rows, spread):
    costs = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) ** spread
    widths = (8, 6, 4, 3, 2)
    losses = [4.0**-bits for bits in widths]
    found = mixtures(costs, [None, *(grouped(bits, 64) for bits in widths)], [1.0, *losses])
    for precision, cost in found:
        assert precision.settings.count == rows
        for bits, loss in zip(widths, losses, strict=True):
            whole = float(costs.sum()) * loss
            assert not (bits <= precision.settings.bits and whole < cost * (1 - 1e-6))
    assert mixtures(torch.zeros(4), [grouped(4, 64), grouped(2, 64)], [0.1, 0.2]) == []
    assert mixtures(costs, [grouped(4, 64)], [0.1]) == []


@pytest.mark.parametrize(
    "text", ["", "4/64", "4.0/64:4x0", "4.0/64:9x3", "5.0/64:4x3", "4.0/0:4x3", "4.0/64:4x3,"]
)
def test_texts_that_name_no_classes_are_refused(text):
    with pytest.raises(ValueError, match="is not a precision"):
        Precision.parse(f"mixed{text}")


def test_damage_is_found():
    precision = by_row(64, [(8, 2), (4, 3)])
    encoded = encode(torch.randn(5, 70), precision)
    damaged = {**encoded.parts, "class": torch.zeros(5, dtype=torch.uint8)}
    assert "classes" in precision.codec.fault(damaged)
    damaged = {**encoded.parts, "class": torch.full((5,), 9, dtype=torch.uint8)}
    assert "classes" in precision.codec.fault(damaged)
    damaged = {**encoded.parts, "1.scale": encoded.parts["1.scale"] * float("nan")}
    assert "NaN" in precision.codec.fault(damaged)
    with pytest.raises(ArtifactError, match="as many as those of classes, 5"):
        encoded_forms([(str(precision), "float32", (6, 70), ("table",))], "member one")
