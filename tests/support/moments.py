"""Second moments of correlated vectors, and matrices to be rounded under them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

WIDTHS, GROUPS, SEEDS = st.sampled_from([2, 3, 4, 5, 8, 12]), st.sampled_from([8, 64]), st.integers(0, 99)


def moment(n: int, seed: int, samples: int) -> Tensor:
    """Of `samples` correlated vectors of n entries; fewer samples than entries leave it singular."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, n, generator=generator) @ torch.randn(n, n, generator=generator)
    return x.T @ x / samples
