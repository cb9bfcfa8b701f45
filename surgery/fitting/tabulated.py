"""What there is to choose from in a fit, as arrays, and what is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Table:
    """All units of all arrangements, as arrays.

    Attributes:
        size: `[U, P]` bytes; inf where a unit has fewer options.
        error: `[U, P]` squared error.
        weight: `[U, M]` relative squared output error per squared error, by member.
        arrangement: `[U]` number of the arrangement that a unit belongs to.
        group: `[A]` number of the group that an arrangement belongs to.
        fixed: `[A]` bytes of an arrangement besides its units; inf where it cannot be taken.
    """

    size: np.ndarray
    error: np.ndarray
    weight: np.ndarray
    arrangement: np.ndarray
    group: np.ndarray
    fixed: np.ndarray


@dataclass(frozen=True)
class Choice:
    """An allocation: the option of every unit, which arrangements are taken, and what is predicted.

    Attributes:
        option: `[U]`.
        taken: `[A]` bool, one arrangement in each group.
        nbytes: of all taken units.
        error: `[M]` predicted relative squared output error.
    """

    option: np.ndarray
    taken: np.ndarray
    nbytes: float
    error: np.ndarray
