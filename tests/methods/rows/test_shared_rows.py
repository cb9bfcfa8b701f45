"""Shared rows as a fit puts them together: contexts are as exact as their rows."""

from types import SimpleNamespace

import pytest
import torch

from surgery.anatomy.sites import Site
from surgery.geometry.blocks import BlockGrid
from surgery.geometry.views import CanonicalView
from surgery.methods.rows.parts import unpack, wrong_parts
from surgery.methods.rows.shared import SharedRows
from surgery.storage.codecs import BFLOAT16, NATIVE, decode, encode, grouped

N, L, C, D = 40, 2, 6, 64


def bank(coarse=True):
    generator = torch.Generator().manual_seed(0)
    view = CanonicalView.of("(s o) i -> s o i", (L * 8, 8), s=L)
    sites = [Site(f"m{i}", "w", ("w",), "linear", (L * 8, 8), "float32", view, 0) for i in range(N)]
    contexts = torch.randn(N, L, C, generator=generator)
    return SharedRows(tuple(sites), BlockGrid(L, 8, 8, 8, 8), contexts, coarse=coarse)


def rows(*precisions):
    generator = torch.Generator().manual_seed(1)
    found = []
    for precision in precisions:
        row = torch.randn(L, D, generator=generator)
        found.append(
            precision and SimpleNamespace(precision=precision, encode=lambda r=row, p=precision: encode(r, p))
        )
    return found


@pytest.mark.parametrize(
    ("kept", "coarse"),
    [
        ([grouped(8, 64), grouped(3, 64), None, grouped(2, 64), None, None], True),
        ([grouped(12, 64), grouped(3, 64), None, None, None, None], False),
        ([NATIVE, grouped(3, 64), grouped(3, 64), None, None, None], False),
        ([BFLOAT16, grouped(3, 64), None, None, None, None], False),
    ],
)
def test_contexts_are_rounded_beside_rows_of_few_bits_alone(kept, coarse):
    made = bank()
    plan, placements, parts = made.assemble(0, rows(*kept))
    columns = [j for j, each in enumerate(kept) if each is not None]
    wanted, found = made.contexts[:, :, columns].flatten(0, 1), decode(parts["contexts"])
    assert found.equal(wanted.bfloat16().float() if coarse else wanted)
    assert wrong_parts(plan, parts) == []
    again = unpack(plan, {name: decode(part) for name, part in parts.items()})
    assert again.contexts.equal(found)
    assert len(placements) == N


def test_others_keep_their_contexts():
    _, _, parts = bank(coarse=False).assemble(0, rows(grouped(3, 64), *[None] * 5))
    assert parts["contexts"].precision == NATIVE
