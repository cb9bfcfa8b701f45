"""Shapes: results on the meta device of operations that PyTorch has no (or too narrow) meta kernel for.

Nothing is assumed here: what stands in this table follows from the arguments' shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _grouped_mm(left: Tensor, right: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
    """`[T, in] x [G, in, out] -> [T, out]`, and the three other forms; kernels know bfloat16 alone."""
    dtype = kwargs.get("out_dtype") or left.dtype
    if left.ndim == 2 and right.ndim == 2:  # groups lie along the axis that is summed over
        offsets: Any = kwargs.get("offs", rest[0] if rest else None)
        shape = (len(offsets), left.shape[0], right.shape[1])
    elif left.ndim == 3 and right.ndim == 3:
        shape = (left.shape[0], left.shape[1], right.shape[2])
    else:
        shape = (left.shape[-2], right.shape[-1])
    return torch.empty(shape, dtype=dtype, device="meta")


META: dict[str, Callable[..., Any]] = {
    "_grouped_mm": _grouped_mm,
    "grouped_mm": _grouped_mm,
}
