"""Laws of the hot kernel, against a loop written from the formula."""

from __future__ import annotations

import doctest
import itertools
import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery.core import kernel
from surgery.core.kernel import generate, transpose
from surgery.util import memory

DTYPES = [torch.float32, torch.float64]


def generate_by_loops(rows: Tensor, index: Tensor, coefficient: Tensor) -> Tensor:
    """`B[l] = sum_j coefficient[l, j] * rows[index[l, j]]`, one term at a time (MUiR Eq. 5)."""
    locations, width = index.shape
    blocks = []
    for location in range(locations):
        block = torch.zeros(rows.shape[1], dtype=rows.dtype)
        for j in range(width):
            block = block + coefficient[location, j] * rows[int(index[location, j])]
        blocks.append(block)
    return torch.stack(blocks) if blocks else rows.sum() * coefficient.sum() * torch.zeros(0, rows.shape[1])


def make_problem(
    locations: int, width: int, rows: int, size: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, index, coefficient and a gradient of the blocks."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, size, dtype=dtype, generator=generator).requires_grad_(),
        torch.randint(rows, (locations, width), generator=generator),
        torch.randn(locations, width, dtype=dtype, generator=generator).requires_grad_(),
        torch.randn(locations, size, dtype=dtype, generator=generator),
    )


def run_both_ways(
    rows: Tensor, index: Tensor, coefficient: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = generate(rows, index, coefficient)
    grad_rows, grad_coefficient = torch.autograd.grad(blocks, (rows, coefficient), grad)
    return blocks.detach(), grad_rows, grad_coefficient


@pytest.fixture
def in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send results of any size through the path for large ones."""
    monkeypatch.setattr(memory, "FRESH_MEMORY_BYTES", 0)
    monkeypatch.setattr(kernel, "SLAB_BYTES", 1)
    monkeypatch.setattr(kernel, "SLAB_ROWS", 3)


@settings(deadline=None)
@given(
    locations=st.integers(0, 12),
    width=st.integers(1, 9),
    rows=st.integers(1, 10),
    size=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    prepare=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_the_formula(
    locations: int,
    width: int,
    rows: int,
    size: int,
    dtype: torch.dtype,
    index_dtype: torch.dtype,
    prepare: bool,
    seed: int,
) -> None:
    dictionary, index, coefficient, grad = make_problem(locations, width, rows, size, dtype, seed)
    index = index.to(index_dtype)
    transposed = transpose(index, rows) if prepare else None
    blocks = generate(dictionary, index, coefficient, transposed)
    expected = generate_by_loops(dictionary, index, coefficient).to(dtype)
    torch.testing.assert_close(blocks, expected)
    for found, wanted in zip(
        torch.autograd.grad(blocks, (dictionary, coefficient), grad),
        torch.autograd.grad(expected, (dictionary, coefficient), grad),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slabs", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_several_lengths_equal_one_formula_each(
    slabs: bool, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """With `offset` a location has as many terms as it needs, even none; a transposed code changes nothing."""
    if slabs:
        request.getfixturevalue("in_slabs")
    lengths = torch.tensor([2, 0, 5, 1, 0, 3, 2, 2, 7, 1, 0])
    offset = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    rows, index, coefficient, _ = make_problem(1, int(lengths.sum()), 6, 8, dtype)
    index, coefficient = index.flatten(), coefficient.detach().flatten().requires_grad_()
    grad = torch.randn(len(lengths), 8, dtype=dtype, generator=torch.Generator().manual_seed(1))
    slow = torch.cat(
        [
            generate_by_loops(rows, index[a:b].unsqueeze(0), coefficient[a:b].unsqueeze(0))
            for a, b in itertools.pairwise(offset.tolist())
        ]
    )
    wanted = torch.autograd.grad(slow, (rows, coefficient), grad)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    for code in (None, transpose(index, 6, offset)):
        fast = generate(rows, index, coefficient, code, offset)
        assert torch.allclose(fast, slow, atol=tolerance)
        for found, right in zip(torch.autograd.grad(fast, (rows, coefficient), grad), wanted, strict=True):
            assert torch.allclose(found, right, atol=tolerance)


@pytest.mark.usefixtures("in_slabs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("locations", [4, 9, 10])
def test_slabs_change_no_bit(locations: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(locations, 4, 11, 6, dtype)
    in_slabs = run_both_ways(*problem)
    monkeypatch.setattr(memory, "FRESH_MEMORY_BYTES", 2**30)
    assert all(torch.equal(a, b) for a, b in zip(in_slabs, run_both_ways(*problem), strict=True))


def test_a_result_above_the_threshold_equals_the_formula() -> None:
    rows, index, coefficient, grad = make_problem(40_000, 2, 40_001, 256, torch.float32)
    assert grad.nbytes > memory.FRESH_MEMORY_BYTES
    found = run_both_ways(rows, index, coefficient, grad)
    expected = (coefficient[:, :, None] * rows[index]).sum(1)
    torch.testing.assert_close(found[0], expected)
    wanted = torch.autograd.grad(expected, (rows, coefficient), grad)
    torch.testing.assert_close(found[1], wanted[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[2], wanted[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [1, 3])
def test_gradients_are_those_of_finite_differences(width: int) -> None:
    rows, index, coefficient, _ = make_problem(5, width, 4, 3)
    assert torch.autograd.gradcheck(lambda r, c: generate(r, index, c), (rows, coefficient))


def test_gradient_reaches_the_rows_in_use_and_no_other() -> None:
    rows, index, coefficient, grad = make_problem(20, 3, 60, 8)
    _, grad_rows, _ = run_both_ways(rows, index, coefficient, grad)
    used = torch.zeros(60, dtype=torch.bool)
    used[index.flatten()] = True
    assert 0 < int(used.sum()) < 60
    assert bool(grad_rows[used].ne(0).any(1).all())
    assert bool(grad_rows[~used].eq(0).all())


def test_a_row_named_twice_counts_twice() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    coefficient = torch.tensor([[2.0, 5.0]], requires_grad=True)
    blocks, grad_rows, grad_coefficient = run_both_ways(
        rows, torch.tensor([[1, 1]]), coefficient, torch.ones(1, 2)
    )
    assert blocks.tolist() == [[21.0, 28.0]]
    assert grad_rows.tolist() == [[0.0, 0.0], [7.0, 7.0]]
    assert grad_coefficient.tolist() == [[7.0, 7.0]]


def test_no_location_and_no_term() -> None:
    rows = torch.ones(3, 2, requires_grad=True)
    none = generate(rows, torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, 4))
    assert none.shape == (0, 2)
    zeros = generate(rows, torch.zeros(5, 0, dtype=torch.long), torch.zeros(5, 0))
    assert torch.equal(zeros, torch.zeros(5, 2))
    (grad,) = torch.autograd.grad((none.sum() + zeros.sum()), rows)
    assert torch.equal(grad, torch.zeros(3, 2))


@pytest.mark.parametrize("learns", ["rows", "coefficient"])
def test_one_of_the_two_is_frozen(learns: str) -> None:
    rows, index, coefficient, grad = make_problem(6, 3, 5, 4)
    _, both_rows, both_coefficient = run_both_ways(rows, index, coefficient, grad)
    if learns == "rows":
        generate(rows, index, coefficient.detach()).backward(grad)
        assert coefficient.grad is None and rows.grad is not None
        assert torch.equal(rows.grad, both_rows)
    else:
        generate(rows.detach(), index, coefficient).backward(grad)
        assert rows.grad is None and coefficient.grad is not None
        assert torch.equal(coefficient.grad, both_coefficient)


def test_no_grad_and_inference_mode_record_nothing() -> None:
    rows, index, coefficient, _ = make_problem(6, 3, 5, 4)
    expected = generate(rows, index, coefficient)
    assert expected.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            blocks = generate(rows, index, coefficient)
        assert not blocks.requires_grad and torch.equal(blocks, expected)
    assert not generate(rows.detach(), index, coefficient.detach()).requires_grad


@pytest.mark.parametrize("width", [3, 5])  # fewer terms than rows, and as many: two ways to the gradient
def test_autocast_changes_nothing(width: int) -> None:
    problem = make_problem(6, width, 5, 4, torch.float32)
    plain = run_both_ways(*problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run_both_ways(*problem)
        assert torch.is_autocast_enabled("cpu")
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(cast, plain, strict=True))


def test_strided_and_expanded_tensors() -> None:
    rows, index, coefficient, _ = make_problem(6, 3, 5, 4)
    wanted = torch.autograd.grad(generate_by_loops(rows, index, coefficient).sum(), (rows, coefficient))
    strided_rows, strided_index, strided_coefficient = (
        tensor.t().contiguous().t() for tensor in (rows, index, coefficient)
    )
    blocks = generate(strided_rows, strided_index, strided_coefficient)
    assert torch.equal(blocks, generate(rows, index, coefficient))
    for found, expected in zip(torch.autograd.grad(blocks.sum(), (rows, coefficient)), wanted, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_twice_and_for_any_number_of_threads(dtype: torch.dtype) -> None:
    problem = make_problem(3000, 8, 400, 64, dtype)
    first, threads = run_both_ways(*problem), torch.get_num_threads()
    try:
        for count in (threads, 1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(first, run_both_ways(*problem), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_gradients_accumulate_over_two_calls() -> None:
    rows, index, coefficient, grad = make_problem(6, 3, 5, 4)
    _, once, _ = run_both_ways(rows, index, coefficient, grad)
    for _ in range(2):
        generate(rows, index, coefficient).backward(grad)
    torch.testing.assert_close(rows.grad, 2 * once)


def test_second_derivative_is_refused() -> None:
    rows, index, coefficient, _ = make_problem(6, 3, 5, 4)
    (grad,) = torch.autograd.grad(generate(rows, index, coefficient).square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_no_warning_reaches_the_user(recwarn: pytest.WarningsRecorder) -> None:
    run_both_ways(*make_problem(6, 3, 5, 4))
    assert not recwarn.list


def test_transposed_lists_each_row_s_locations_in_order() -> None:
    _, index, _, _ = make_problem(9, 4, 6, 1)
    transposed = transpose(index, 6)
    for row in range(6):
        begin, end = transposed.offset[row : row + 2].tolist()
        assert transposed.location[begin:end].tolist() == (index == row).nonzero()[:, 0].tolist()
        assert bool((index.flatten()[transposed.entry[begin:end]] == row).all())


def test_a_stale_transposed_index_is_an_error() -> None:
    rows, index, coefficient, _ = make_problem(6, 3, 5, 4)
    transposed = transpose(index, 5)
    generate(rows, index.clone(), coefficient, transposed)
    with pytest.raises(ValueError, match="another index"):
        generate(rows[:-1], index.clamp(max=3), coefficient, transposed)
    with pytest.raises(ValueError, match="another index"):
        generate(rows, index.int(), coefficient, transposed)
    index[0, 0] = (index[0, 0] + 1) % 5
    with pytest.raises(ValueError, match="another index"):
        generate(rows, index, coefficient, transposed)


@pytest.mark.parametrize("bad", [-1, 5])
def test_an_index_out_of_range_is_named(bad: int) -> None:
    index = torch.full((2, 3), bad)
    with pytest.raises(IndexError, match=rf"0\.\.4, found {bad}\.\.{bad}"):
        generate(torch.ones(5, 4), index, torch.ones(2, 3))
    with pytest.raises(IndexError, match=rf"0\.\.4, found {bad}\.\.{bad}"):
        transpose(index, 5)


@pytest.mark.parametrize(
    ("error", "rows", "index", "coefficient"),
    [
        (TypeError, torch.ones(5, 4).bfloat16(), torch.zeros(2, 3).long(), torch.ones(2, 3).bfloat16()),
        (TypeError, torch.ones(5, 4), torch.zeros(2, 3).long(), torch.ones(2, 3).double()),
        (TypeError, torch.ones(5, 4), torch.zeros(2, 3), torch.ones(2, 3)),
        (ValueError, torch.ones(5, 4), torch.zeros(2, 3).long(), torch.ones(2, 4)),
        (ValueError, torch.ones(5, 2, 2), torch.zeros(2, 3).long(), torch.ones(2, 3)),
        (ValueError, torch.ones(5, 4), torch.zeros(6).long(), torch.ones(6)),
    ],
)
def test_what_does_not_fit_is_an_error(
    error: type[Exception], rows: Tensor, index: Tensor, coefficient: Tensor
) -> None:
    with pytest.raises(error, match="found"):
        generate(rows, index, coefficient)


@pytest.mark.usefixtures("in_slabs")
def test_no_result_changes_while_it_is_in_use() -> None:
    """Memory is used again, but not that of a result, a view of it, or a gradient that is still alive."""
    rows, index, coefficient, grad = make_problem(10, 4, 11, 6)
    first = run_both_ways(rows, index, coefficient, grad)
    held = [first[0].clone(), first[1].clone()]
    part = first[1][3:5]
    for seed in range(1, 2 * memory.REGIONS_KEPT):
        other = make_problem(10, 4, 11, 6, seed=seed)
        run_both_ways(*other)
        generate(rows, index, coefficient).backward(grad)
        torch.testing.assert_close(rows.grad, seed * held[1])
    assert torch.equal(first[0], held[0])
    del first
    run_both_ways(*make_problem(10, 4, 11, 6, seed=1))
    assert torch.equal(part, held[1][3:5])


@pytest.mark.skipif(sys.platform == "win32", reason="memory is not kept there")
def test_freed_memory_is_used_again_and_can_be_released() -> None:
    memory.release_kept()
    first = memory.empty_kept(64, 32, torch.float32)
    second = memory.empty_kept(64, 32, torch.float32)
    address = first.data_ptr()
    assert second.data_ptr() != address
    del first
    assert memory.empty_kept(40, 32, torch.float32).data_ptr() == address
    assert memory.empty_kept(64, 32, torch.float64).data_ptr() != address, "too small"
    assert memory.empty_kept(8, 32, torch.float32).data_ptr() != address, "too wasteful"
    second.fill_(3.0)
    memory.release_kept()
    assert bool(second.eq(3.0).all())


@pytest.mark.parametrize("module", [kernel, memory])
def test_examples_in_the_docstrings(module: ModuleType) -> None:
    outcome = doctest.testmod(module)
    assert outcome.attempted and not outcome.failed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_equals_cpu(dtype: torch.dtype) -> None:
    rows, index, coefficient, grad = make_problem(50, 4, 20, 16, dtype)
    expected = run_both_ways(rows, index, coefficient, grad)
    found = run_both_ways(rows.cuda(), index.cuda(), coefficient.cuda(), grad.cuda())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)
