"""Chooses the next error bound to aim at from the errors measured so far."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

SLACK = 0.97  # an error this close below its bound is close enough
GROWTH = 1.6  # of the squared errors aimed at, until the largest that holds is bracketed
AIM = 0.985  # of a bound: between it and what is close enough
FARTHEST = 16.0  # times the squared error aimed at that the next may be, up or down
INNER = 0.15  # of a bracket in logarithms, at either end, where nothing is tried


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


@dataclass(frozen=True)
class Bracket:
    """The largest aim of one member that held and the smallest above it that failed, each with what was measured.

    Attributes:
        held: squared error aimed at, and error measured; None before any held.
        failed: likewise.

    Example:
        >>> Bracket().after(0.01, 0.2, bound=0.1).next(0.1) < 0.01
        True
    """

    held: tuple[float, float] | None = None
    failed: tuple[float, float] | None = None

    def after(self, aim: float, error: float, bound: float) -> Bracket:
        """The same with one more attempt."""
        return replace(self, held=(aim, error)) if error <= bound else replace(self, failed=(aim, error))

    def next(self, bound: float) -> float:
        """The squared error to aim at: on the line through both ends in logarithms, or in proportion to one of them."""
        if self.held is None or self.failed is None:
            end = self.held or self.failed
            assert end is not None
            ratio = (AIM * bound / max(end[1], 1e-30)) ** 2 if math.isfinite(end[1]) else 0.0
            # What holds goes up, and what failed goes down.
            low, high = (GROWTH**0.25, FARTHEST) if self.held else (1 / FARTHEST, GROWTH**-0.25)
            return end[0] * min(max(ratio, low), high)
        (low, at), (high, beyond) = self.held, self.failed
        rise = math.log(beyond / at) if at > 0 and math.isfinite(beyond) else 0.0
        share = math.log(AIM * bound / at) / rise if rise > 0 else 0.5
        return low * (high / low) ** min(max(share, INNER), 1 - INNER)


def log_ratio(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """`log(predicted / measured)`, 0 where either tells nothing, never more than a factor of 256."""
    tells = (predicted > 0) & (measured > 0) & np.isfinite(measured)
    ratio = np.divide(predicted, measured, out=np.ones_like(predicted), where=tells)
    return np.log(np.clip(ratio, 1 / 256, 256))


def near(errors: np.ndarray, bound: float, goal: np.ndarray) -> bool:
    """Whether the errors of all members that are aimed at something are close below the bound."""
    return bool((errors[goal > 0] >= SLACK * bound).all())
