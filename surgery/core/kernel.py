"""Sparse codes x dictionary rows: the one hot kernel that every weight-sharing method runs on.

`B[l] = sum_j coefficient[l, j] * rows[index[l, j]]` is MUiR Eq. 5 (a location's c rows, weighted by its
context) and Eq. 8 (the rows of all its alternatives, weighted by softmax mass times context).

On CPU three things make it fast, and mostly memory traffic is left:

1. The blocks are bags of rows, summed by `embedding_bag`. The gradient of `rows` is the same sum over the
   transposed code: no zero fill, no scatter, no atomic, and every sum has one fixed order, so results are
   bitwise reproducible.
2. The gradient of `coefficient` is a product sampled at the code's entries, `torch.sparse.sampled_addmm`.
3. Large results are put, slab by slab, into memory that is kept from step to step (see `memory.py`): fresh
   memory costs more than the arithmetic.

On other devices `embedding_bag` and its own gradient are used as they are. `python -m benchmarks.kernel`
times this against gather-then-bmm, plain `embedding_bag`, and sorting by hypermodule with one padded bmm.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from surgery.util import memory

# Small enough for the cache; few slabs, since on busy cores each one waits for its threads.
SLAB_BYTES = 16 * 2**20
DENSE_CODE = 1 << 12  # a code matrix this small is cheaper as one matrix product than as gathered rows
SLAB_ROWS = 64  # at least so many bags at a time, to have work for every thread


@dataclass(frozen=True)
class TransposedIndex:
    """Which locations use each dictionary row: depends on the alignment alone, so keep it while that stays.

    Attributes:
        index: the index, flattened, that this was made from (a copy: later changes in place are noticed).
        location: `[E]`, the locations sorted by the row they use, in rising order within a row.
        entry: `[E]`, for each of `location` its position in the flattened code.
        offset: `[R+1]`, row r is used by `location[offset[r]:offset[r+1]]`.
    """

    index: Tensor
    location: Tensor
    entry: Tensor
    offset: Tensor


def transpose(index: Tensor, rows: int, offset: Tensor | None = None) -> TransposedIndex:
    """Sort a code's entries by dictionary row.

    Args:
        index: `[L, w]`, or `[E]` with `offset`; int32 or int64, each in `0 .. rows-1`.
        rows: number R of dictionary rows.
        offset: `[L+1]`, where each location's entries begin, where locations have codes of several lengths.

    Returns:
        What `generate` needs for the gradient of its rows, on the device of `index`.

    Raises:
        IndexError: an index is outside of `0 .. rows-1`.

    Example:
        >>> transpose(torch.tensor([[2, 0], [2, 2]]), rows=3).location
        tensor([0, 0, 1, 1])
    """
    _check_range(index, rows)
    flat = index.reshape(-1)
    entry = flat.argsort(stable=True)  # stable: the order of summation is fixed
    users = F.pad(torch.bincount(flat, minlength=rows).cumsum(0), (1, 0))
    if offset is None:
        location = entry.div(max(index.shape[1], 1), rounding_mode="floor")
    else:
        location = torch.arange(len(offset) - 1, device=flat.device).repeat_interleave(offset.diff())[entry]
    return TransposedIndex(flat.clone(), location, entry, users)


def generate(
    rows: Tensor,
    index: Tensor,
    coefficient: Tensor,
    transposed: TransposedIndex | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Generate all blocks: `B[l] = sum_j coefficient[l, j] * rows[index[l, j]]` (MUiR Eq. 5 and Eq. 8).

    Differentiable once in `rows` and `coefficient`. Autocast is off inside. A row that no location uses gets
    a gradient of exactly zero; a row that a location uses twice counts twice.

    Args:
        rows: `[R, d]` dictionary rows (R = K*c and d = m*n for hypermodules), float32 or float64.
        index: `[L, w]`, or `[E]` with `offset`; int32 or int64, the rows of each location.
        coefficient: of the shape of `index`, dtype and device of `rows`.
        transposed: `transpose(index, R, offset)`, if it is at hand; it saves a sort per backward pass, and
            CPU alone uses it.
        offset: `[L+1]`, where the entries of each location begin and, last, E: for locations with codes of
            several lengths, such as those for which alternatives compete and those for which none do.

    Returns:
        `[L, d]` blocks, dtype and device of `rows`.

    Raises:
        TypeError: a dtype other than those above.
        ValueError: shapes that do not fit, or `transposed` made from another index or number of rows.
        IndexError: an index is outside of `0 .. R-1` (on CPU; elsewhere PyTorch's own assertion).

    Example:
        >>> rows = torch.tensor([[1.0, 2.0], [10.0, 20.0]], requires_grad=True)
        >>> index, coefficient = torch.tensor([[0, 1], [1, 1]]), torch.tensor([[1.0, 0.5], [0.25, 0.25]])
        >>> generate(rows, index, coefficient).tolist()
        [[6.0, 12.0], [5.0, 10.0]]
    """
    _check(rows, index, coefficient, transposed, offset)
    with torch.autocast(rows.device.type, enabled=False):
        if rows.device.type != "cpu":
            return F.embedding_bag(
                index,
                rows,
                offset,
                per_sample_weights=coefficient,
                mode="sum",
                include_last_offset=offset is not None,
            )
        begin = _offsets(index) if offset is None else offset.to(index.dtype)
        return _Generate.apply(rows, index.reshape(-1), coefficient.reshape(-1), begin, transposed)


class _Generate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        index: Tensor,
        coefficient: Tensor,
        offset: Tensor,
        transposed: TransposedIndex | None,
    ) -> Tensor:
        rows, coefficient = rows.contiguous(), coefficient.contiguous()
        ctx.save_for_backward(rows, index, coefficient, offset)
        ctx.transposed = transposed
        return _sum_bags(rows, index, offset, coefficient)  # Eq. (5), Eq. (8)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        rows, index, coefficient, offset = ctx.saved_tensors
        grad, grad_rows, grad_coefficient = grad.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            code = ctx.transposed or transpose(index, len(rows), offset)
            grad_rows = _sum_bags(grad, code.location, code.offset, coefficient[code.entry])
        if ctx.needs_input_grad[2]:
            with torch.autocast("cpu", enabled=False):
                grad_coefficient = _dot_entries(grad, rows, index, offset)
        return grad_rows, None, grad_coefficient, None, None


def _sum_bags(source: Tensor, index: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    """Sum `weight[e] * source[index[e]]` over `e = offset[b] .. offset[b+1]-1`: bags `[n, d]` of `[N, d]`."""
    bags = len(offset) - 1
    slab = max(SLAB_ROWS, SLAB_BYTES // max(source[:1].nbytes, 1))
    if bags <= slab or bags * source[:1].nbytes <= memory.FRESH_MEMORY_BYTES:
        return _embedding_bag(source, index, offset, weight)
    result = memory.empty_kept(bags, source.shape[1], source.dtype)
    for first in range(0, bags, slab):
        ends = offset[first : first + slab + 1]
        begin, end = int(ends[0]), int(ends[-1])
        result[first : first + slab] = _embedding_bag(
            source, index[begin:end], ends - begin, weight[begin:end]
        )
    return result


def _embedding_bag(source: Tensor, index: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    if not index.numel():  # embedding_bag looks for the dictionary's first row even then
        return source.new_zeros(len(offset) - 1, source.shape[1])
    return F.embedding_bag(
        index, source, offset, per_sample_weights=weight, mode="sum", include_last_offset=True
    )


def _dot_entries(grad: Tensor, rows: Tensor, index: Tensor, offset: Tensor) -> Tensor:
    """`[E]` products of each entry's row with the gradient of its location: grad @ rows.T at these alone."""
    if len(index) >= len(grad) * len(rows):  # the whole product is no larger; sampled_addmm keeps at most L*R
        location = torch.arange(len(grad)).repeat_interleave(offset.diff())
        return (grad @ rows.t())[location, index.long()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        entries = torch.sparse_csr_tensor(
            offset,
            index,
            rows.new_zeros(len(index)),
            (len(grad), len(rows)),
            check_invariants=False,  # a location may name a row twice, in any order: each is one dot product
        )
        return torch.sparse.sampled_addmm(entries, grad, rows.t(), beta=0.0).values()


def _offsets(index: Tensor) -> Tensor:
    """`[L+1]`: where each location's entries begin in the flattened code."""
    locations, width = index.shape
    return torch.arange(locations + 1, dtype=index.dtype, device=index.device) * width


def _check(
    rows: Tensor,
    index: Tensor,
    coefficient: Tensor,
    transposed: TransposedIndex | None,
    offset: Tensor | None,
) -> None:
    if rows.dtype not in (torch.float32, torch.float64) or coefficient.dtype != rows.dtype:
        raise TypeError(
            f"rows and coefficient must both be float32 or both float64, found {rows.dtype} and "
            f"{coefficient.dtype}: keep the dictionary in float32 and cast the blocks"
        )
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"index must be int32 or int64, found {index.dtype}")
    if rows.ndim != 2 or index.ndim != (2 if offset is None else 1) or coefficient.shape != index.shape:
        wanted = "[L, w]" if offset is None else "[E]"
        raise ValueError(
            f"rows [R, d], index {wanted} and coefficient {wanted} are required, found "
            f"{list(rows.shape)}, {list(index.shape)} and {list(coefficient.shape)}"
        )
    if rows.device.type == "cpu":
        _check_range(index, len(rows))
        if offset is not None and (offset[0] != 0 or offset[-1] != len(index) or (offset.diff() < 0).any()):
            raise ValueError(f"offset must rise from 0 to {len(index)}, the number of entries")
        if transposed is not None and not (
            len(transposed.offset) == len(rows) + 1
            and transposed.index.dtype == index.dtype
            and torch.equal(transposed.index, index.reshape(-1))
        ):
            raise ValueError("transposed is of another index or R: make it again by transpose(index, R)")


def _check_range(index: Tensor, rows: int) -> None:
    low, high = (int(end) for end in index.aminmax()) if index.numel() else (0, -1)
    if low < 0 or high >= rows:
        raise IndexError(f"index must lie in 0..{rows - 1}, found {low}..{high}")
