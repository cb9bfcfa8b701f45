"""The precision in which sums are taken: float32 at least, and float64 where tensors have it.

What a sum of float64 numbers loses in float32 does not stay small: an optimizer that divides gradients by their size
makes a step of it wherever they cancel.
"""

from __future__ import annotations

import torch
from torch import Tensor


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of another are added up, and in which rows are kept while they can be trained.

    Returns:
        float64 for float64, else float32.

    Example:
        >>> master_dtype(torch.bfloat16), master_dtype(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(tensor: Tensor) -> Tensor:
    """A tensor in the dtype in which it is added up: itself where it has that already.

    Example:
        >>> wide(torch.ones(2, dtype=torch.float16)), wide(torch.ones(2, dtype=torch.float64)).dtype
        (tensor([1., 1.]), torch.float64)
    """
    return tensor.to(master_dtype(tensor.dtype))
