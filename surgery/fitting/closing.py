"""Chooses the next error bound to aim at from the errors measured so far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SLACK = 0.97  # an error this close below its bound is close enough
GROWTH = 1.6  # of the squared errors aimed at, until the largest that holds is bracketed


@dataclass(frozen=True)
class Scales:
    """Scales of the squared errors aimed at, by member: now, the largest that held, the smallest that failed."""

    now: np.ndarray
    held: np.ndarray
    failed: np.ndarray

    @classmethod
    def start(cls, members: int) -> Scales:
        """Just below the bound."""
        return cls(np.full(members, SLACK**2), np.zeros(members), np.full(members, np.inf))

    def after(self, held: np.ndarray) -> Scales:
        """The next ones to try: between what held and what failed, or beyond it until there is something between."""
        low = np.where(held, np.maximum(self.held, self.now), self.held)
        high = np.where(held, self.failed, np.minimum(self.failed, self.now))
        up, down = self.now * GROWTH, self.now / GROWTH
        between = np.sqrt(np.where(low > 0, low, 1.0) * np.where(np.isfinite(high), high, 1.0))
        now = np.where(np.isfinite(high), np.where(low > 0, between, down), up)
        return Scales(now, low, high)


def log_ratio(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """`log(predicted / measured)`, 0 where either tells nothing, never more than a factor of 256."""
    tells = (predicted > 0) & (measured > 0) & np.isfinite(measured)
    ratio = np.divide(predicted, measured, out=np.ones_like(predicted), where=tells)
    return np.log(np.clip(ratio, 1 / 256, 256))


def near(errors: np.ndarray, bound: float, goal: np.ndarray) -> bool:
    """Whether the errors of all members that are aimed at something are close below the bound."""
    return bool((errors[goal > 0] >= SLACK * bound).all())
