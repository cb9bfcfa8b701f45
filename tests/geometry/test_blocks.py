"""Laws of views and blocks: both are undone exactly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.geometry.block_map import read_tensor, write_tensor
from surgery.geometry.blocks import BlockGrid, tile, untile
from surgery.geometry.views import CanonicalView
from surgery.tracing.layers.axes import conv_axes, conv_transpose_axes, gate_axes, linear_axes, right_axes
from surgery.tracing.layout import Layout, canonical_view

SIZE = st.integers(1, 9)
DTYPE = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@st.composite
def weights(draw):
    """A tensor of any layer kind, with its view."""
    out, into, groups = draw(SIZE), draw(SIZE), draw(st.integers(1, 3))
    kernel = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    stack = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    kind = draw(st.sampled_from(["linear", "right", "conv", "conv_transpose", "gates"]))
    shape, axes = {
        "linear": lambda: ((*stack, out, into), linear_axes),
        "right": lambda: ((*stack, into, out), right_axes),
        "conv": lambda: ((groups * out, into, *kernel), lambda s: conv_axes(s, groups)),
        "conv_transpose": lambda: ((groups * into, out, *kernel), lambda s: conv_transpose_axes(s, groups)),
        "gates": lambda: ((4 * out, into), lambda s: gate_axes(s, 4)),
    }[kind]()
    view = canonical_view(Layout.whole(shape), axes(shape), shape)
    assert isinstance(view, CanonicalView)
    assert view.shape[1:] == (out, into)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return torch.randn(shape, generator=generator).to(draw(DTYPE)), view


@settings(max_examples=300, deadline=None)
@given(weights(), SIZE, SIZE)
def test_view_and_blocks_are_undone_exactly(weight, m, n):
    tensor, view = weight
    matrices = view.to_matrices(tensor)
    assert tuple(matrices.shape) == view.shape
    assert torch.equal(view.to_tensor(matrices), tensor)
    grid = BlockGrid(*view.shape, m, n)
    blocks = tile(matrices, grid)
    assert blocks.shape == (grid.locations, m * n)
    assert blocks.dtype == tensor.dtype
    back = untile(blocks, grid)
    assert torch.equal(back, matrices)
    assert torch.equal(view.to_tensor(back), tensor)


@settings(max_examples=300, deadline=None)
@given(weights(), SIZE, SIZE, DTYPE)
def test_one_copy_is_view_and_tiling(weight, m, n, dtype):
    tensor, view = weight
    grid = BlockGrid(*view.shape, m, n)
    blocks = tile(view.to_matrices(tensor), grid).contiguous()
    found = torch.full_like(blocks, float("nan"), dtype=dtype)
    write_tensor(tensor, view, grid, found)
    assert torch.equal(found, blocks.to(dtype))
    back = read_tensor(blocks, view, grid, dtype)
    assert back.is_contiguous() and torch.equal(back, tensor.to(dtype))
    turned = torch.empty(tensor.shape[::-1], dtype=tensor.dtype).permute(*range(tensor.ndim)[::-1])
    turned.copy_(tensor)  # a gradient may lie in memory in any order
    write_tensor(turned, view, grid, found.fill_(float("nan")))
    assert torch.equal(found, blocks.to(dtype))


@pytest.mark.parametrize("m, n", [(1, 7), (5, 1), (16, 16), (1, 1), (3, 4)])
def test_locations_are_numbered_stack_row_column(m, n):
    matrices = torch.arange(2 * 5 * 7.0).reshape(2, 5, 7)
    grid = BlockGrid(2, 5, 7, m, n)
    blocks = tile(matrices, grid)
    rows, columns = grid.tiles
    for stack in range(2):
        for row in range(rows):
            for column in range(columns):
                block = torch.zeros(m, n)
                part = matrices[stack, row * m : (row + 1) * m, column * n : (column + 1) * n]
                block[: part.shape[0], : part.shape[1]] = part
                location = (stack * rows + row) * columns + column
                assert torch.equal(blocks[location].reshape(m, n), block)


def test_what_lies_in_the_padding_is_dropped():
    grid = BlockGrid(1, 3, 3, 2, 2)
    blocks = tile(torch.ones(1, 3, 3), grid)
    assert grid.padded and blocks.numel() == math.prod((4, 4))
    assert torch.equal(untile(blocks + 1, grid), torch.full((1, 3, 3), 2.0))


def test_a_pattern_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="axes"):
        CanonicalView.of("o i -> 1 o i", (2, 3, 4))
    with pytest.raises(ValueError, match="does not fit"):
        CanonicalView.of("(g o) i -> g o i", (5, 3), g=2)
