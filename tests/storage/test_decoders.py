"""Decoders that are used again and again: the values of a slow reading of the format, in few calls."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from surgery.anatomy.plan import BankPlan, Placement
from surgery.anatomy.sites import Site
from surgery.core.generation import generated
from surgery.core.registry import find_method
from surgery.core.tensor_method import TensorMethod
from surgery.geometry.blocks import BlockGrid
from surgery.geometry.views import CanonicalView
from surgery.storage.codecs import PLANES, Precision, decode, decoder, encode, grouped, planes
from surgery.storage.packed import Form


class Calls(TorchDispatchMode):
    """Counts operators."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def slowly(encoded):
    """Grouped integers, value by value, from the words of the format."""
    bits, group = encoded.precision.settings.bits, encoded.precision.settings.group
    shape = encoded.shape
    rows, columns = (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))
    width = min(group, columns)
    padded = -(-columns // width) * width
    values = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            place, code, shift = row * padded + column, 0, 0
            for plane in PLANES[bits]:
                each = 8 // plane
                byte = int(encoded.parts[f"q{plane}"][place // each])
                code |= (byte >> (place % each * plane) & ((1 << plane) - 1)) << shift
                shift += plane
            values[row, column] = (
                float(code - (1 << (bits - 1))) * encoded.parts["scale"][place // width].float()
            )
    return values.view(shape)


shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)


@pytest.mark.parametrize("looked_up", [0, 1 << 14])
@given(
    st.sampled_from([*PLANES]), shapes, st.sampled_from([1, 3, 8, 64]), st.integers(0, 999),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_what_is_decoded_is_what_the_format_says(looked_up, bits, shape, group, seed, dtype):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    stored, before = encode(tensor, grouped(bits, group)), planes.LOOKED_UP
    planes.LOOKED_UP = looked_up
    try:
        found = [decode(stored), decoder(stored)()]
    finally:
        planes.LOOKED_UP = before
    wanted = slowly(stored).to(dtype)
    for each in found:
        assert each.dtype == dtype and each.is_contiguous() and torch.equal(each, wanted)
        assert each.untyped_storage().nbytes() == each.nbytes


@pytest.mark.parametrize("precision", ["native", "bfloat16", "int4/64", "int8/64"])
def test_decoders_keep_what_is_stored(precision):
    stored = encode(torch.randn(4, 64), Precision.parse(precision))
    again = decoder(stored)
    first = again()
    if precision != "native":
        first.zero_()  # as whoever got it may
    assert torch.equal(again(), decode(stored))


@pytest.mark.parametrize("bits", [*PLANES])
def test_few_calls_decode(bits):
    again = decoder(encode(torch.randn(4, 128), grouped(bits, 64)))
    again()
    with Calls() as calls:
        again()
    assert calls.count <= 7 + 6 * (len(PLANES[bits]) - (8 in PLANES[bits])) + 4 * (bits > 8)


def sites(o, c, k):
    """Shapes and views of a site of `[o, c * k]` matrices, as they lie and turned."""
    return [
        ((o, c * k), CanonicalView.of("o i -> 1 o i", (o, c * k))),
        ((o, c, k), CanonicalView.of("o c k -> 1 o (c k)", (o, c, k))),
        ((c * k, o), CanonicalView.of("i o -> 1 o i", (c * k, o))),
        ((c, o, k), CanonicalView.of("c o k -> 1 o (c k)", (c, o, k))),
    ]


@given(
    st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.lists(st.integers(1, 4), max_size=3), st.integers(0, 3),
    st.sampled_from(["float32", "bfloat16"]), st.booleans(), st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_a_site_without_its_bank_has_the_same_bits(o, c, k, counts, turn, dtype, autocast, seed):
    g = torch.Generator().manual_seed(seed)
    shape, view = sites(o, c, k)[turn]
    site = Site("net", "weight", ("weight",), "linear", shape, dtype, view, 0)
    grid = BlockGrid(1, o, c * k, 1, c * k)
    plan, placement = (
        BankPlan("bank", (1, c * k), 1, dtype, o, method="siblings"),
        Placement(site, "bank", grid, 0),
    )
    parts = {"shared": torch.randn(o, c * k, generator=g)}
    for number, count in enumerate(counts):
        parts[f"rows.{number}"] = torch.randn(count, c * k, generator=g)
        parts[f"contexts.{number}"] = torch.randn(count, o, generator=g)
    if counts:
        parts["owner"] = torch.zeros(sum(counts), dtype=torch.uint8)
    method = find_method("siblings", TensorMethod)
    (handle,) = generated({"bank": method.unpack(plan, parts)}, [placement]).values()
    form = Form(
        {name: encode(each, Precision.parse("native")) for name, each in parts.items()}, (plan, placement)
    )
    before = {name: each.clone() for name, each in parts.items()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = form.read(handle.dtype)
    assert torch.equal(found, handle.read()) and found.shape == shape
    assert all(torch.equal(parts[name], each) for name, each in before.items())
    taken = method.weight(plan, placement, parts)
    assert (taken is None) == (not view.in_order or dtype != "float32")
