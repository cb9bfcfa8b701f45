"""How stored forms are held that are decoded again and again: the same values, within the bytes that are allowed."""

from __future__ import annotations

import gc

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from resident_bodies import draw

from surgery.storage.cache import Cache
from surgery.storage.codecs import Precision, decode, encode, in_bytes
from surgery.storage.held import held_faster

FORMS = ["int2/16", "int3/64", "int5/8", "int6/64", "int7/64", "int8/16", "int10/64", "bfloat16", "native"]


class Owner:
    """Whatever a tensor is decoded from."""


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(2, 8),
    st.sampled_from([1, 7, 64]),
)
def test_a_byte_for_each_code_is_the_same_values(shape, bits, group):
    stored = encode(draw(*shape), Precision.parse(f"int{bits}/{group}"))
    wide = in_bytes(stored)
    assert torch.equal(decode(wide), decode(stored)) and wide.shape == stored.shape
    assert {n: (p.dtype, tuple(p.shape)) for n, p in wide.parts.items()} == dict(
        wide.precision.codec.layout(wide.shape, wide.dtype, wide.precision.settings)
    )


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 90), st.integers(1, 90), st.sampled_from(FORMS), st.sampled_from([0.1, 1.0])
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(-10, 60_000),
)
def test_spare_bytes_are_not_exceeded_and_values_stay(drawn, room):
    forms = [encode(draw(rows, columns), Precision.parse(form)) for rows, columns, form, _ in drawn]
    uses = {id(form): use for form, (*_, use) in zip(forms, drawn, strict=True)}
    other = held_faster(forms, uses, room, {id(forms[0])})
    assert id(forms[0]) not in other  # of which rows are looked up
    by_key = {id(form): form for form in forms}
    assert sum(max(new.nbytes - by_key[key].nbytes, 0) for key, new in other.items()) <= max(room, 0)
    for key, new in other.items():
        assert torch.equal(decode(new), decode(by_key[key]))


def test_spare_bytes_go_first_to_what_all_members_use():
    common, own = (encode(draw(64, 128) + shift, Precision.parse("int7/64")) for shift in (0, 1))
    other = held_faster([own, common], {id(own): 0.1, id(common): 1.0}, 64 * 128 // 8)
    assert other.keys() == {id(common)}


def test_layers_in_turn_stay_in_a_cache_that_is_too_small_for_all():
    cache, layers = Cache(3 * 40), [Owner() for _ in range(5)]
    made: list[int] = []

    def forward(mine: list[Owner]) -> None:
        for number, layer in enumerate(mine):
            cache.take(layer, lambda number=number: made.append(number) or torch.zeros(10))
            assert cache.nbytes <= cache.limit

    forward(layers)
    made.clear()
    forward(layers)
    assert made == [3, 4]
    others = [Owner() for _ in range(3)]
    forward(others), forward(others)
    made.clear()
    forward(others)
    assert not made  # another member took the room
    del others, layers
    gc.collect()
    assert cache.nbytes == 0
    cache.take(cache, lambda: torch.zeros(1000))
    assert cache.nbytes == 0
