"""Grids of integers: the values that codes of some bits stand for, and the scale that fits a group of values best.

Integers of b bits are symmetric. The sign and the size of a group's scale are searched so that the squared error is
least; given codes q, the best scale is the projection <x, q> / <q, q>.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

ON_DEVICE = (
    64  # times as many values at once on an accelerator, where a step takes as long for few as for many
)
# Values, times scales that are tried for them, at once: what is between them stays in the cache.
TRIED = 1 << 17
# By bits: the smallest scale tried, as a fraction of the one that clips nothing, and the number of steps down to it.
SEARCH = {2: (0.4, 9), 3: (0.65, 9), 4: (0.8, 9), 5: (0.85, 7), 6: (0.92, 7), 7: (0.95, 5), 8: (0.97, 5)}


@dataclass(frozen=True)
class IntegerGrid:
    """Integers of some bits times a scale for each row.

    Attributes:
        largest: `[R, 1]`, of each row the value of greatest magnitude.
        scale: `[R, 1]`, bfloat16.
        bits: of each value, or of each row's, `[R, 1]`.
    """

    largest: Tensor
    scale: Tensor
    bits: int | Tensor

    def codes(self, column: Tensor) -> Tensor:
        """The nearest integers `[R, w]`, as floats."""
        low, high = self._ends
        # First to at most 1, so that nothing overflows.
        scaled = (column * self._to_one).mul_(self._to_steps)
        return scaled.round_().clamp_(low, high)

    @cached_property
    def _ends(self) -> tuple[Any, Any]:
        """The least and the largest integer."""
        if isinstance(self.bits, int):
            return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
        high = torch.exp2(self.bits - 1.0)
        return -high, high - 1

    @cached_property
    def _to_one(self) -> Tensor:
        return _inverse(self.largest)

    @cached_property
    def _to_steps(self) -> Tensor:
        return self.largest * _inverse(self._scale)

    def values(self, codes: Tensor) -> Tensor:
        """Integers times their scale."""
        return codes * self._scale

    @cached_property
    def _scale(self) -> Tensor:
        return self.scale.float()


def grid_of(groups: Tensor, bits: int) -> IntegerGrid:
    """The grid of least squared error among the candidates, for `groups [G, width]`."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    largest = largest_of(groups)
    groups = groups * _inverse(largest)  # to at most 1, so that no square overflows; the largest value is +1
    tried = _candidates(bits, groups)
    scales = []
    for part in groups.split(max(1, at_once(TRIED, groups) // (len(tried) * groups.shape[1]))):
        q = (part * tried).round_().clamp_(low, high)  # [C, G, width]
        # Whole numbers, so <q, q> is 0 or at least 1.
        xq, inverse = (part * q).sum(2), q.square_().sum(2).clamp_(min=1).reciprocal_()
        gain = xq * xq * inverse  # |x|^2 minus the error left by the projection
        gain, best = gain.nan_to_num_(nan=-1.0).max(0, keepdim=True)
        scales.append(torch.where(gain >= 0, (xq * inverse).gather(0, best), 0.0).view(-1, 1))
    return IntegerGrid(largest, (torch.cat(scales) * largest).to(torch.bfloat16), bits)


def largest_of(groups: Tensor) -> Tensor:
    """Of each of `groups [G, width]` the first value of greatest magnitude: `[G, 1]`."""
    if groups.device.type != "cpu":  # which would be waited for
        return groups.gather(1, groups.abs().argmax(1, keepdim=True))
    # In a third of the time of `argmax`.
    least, most = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    found, tied = torch.where(-least > most, least, most), (-least == most).squeeze(1)
    if bool(tied.any()):
        some = groups[tied]
        found[tied] = some.gather(1, some.abs().argmax(1, keepdim=True))
    return found


def _candidates(bits: int, groups: Tensor) -> Tensor:
    """Inverse scales to try for values of at most 1, `[C, 1, 1]`: which end takes the largest decides the sign."""
    return _inverse_scales(bits, groups.dtype, groups.device)


@cache
def _inverse_scales(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Made once: an accelerator is waited for when numbers are sent to it."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    smallest, steps = SEARCH.get(bits, (1.0, 1))  # finer codes lose next to nothing at their full range
    shrinks = [1.0 - (1.0 - smallest) * step / max(steps - 1, 1) for step in range(steps)]
    ends = (low, high) if bits in SEARCH else (low,)
    tried = [end / shrink for end in ends for shrink in shrinks]
    with torch.inference_mode(False):
        return torch.tensor(tried, dtype=dtype, device=device).view(-1, 1, 1)


def at_once(values: int, like: Tensor) -> int:
    """How many values are worked on at once, where there is no cache to stay in and each step costs a launch."""
    return values if like.device.type == "cpu" else values * ON_DEVICE


def _inverse(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0 or so small that 1/x is infinite."""
    inverse = x.reciprocal()
    return torch.where(inverse.isfinite(), inverse, torch.zeros_like(inverse))
